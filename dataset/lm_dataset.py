"""Data sets of training samples: item `i` is `(X, Y, loss_mask)`.

Items are in file order and unpacked; `dataset.packing` makes rows and batches of them.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .records import DataError, parse_text
from .token_store import INDEX_DTYPE, ArrayWriter, Encoded, TextTokenizer, TokenStore

_CHUNK = 1 << 20  # documents looked at together when a table is made


class TextEncoder:
    """`{"text"}` lines to documents `<s>` text `</s>`."""

    weighted = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = TextTokenizer(tokenizer)
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if self._bos is None or self._eos is None:
            raise DataError("--tokenizer_path: this tokenizer lacks a bos_token or an eos_token")
        self.dtype = self._tokenizer.dtype
        self.key = f"pretrain {self._bos} {self._eos} {self._tokenizer.hash}"

    def parse(self, line: bytes) -> tuple[str, int]:
        """The text of a line and its UTF-8 bytes. Raises RecordError."""
        text = parse_text(line)
        return text, len(text.encode("utf-8"))

    def encode(self, records: Sequence[str]) -> Encoded:
        """Ids of the documents, `<s>` and `</s>` included."""
        texts = self._tokenizer.encode_batch(records)
        lengths = np.array([len(text) + 2 for text in texts], dtype=np.int64)
        ends = np.cumsum(lengths)
        ids = np.empty(lengths.sum(), dtype=self.dtype)
        for text, end in zip(texts, ends, strict=True):
            ids[end - 1 - len(text) : end - 1] = text
        ids[ends - lengths] = self._bos
        ids[ends - 1] = self._eos
        return Encoded(ids, lengths)


class PretrainDataset(Dataset):
    """The texts of a JSONL file as samples for next-token prediction.

    A document is `<s>` text `</s>`. An item holds at most `max_length` of its ids; of a longer
    document, consecutive items share one id, so that each token after `<s>` is a target once.

    `dataset[i]` is `(X, Y, loss_mask)`, each (len,): `X = ids[:-1]` and `Y = ids[1:]` int64,
    `loss_mask` float32 (1 where predicting `Y` is to be learnt).

    Raises DataError as `TokenStore.open_or_build`, ValueError for a max_length below 2.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Any,
        max_length: int,
        *,
        cache_dir: str | Path | None = None,
        skip_bad_lines: bool = False,
    ) -> None:
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}; an item needs at least two ids")
        self.max_length = max_length
        self.store = TokenStore.open_or_build(
            path, TextEncoder(tokenizer), cache_dir=cache_dir, skip_bad_lines=skip_bad_lines
        )
        self._use("all", lambda: np.arange(len(self.store.lines)))

    def split(self, val_ratio: float) -> tuple["PretrainDataset", "PretrainDataset"]:
        """Two data sets that share no document: one to train on, and `val_ratio` of all held out.

        Which documents are held out depends on their number and the ratio alone, so that runs with
        different seeds, or resumed, are measured on the same ones.

        Raises DataError if there is only one document.
        """
        count = len(self.store.lines)
        if count < 2:
            raise DataError(f"{self.store.path}: one document cannot be split for validation")
        held_out = min(max(1, round(val_ratio * count)), count - 1)

        def shuffled() -> np.ndarray:
            return np.random.default_rng(0).permutation(count)

        train, val = copy.copy(self), copy.copy(self)
        train._use(f"train_{held_out}", lambda: np.sort(shuffled()[held_out:]))
        val._use(f"val_{held_out}", lambda: np.sort(shuffled()[:held_out]))
        return train, val

    def _use(self, part: str, documents: Callable[[], np.ndarray]) -> None:
        """Restrict this data set to some documents of the store."""
        self.part = part
        self._items = self.store.derived(
            f"items_{self.max_length}_{part}", lambda folder: self._build_items(folder, documents())
        )

    @property
    def fingerprint(self) -> str:
        """Identifies the items, wherever the file lies."""
        return f"{self.store.content} {self.part} {self.max_length}"

    @property
    def n_documents(self) -> int:
        """Texts, bad lines excepted."""
        return len(self._documents)

    @property
    def n_tokens(self) -> int:
        """Targets in one epoch: all ids but each document's first."""
        return self._items.meta["tokens"]

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return self._items.meta["text_bytes"]

    @property
    def n_bad_lines(self) -> int:
        """Lines of the file that are left out."""
        return self.store.bad_lines.count

    def __len__(self) -> int:
        return int(self._first_items[-1])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        number, part = self._locate(index)
        document = self._documents[number]
        start = int(self.store.offsets[document]) + part * (self.max_length - 1)
        end = min(start + self.max_length, int(self.store.offsets[document + 1]))
        ids = torch.from_numpy(self.store.ids[start:end].astype(np.int64))
        return ids[:-1], ids[1:], torch.ones(len(ids) - 1)

    def line_number(self, index: int) -> int:
        """The line of the file, from 1, that item `index` comes from."""
        return int(self.store.lines[self._documents[self._locate(index)[0]]])

    def lengths(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Positions, `len(X)`, of the items `start` to `stop`: int64, without reading tokens."""
        stop = len(self) if stop is None else min(stop, len(self))
        if start >= stop:
            return np.empty(0, dtype=np.int64)
        first, last = self._locate(start)[0], self._locate(stop - 1)[0]
        starts = np.asarray(self._first_items[first : last + 2])
        positions = self._positions(self._documents[first : last + 1])
        full = self.max_length - 1
        lengths = np.full(starts[-1] - starts[0], full, dtype=np.int64)
        lengths[starts[1:] - 1 - starts[0]] = positions - (np.diff(starts) - 1) * full
        return lengths[start - starts[0] : stop - starts[0]]

    @property
    def _documents(self) -> np.ndarray:
        """(documents,) the documents of the store that are used, in file order."""
        return self._items.arrays["documents"]

    @property
    def _first_items(self) -> np.ndarray:
        """(documents + 1,) index of each document's first item, and the number of items."""
        return self._items.arrays["first_items"]

    def _positions(self, documents: np.ndarray) -> np.ndarray:
        """The targets of documents of the store."""
        return self.store.offsets[documents + 1] - self.store.offsets[documents] - 1

    def _locate(self, index: int) -> tuple[int, int]:
        """The number of an item's document, and which of the document's items it is."""
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        number = int(np.searchsorted(self._first_items, index, side="right")) - 1
        return number, index - int(self._first_items[number])

    def _build_items(self, folder: Path, documents: np.ndarray) -> dict[str, Any]:
        """Write the tables behind `_documents` and `_first_items`."""
        full = self.max_length - 1
        items = tokens = text_bytes = 0
        with ArrayWriter(folder, documents=INDEX_DTYPE, first_items=INDEX_DTYPE) as writer:
            writer.append("documents", documents)
            writer.append("first_items", [0])
            for start in range(0, len(documents), _CHUNK):
                chunk = documents[start : start + _CHUNK]
                positions = self._positions(chunk)
                ends = items + np.cumsum(-(-positions // full))
                writer.append("first_items", ends)
                items = int(ends[-1])
                tokens += int(positions.sum())
                text_bytes += int(self.store.bytes[chunk].sum())
        return {"arrays": writer.description(), "tokens": tokens, "text_bytes": text_bytes}
