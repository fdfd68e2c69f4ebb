"""Data sets of training samples: item `i` is `(X, Y, loss_mask)`.

Items are in file order and unpacked; `dataset.packing` makes rows and batches of them.
"""

from collections.abc import Sequence
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
        self._items = self.store.derived(f"items_{max_length}", self._build_items)

    @property
    def n_documents(self) -> int:
        """Texts in the file, bad lines excepted."""
        return len(self.store.lines)

    @property
    def n_tokens(self) -> int:
        """Targets in one epoch: all ids but each document's first."""
        return len(self.store.ids) - self.n_documents

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return self.store.text_bytes

    @property
    def n_bad_lines(self) -> int:
        """Lines that are left out."""
        return self.store.bad_lines.count

    def __len__(self) -> int:
        return int(self._first_items[-1])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        document, part = self._locate(index)
        start = int(self.store.offsets[document]) + part * (self.max_length - 1)
        end = min(start + self.max_length, int(self.store.offsets[document + 1]))
        ids = torch.from_numpy(self.store.ids[start:end].astype(np.int64))
        return ids[:-1], ids[1:], torch.ones(len(ids) - 1)

    def line_number(self, index: int) -> int:
        """The line of the file, from 1, that item `index` comes from."""
        return int(self.store.lines[self._locate(index)[0]])

    def lengths(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Positions, `len(X)`, of the items `start` to `stop`: int64, without reading tokens."""
        stop = len(self) if stop is None else min(stop, len(self))
        if start >= stop:
            return np.empty(0, dtype=np.int64)
        first, last = self._locate(start)[0], self._locate(stop - 1)[0]
        starts = np.asarray(self._first_items[first : last + 2])
        positions = np.diff(self.store.offsets[first : last + 2]) - 1
        full = self.max_length - 1
        lengths = np.full(starts[-1] - starts[0], full, dtype=np.int64)
        lengths[starts[1:] - 1 - starts[0]] = positions - (np.diff(starts) - 1) * full
        return lengths[start - starts[0] : stop - starts[0]]

    @property
    def _first_items(self) -> np.ndarray:
        """(documents + 1,) index of each document's first item, and the number of items."""
        return self._items.arrays["first_items"]

    def _locate(self, index: int) -> tuple[int, int]:
        """The document of an item, and which of the document's items it is."""
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        document = int(np.searchsorted(self._first_items, index, side="right")) - 1
        return document, index - int(self._first_items[document])

    def _build_items(self, folder: Path) -> dict[str, Any]:
        """Write the table behind `_first_items`."""
        full = self.max_length - 1
        total = 0
        with ArrayWriter(folder, first_items=INDEX_DTYPE) as writer:
            writer.append("first_items", [0])
            for start in range(0, self.n_documents, _CHUNK):
                positions = np.diff(self.store.offsets[start : start + _CHUNK + 1]) - 1
                ends = total + np.cumsum(-(-positions // full))
                writer.append("first_items", ends)
                total = int(ends[-1])
        return {"arrays": writer.description()}
