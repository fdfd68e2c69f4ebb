"""Data sets of training samples: item `i` is `(X, Y, loss_mask)`.

Items are in file order and unpacked; `dataset.packing` makes rows and batches of them.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from common import UserError

from .chat import ChatEncoder
from .records import parse_text
from .token_store import (
    INDEX_DTYPE,
    ArrayWriter,
    Encoded,
    Encoder,
    Parsed,
    TextTokenizer,
    TokenStore,
)
from .turns import Kept, Turns, equal_answers, find_turns, keep_answers, keep_prompts

CHUNK = 1 << 20  # documents looked at together when a table is made
_CHUNK_TOKENS = 1 << 20  # and tokens, where they are looked at, too
_SUM_DTYPE = np.dtype("<f8")

Item = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class TextEncoder:
    """`{"text"}` lines to documents `<s>` text `</s>`."""

    weighted = False
    counted = ()

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = TextTokenizer(tokenizer)
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if self._bos is None or self._eos is None:
            raise UserError("--tokenizer_path: this tokenizer lacks a bos_token or an eos_token")
        self.dtype = self._tokenizer.dtype
        self.key = f"pretrain {self._bos} {self._eos} {self._tokenizer.hash}"

    def parse(self, line: bytes) -> Parsed:
        """The text of a line and its UTF-8 bytes. Raises RecordError."""
        text = parse_text(line)
        return Parsed(text, len(text.encode("utf-8")))

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


class StoredDataset(Dataset, ABC):
    """Items made of the documents of a JSONL file, or of some of the documents.

    `store` holds the file's token ids, `max_length` is the most ids of an item, and `part` names
    the documents that are used.

    Raises UserError as `TokenStore.open_or_build` or for want of items, ValueError for a
    max_length below 2.
    """

    def __init__(
        self,
        path: str | Path,
        encoder: Encoder,
        max_length: int,
        options: str,
        *,
        cache_dir: str | Path | None,
        skip_bad_lines: float,
    ) -> None:
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}; an item needs at least two ids")
        self.max_length = max_length
        self._options = options  # all that the items depend on, besides store and part
        self.store = TokenStore.open_or_build(
            path, encoder, cache_dir=cache_dir, skip_bad_lines=skip_bad_lines
        )

    @abstractmethod
    def _build_items(self, folder: Path, documents: np.ndarray) -> dict[str, Any]:
        """Write the table of the items of some documents; returns its meta.

        The array `documents` holds those that have items.
        """

    @abstractmethod
    def _document(self, index: int) -> int:
        """The document of the store that item `index` comes from."""

    def split(self, val_ratio: float) -> tuple["StoredDataset", "StoredDataset"]:
        """Two data sets that share no document: one to train on, and `val_ratio` of all held out.

        Which documents are held out depends on their number and the ratio alone, so that runs with
        different seeds, or resumed, are measured on the same ones.

        Raises UserError if there is only one document, or a part has no items.
        """
        count = self._n_stored
        if count < 2:
            raise UserError(f"{self.store.path}: one document cannot be split for validation")
        held_out = min(max(1, round(val_ratio * count)), count - 1)

        def shuffled() -> np.ndarray:
            return np.random.default_rng(0).permutation(count)

        train, val = copy.copy(self), copy.copy(self)
        train._use(f"train_{held_out}", lambda: np.sort(shuffled()[held_out:]))
        val._use(f"val_{held_out}", lambda: np.sort(shuffled()[:held_out]))
        return train, val

    def _use_all(self) -> None:
        """Use every document of the store."""
        self._use("all", lambda: np.arange(self._n_stored))

    @property
    def _n_stored(self) -> int:
        """The number of documents of the store; of what a line gives, where that is several."""
        return len(self.store.lines)

    def _use(self, part: str, documents: Callable[[], np.ndarray]) -> None:
        """Restrict this data set to some documents of the store."""
        self.part = part
        self._items = self.store.derived(
            f"items_{self.items_key}", lambda folder: self._build_items(folder, documents())
        )
        if self.n_documents == 0:
            raise UserError(
                f"{self.store.path}: nothing to learn, or nothing that fits; a larger "
                "--max_seq_len may help"
            )

    @property
    def items_key(self) -> str:
        """Tells these items from others of the same store; fit for a file name."""
        return f"{self._options}_{self.part}"

    @property
    def fingerprint(self) -> str:
        """Identifies the items, wherever the file lies."""
        return f"{self.store.content} {self.part} {self._options}"

    @property
    def n_documents(self) -> int:
        """Documents that have items."""
        return len(self._documents)

    @property
    def n_bad_lines(self) -> int:
        """Lines of the file that are left out."""
        return self.store.bad_lines.count

    @property
    def notes(self) -> list[str]:
        """What is to be known of the file, a line for each: its bad lines that are left out."""
        bad = self.n_bad_lines
        return [f"{bad:,} bad lines of the file left out"] if bad else []

    def line_number(self, index: int) -> int:
        """The line of the file, from 1, that item `index` comes from."""
        return int(self.store.lines[self._document(index)])

    def _check(self, index: int) -> int:
        """`index` counted from the front. Raises IndexError."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return index % len(self)

    @property
    def _documents(self) -> np.ndarray:
        """The documents of the store that have items, in file order."""
        return self._items.arrays["documents"]


class PretrainDataset(StoredDataset):
    """The texts of a JSONL file as samples for next-token prediction.

    A document is `<s>` text `</s>`. An item holds at most `max_length` of its ids; of a longer
    document, consecutive items share one id, so that each token after `<s>` is a target once.

    `dataset[i]` is `(X, Y, loss_mask)`, each (len,): `X = ids[:-1]` and `Y = ids[1:]` int64,
    `loss_mask` float32 (1 where predicting `Y` is to be learnt).
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Any,
        max_length: int,
        *,
        cache_dir: str | Path | None = None,
        skip_bad_lines: float = 0.0,
    ) -> None:
        super().__init__(
            path,
            TextEncoder(tokenizer),
            max_length,
            f"{max_length}",
            cache_dir=cache_dir,
            skip_bad_lines=skip_bad_lines,
        )
        self._use_all()

    @property
    def n_tokens(self) -> int:
        """Targets in one epoch: all ids but each document's first."""
        return self._items.meta["tokens"]

    @property
    def n_positions(self) -> int:
        """The sum of all items' lengths."""
        return self.n_tokens

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return self._items.meta["text_bytes"]

    def __len__(self) -> int:
        return int(self._first_items[-1])

    def __getitem__(self, index: int) -> Item:
        number, part = self._locate(index)
        document = self._documents[number]
        start = int(self.store.offsets[document]) + part * (self.max_length - 1)
        end = min(start + self.max_length, int(self.store.offsets[document + 1]))
        ids = torch.from_numpy(self.store.ids[start:end].astype(np.int64))
        return ids[:-1], ids[1:], torch.ones(len(ids) - 1)

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
    def _first_items(self) -> np.ndarray:
        """(documents + 1,) index of each document's first item, and the number of items."""
        return self._items.arrays["first_items"]

    def _positions(self, documents: np.ndarray) -> np.ndarray:
        """The targets of documents of the store."""
        return self.store.offsets[documents + 1] - self.store.offsets[documents] - 1

    def _document(self, index: int) -> int:
        return int(self._documents[self._locate(index)[0]])

    def _locate(self, index: int) -> tuple[int, int]:
        """The number of an item's document, and which of the document's items it is."""
        index = self._check(index)
        number = int(np.searchsorted(self._first_items, index, side="right")) - 1
        return number, index - int(self._first_items[number])

    def _build_items(self, folder: Path, documents: np.ndarray) -> dict[str, Any]:
        full = self.max_length - 1
        items = tokens = text_bytes = 0
        with ArrayWriter(folder, documents=INDEX_DTYPE, first_items=INDEX_DTYPE) as writer:
            writer.append("documents", documents)
            writer.append("first_items", [0])
            for start in range(0, len(documents), CHUNK):
                chunk = documents[start : start + CHUNK]
                positions = self._positions(chunk)
                ends = items + np.cumsum(-(-positions // full))
                writer.append("first_items", ends)
                items = int(ends[-1])
                tokens += int(positions.sum())
                text_bytes += int(self.store.bytes[chunk].sum())
        return {"arrays": writer.description(), "tokens": tokens, "text_bytes": text_bytes}


class ChatDataset(StoredDataset):
    """The conversations of a JSONL file: an item for each of which something can be used.

    The store holds whole conversations. What is kept of them is a table of its own, so that
    different lengths and numbers of turns share one store.
    """

    _COLUMNS = dict.fromkeys(
        ("prefixes", "begins", "ends", "unanswered_turns", "dropped_turns", "cut_answers"),
        INDEX_DTYPE,
    )
    _SUMS = ("unanswered_turns", "dropped_turns", "cut_answers")
    _COUNTED: tuple[str, ...] = ()  # what the encoder counts and the notes name
    _REASONS = {
        "unanswered_turns": "last turns left out: nobody answers them",
        "dropped_turns": "turns left out: their conversations are longer than --max_seq_len",
        "cut_answers": "last answers cut: longer than --max_seq_len",
        "left_out": "conversations left out: nothing to learn, or nothing of that fits",
    }

    def __init__(
        self,
        path: str | Path,
        encoder: ChatEncoder,
        max_length: int,
        options: str,
        *,
        cache_dir: str | Path | None,
        skip_bad_lines: float,
    ) -> None:
        super().__init__(
            path,
            encoder,
            max_length,
            options,
            cache_dir=cache_dir,
            skip_bad_lines=skip_bad_lines,
        )
        self._kept = self.store.derived(
            f"kept_{options}", lambda folder: self._build_kept(folder, encoder)
        )
        self._use_all()

    @abstractmethod
    def _keep(
        self,
        ids: np.ndarray,
        weights: np.ndarray,
        offsets: np.ndarray,
        turns: Turns,
        encoder: ChatEncoder,
    ) -> tuple[Kept, dict[str, np.ndarray]]:
        """What is kept of some conversations, and further columns of the table."""

    @property
    def counts(self) -> dict[str, int]:
        """What is missing of the file's conversations, bad lines aside.

        `unanswered_turns` at the end; `dropped_turns`, the oldest of what is too long;
        `cut_answers`; what the encoder counts; and `left_out`, the conversations without an item.
        """
        meta = self._items.meta
        return {name: meta[name] for name in (*ChatDataset._SUMS, *self._COUNTED, "left_out")}

    @property
    def notes(self) -> list[str]:
        """What is to be known of the file: its bad lines, and each count that is not 0."""
        counts = self.counts
        missing = [f"{counts[name]:,} {why}" for name, why in self._REASONS.items() if counts[name]]
        return [*super().notes, *missing]

    def __len__(self) -> int:
        return self.n_documents

    def lengths(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Positions, `len(X)`, of the items `start` to `stop`: int64, without reading tokens."""
        return self._kept_ids(self._documents[start:stop]) - 1

    def _document(self, index: int) -> int:
        return int(self._documents[self._check(index)])

    def _kept_ids(self, documents: np.ndarray) -> np.ndarray:
        """How many ids are kept of documents of the store."""
        kept = self._kept.arrays
        return kept["prefixes"][documents] + kept["ends"][documents] - kept["begins"][documents]

    def _read(self, values: np.ndarray, document: int) -> np.ndarray:
        """What belongs to the kept ids of a document, from an array of the store."""
        kept = self._kept.arrays
        start = int(self.store.offsets[document])
        prefix, begin, end = (int(kept[name][document]) for name in ("prefixes", "begins", "ends"))
        return np.concatenate([values[start : start + prefix], values[start + begin : start + end]])

    def _build_kept(self, folder: Path, encoder: ChatEncoder) -> dict[str, Any]:
        """Write what is kept of each document of the store; positions count from its first id."""
        offsets, count = self.store.offsets, len(self.store.lines)
        with ArrayWriter(folder, **self._COLUMNS) as writer:
            document = 0
            while document < count:
                limit = offsets[document] + _CHUNK_TOKENS
                stop = max(int(np.searchsorted(offsets, limit, side="right")) - 1, document + 1)
                start = offsets[document]
                chunk = offsets[document : stop + 1] - start
                ids = self.store.ids[start : offsets[stop]]
                weights = self.store.weights[start : offsets[stop]]
                turns = find_turns(ids, chunk, encoder)
                kept, columns = self._keep(ids, weights, chunk, turns, encoder)
                columns |= {
                    "prefixes": kept.prefixes,
                    "begins": kept.begins - chunk[:-1],
                    "ends": kept.ends - chunk[:-1],
                    "unanswered_turns": turns.ends < chunk[1:],
                    "dropped_turns": kept.dropped_turns,
                    "cut_answers": kept.cut,
                }
                for name, values in columns.items():
                    writer.append(name, values)
                document = stop
        return {"arrays": writer.description()}

    def _build_items(self, folder: Path, documents: np.ndarray) -> dict[str, Any]:
        kept = self._kept.arrays
        sums = (*self._SUMS, *self._COUNTED, "left_out", "positions")
        meta: dict[str, Any] = dict.fromkeys(sums, 0)
        with ArrayWriter(folder, documents=INDEX_DTYPE) as writer:
            for start in range(0, len(documents), CHUNK):
                chunk = documents[start : start + CHUNK]
                used = chunk[kept["ends"][chunk] > kept["begins"][chunk]]
                writer.append("documents", used)
                meta["left_out"] += len(chunk) - len(used)
                meta["positions"] += int(self._kept_ids(used).sum()) - len(used)
                for name in self._SUMS:
                    meta[name] += kept[name][chunk].sum().item()
                for name in self._COUNTED:
                    meta[name] += int(self.store.counts(name)[chunk].sum())
        return {"arrays": writer.description(), **meta}


class SFTDataset(ChatDataset):
    """The conversations of a JSONL file as samples for instruction tuning.

    The targets are all tokens of the assistant's messages and the `</s>` after each. Of a longer
    conversation than `max_length` ids, the oldest turns are left out, each whole, and if the last
    one alone is still too long, the end of its answer is cut off. The system message stays. A
    conversation of which nothing to learn remains has no item. An answer without text, reasoning
    and calls is not learnt, `</s>` included.

    `dataset[i]` is `(X, Y, loss_mask)`, each (len,): `X = ids[:-1]` and `Y = ids[1:]` int64,
    `loss_mask` float32, the weight of each target and 0 elsewhere.

    Args:
        path: of the file, whose lines `dataset.records.parse_chat` reads.
        tokenizer: with this project's chat template.
        max_length: the most ids of an item.
        cache_dir, skip_bad_lines: as for `TokenStore.open_or_build`.
        max_turns: keep the last so many turns, a user's message and what follows it, or None.
        loss_weighting: "token" gives each target the weight of its message (1 unless the file says
            otherwise); "sample" divides that among the targets of an answer.
    """

    _COLUMNS = {**ChatDataset._COLUMNS, "targets": INDEX_DTYPE, "text_bytes": _SUM_DTYPE}
    _SUMS = (*ChatDataset._SUMS, "targets", "text_bytes")
    _COUNTED = ("empty_answers",)
    _REASONS = {**ChatDataset._REASONS, "empty_answers": "empty answers not learnt"}

    def __init__(
        self,
        path: str | Path,
        tokenizer: Any,
        max_length: int,
        *,
        cache_dir: str | Path | None = None,
        skip_bad_lines: float = 0.0,
        max_turns: int | None = None,
        loss_weighting: Literal["token", "sample"] = "token",
    ) -> None:
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"max_turns is {max_turns}; a sample needs at least one turn")
        if loss_weighting not in ("token", "sample"):
            raise ValueError(f"loss_weighting is {loss_weighting!r}, not 'token' or 'sample'")
        self.max_turns = max_turns
        self.loss_weighting = loss_weighting
        super().__init__(
            path,
            ChatEncoder(tokenizer),
            max_length,
            f"{max_length}_{max_turns or 'all'}_{loss_weighting}",
            cache_dir=cache_dir,
            skip_bad_lines=skip_bad_lines,
        )

    @property
    def n_tokens(self) -> int:
        """Targets in one epoch."""
        return self._items.meta["targets"]

    @property
    def n_positions(self) -> int:
        """The sum of all items' lengths."""
        return self._items.meta["positions"]

    @property
    def text_bytes(self) -> float:
        """UTF-8 bytes of the text that is learnt, each times its token's weight in the loss mask.

        So the losses, weighted alike, give bits per byte.
        """
        return self._items.meta["text_bytes"]

    def __getitem__(self, index: int) -> Item:
        document = self._document(index)
        ids = torch.from_numpy(self._read(self.store.ids, document).astype(np.int64))
        weights = self._weigh(self._read(self.store.weights, document))
        return ids[:-1], ids[1:], torch.from_numpy(weights)[1:]

    def _weigh(self, weights: np.ndarray) -> np.ndarray:
        """Weights in the loss from weights in the store."""
        return equal_answers(weights) if self.loss_weighting == "sample" else weights

    def _keep(
        self,
        ids: np.ndarray,
        weights: np.ndarray,
        offsets: np.ndarray,
        turns: Turns,
        encoder: ChatEncoder,
    ) -> tuple[Kept, dict[str, np.ndarray]]:
        kept = keep_answers(turns, weights, len(encoder.newline), self.max_length, self.max_turns)
        position, lengths = np.arange(len(ids)), np.diff(offsets)
        begins, ends = (np.repeat(border, lengths) for border in (kept.begins, kept.ends))
        weights = np.where((begins <= position) & (position < ends), weights, 0)
        text_bytes = self._weigh(weights).astype(_SUM_DTYPE) * encoder.byte_counts[ids]
        return kept, {
            "targets": np.add.reduceat(weights > 0, offsets[:-1], dtype=INDEX_DTYPE),
            "text_bytes": np.add.reduceat(text_bytes, offsets[:-1]),
        }


class RLAIFDataset(ChatDataset):
    """The last question of each conversation of a JSONL file, and the answer that it has there.

    `dataset[i]` is {"prompt", "answer"}, two strings: the conversation up to the last assistant
    message as the chat template renders it, generation prompt included; and that message, without
    its reasoning. A prompt has at most `max_length` ids: of a longer one the oldest turns are left
    out, each whole, and the system message stays. Where the last turn alone is longer, there is no
    item. The arguments are those of `SFTDataset`.
    """

    _COLUMNS = {**ChatDataset._COLUMNS, "answer_begins": INDEX_DTYPE, "answer_ends": INDEX_DTYPE}

    def __init__(
        self,
        path: str | Path,
        tokenizer: Any,
        max_length: int,
        *,
        cache_dir: str | Path | None = None,
        skip_bad_lines: float = 0.0,
    ) -> None:
        encoder = ChatEncoder(tokenizer)
        super().__init__(
            path,
            encoder,
            max_length,
            f"prompts_{max_length}",
            cache_dir=cache_dir,
            skip_bad_lines=skip_bad_lines,
        )
        self._backend = tokenizer.backend_tokenizer
        self._end_think = encoder.end_think

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"prompt": self._decode(self.prompt_ids(index)), "answer": self._answer(index)}

    def prompt_ids(self, index: int) -> torch.Tensor:
        """(len,) int64, the prompt of item `index`; no text in it has become a control token."""
        return torch.from_numpy(self._read(self.store.ids, self._document(index)).astype(np.int64))

    def _answer(self, index: int) -> str:
        document, columns = self._document(index), self._kept.arrays
        start = self.store.offsets[document]
        begin, end = columns["answer_begins"][document], columns["answer_ends"][document]
        ids = self.store.ids[start + begin : start + end]
        thoughts = np.flatnonzero(ids == self._end_think)
        if len(thoughts):
            return self._decode(ids[thoughts[0] + 1 :]).removeprefix("\n")
        return self._decode(ids)

    def _decode(self, ids: Any) -> str:
        return self._backend.decode(ids.tolist(), skip_special_tokens=False)

    def _keep(
        self,
        ids: np.ndarray,
        weights: np.ndarray,
        offsets: np.ndarray,
        turns: Turns,
        encoder: ChatEncoder,
    ) -> tuple[Kept, dict[str, np.ndarray]]:
        header = 1 + len(encoder.headers["assistant"])
        return keep_prompts(turns, header, self.max_length), {
            "answer_begins": turns.answers + header - offsets[:-1],
            "answer_ends": turns.ends - len(encoder.newline) - 1 - offsets[:-1],
        }
