"""The base of the data sets: a token store, and a table of the items made of it."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from common import Text, UserError

from .arrays import INDEX_DTYPE, LENGTH_DTYPE, Append, build_once
from .chat import ChatEncoder
from .reader import text_note
from .records import DEFAULT, RecordOptions
from .text import TextTokenizer
from .token_store import Encoded, TokenStore
from .turns import Spans, Turns, find_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
CHUNK = 1 << 16  # rows of a table looked at together
CHUNK_TOKENS = 1 << 20  # or tokens


class NoItems(UserError):
    """A source has records, but no item can be made of them."""


class StoredDataset(Dataset, ABC):
    """Items made of the documents of a token store.

    A table beside the tokens has a row for each item, in file order: its document, and which ids of
    the document it takes, `lengths` in all, namely the first `prefixes` and those from position
    `begins` on. An item that is made of several documents has as many rows.

    Args:
        tokenizer: tokenizer with this project's chat template, or for texts any with bos and eos.
        max_length: most ids of an item.
        path, cache_dir, skip_bad_lines: see `TokenStore.open_or_build`, also for errors; that there
            are no items is one, too.
        records: what flags say about records.
        encoder: what `make_encoder` makes of `tokenizer` and `records`, to open several sources
            without making it for each.
    """

    _ENCODER: type[TextTokenizer]
    _COLUMNS = {  # of the table; subclasses add what is summed
        "documents": INDEX_DTYPE,
        "prefixes": LENGTH_DTYPE,
        "begins": INDEX_DTYPE,
        "lengths": LENGTH_DTYPE,
    }
    _REASONS: dict[str, str] = {}  # why something is missing, by the names of `counts`
    _DOCUMENTS = 1  # of each record in the store, and of each item

    def __init__(
        self,
        path: str | Path,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        *,
        cache_dir: str | Path | None = None,
        skip_bad_lines: float = 0.0,
        records: RecordOptions = DEFAULT,
        encoder: TextTokenizer | None = None,
    ) -> None:
        encoder = self.make_encoder(tokenizer, records) if encoder is None else encoder
        self.max_length = max_length
        self._separator = encoder.options.separator
        self.store = TokenStore.open_or_build(
            path, encoder, cache_dir=cache_dir, skip_bad_lines=skip_bad_lines
        )
        self._n_records = len(self.store.lines) // self._DOCUMENTS
        self._use("all", partial(self._write_items, encoder))

    @classmethod
    def make_encoder(
        cls, tokenizer: "PreTrainedTokenizerBase", records: RecordOptions = DEFAULT
    ) -> TextTokenizer:
        """What makes token ids of the records of sources."""
        return cls._ENCODER(tokenizer, records)

    @property
    @abstractmethod
    def _options(self) -> str:
        """All that the items depend on, besides `store` and the part; fit for a file name."""

    @abstractmethod
    def _tabulate(self, first: int, stop: int, encoder: Any) -> dict[str, np.ndarray]:
        """The table's columns for the documents from `first` up to `stop`."""

    def split(self, val_ratio: float) -> tuple["StoredDataset", "StoredDataset"]:
        """Two data sets that share no record: one to train on, and `val_ratio` of all held out.

        Which records are held out depends on their number and the ratio alone, so that runs with
        different seeds are measured on the same ones. Raises NoItems if a part has none.
        """
        if self._n_records < 2:
            raise UserError(f"{self.store.path}: one document cannot be split for validation")
        held_out = min(max(1, round(val_ratio * self._n_records)), self._n_records - 1)
        train, val = copy.copy(self), copy.copy(self)
        for name, part in (("train", train), ("val", val)):
            part._use(f"{name}_{held_out}", partial(self._select, held_out, name == "val"))
        return train, val

    def _write_items(self, encoder: TextTokenizer, append: Append) -> dict[str, int]:
        """Write the rows of all records."""
        offsets, first = self.store.offsets, 0
        while first < len(offsets) - 1:
            stop = int(np.searchsorted(offsets, offsets[first] + CHUNK_TOKENS, side="right")) - 1
            stop = max(stop - stop % self._DOCUMENTS, first + self._DOCUMENTS)
            append(**self._tabulate(first, stop, encoder))
            first = stop
        return self._count(np.ones(self._n_records, dtype=bool))

    def _select(self, held_out: int, is_held_out: bool, append: Append) -> dict[str, int]:
        """Write the rows of the records that are held out, or of all others."""
        records = np.full(self._n_records, not is_held_out)
        records[np.random.default_rng(0).permutation(self._n_records)[:held_out]] = is_held_out
        table = self._items.arrays
        for start in range(0, len(table["documents"]), CHUNK):
            rows = slice(start, start + CHUNK)
            chosen = records[table["documents"][rows] // self._DOCUMENTS]
            append(**{name: column[rows][chosen] for name, column in table.items()})
        return self._count(records)

    def _use(self, part: str, write: Callable[[Append], dict[str, int]]) -> None:
        """Use the table of some records, written first if need be."""
        self._part = part
        folder = self.store.folder / f"spans_{self.items_key}"
        self._items = build_once(folder, self._COLUMNS, write)
        if len(self) == 0:
            problem = "nothing to learn, or nothing that fits; a larger --max_seq_len may help"
            raise NoItems(f"{self.store.path}: {problem}")

    def _count(self, records: np.ndarray) -> dict[str, int]:
        """The number of some records, and what the encoder counted in them."""
        counts = {"records": int(records.sum())}
        for name in self._REASONS.keys() & self.store.arrays.keys():
            counts[name] = int(self.store.arrays[name][:: self._DOCUMENTS][records].sum())
        return counts

    def _sum(self, column: str) -> int | float:
        values = self._items.arrays[column]
        return values.sum(dtype=np.result_type(values, np.int64)).item()

    @property
    def items_key(self) -> str:
        """Tells these items from others of the same store; fit for a file name."""
        return f"{self._options}_{self._part}"

    @property
    def content(self) -> str:
        """Identifies all of the source's documents, whatever is used of them."""
        return self.store.content

    @property
    def fingerprint(self) -> str:
        """Identifies the items, wherever the file lies."""
        return f"{self.store.content} {self._part} {self._options}"

    @property
    def n_documents(self) -> int:
        """Records that have items."""
        return len(self)

    @property
    def n_tokens(self) -> int:
        """Targets in one epoch."""
        return self._sum("targets")

    @property
    def text_bytes(self) -> float:
        """UTF-8 bytes of the text that is learnt, weighted as the losses: for bits per byte."""
        return self._sum("text_bytes")

    @property
    def n_positions(self) -> int:
        """The sum of all items' lengths."""
        return self._sum("lengths") - len(self._items.arrays["lengths"])

    @property
    def n_bad_lines(self) -> int:
        """Records that are left out because they are bad."""
        return self.store.bad_lines.count

    @property
    def counts(self) -> dict[str, int]:
        """What is missing of the file, bad lines aside, by the names in `notes`."""
        meta = self._items.meta
        sums = {name: self._sum(name) for name in self._REASONS.keys() & self._COLUMNS.keys()}
        counts = {**meta, **sums, "left_out": meta["records"] - len(self)}
        return {name: counts[name] for name in self._REASONS}

    @property
    def notes(self) -> list[Text]:
        """What is to be known of the source, a line for each. UserError if it is gone."""
        counts = {"bad_lines": self.n_bad_lines, **self.counts}
        reasons = {"bad_lines": "bad lines of the file left out", **self._REASONS}
        notes = {reasons[name]: count for name, count in counts.items()}
        notes |= self.store.bad_lines.left_out
        missing = [
            Text("{count:,} {reason}", count=count, reason=Text(reason))
            for reason, count in notes.items()
            if count
        ]
        return [*filter(None, [text_note(self.store.path, self._separator)]), *missing]

    def __len__(self) -> int:
        return len(self._items.arrays["documents"]) // self._DOCUMENTS

    def lengths(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Positions, `len(X)`, of the items `start` to `stop`: int64, without reading tokens."""
        stop = len(self) if stop is None else stop
        ids = self._items.arrays["lengths"][self._DOCUMENTS * start : self._DOCUMENTS * stop]
        return ids.reshape(-1, self._DOCUMENTS).max(axis=1).astype(np.int64) - 1

    def line_number(self, index: int) -> int:
        """The line of its file, from 1, that item `index` comes from."""
        return int(self.store.lines[self._document(self._rows(index)[0])])

    def place(self, index: int) -> str:
        """`file:line` of what item `index` comes from."""
        return self.store.place(self._document(self._rows(index)[0]))

    def _rows(self, index: int) -> range:
        """The rows of an item. Raises IndexError."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        first = index % len(self) * self._DOCUMENTS
        return range(first, first + self._DOCUMENTS)

    def _document(self, row: int) -> int:
        return int(self._items.arrays["documents"][row])

    def _positions(self, row: int) -> np.ndarray:
        """The places in the store of a row's ids."""
        table = self._items.arrays
        start, begin = self.store.offsets[self._document(row)], table["begins"][row]
        prefix, length = int(table["prefixes"][row]), int(table["lengths"][row])
        rest = np.arange(begin, begin + length - prefix)
        return np.append(np.arange(start, start + prefix), rest)

    def __getitem__(self, index: int) -> Item:
        return self._sample(*self._rows(index))

    def _sample(self, row: int) -> Item:
        """`(X, Y, loss_mask)` of a row."""
        positions = self._positions(row)
        ids = torch.from_numpy(self.store.ids[positions].astype(np.int64))
        return ids[:-1], ids[1:], torch.from_numpy(self._weights(positions))[1:]

    def _weights(self, positions: np.ndarray) -> np.ndarray:
        """(ids,) float32, how much each of some ids counts as a target."""
        weights = self.store.arrays.get("weights")
        return np.ones(len(positions), np.float32) if weights is None else weights[positions]


class ChatDataset(StoredDataset):
    """The conversations of a file: an item for each of which something can be used."""

    _ENCODER = ChatEncoder
    _COLUMNS = StoredDataset._COLUMNS | dict.fromkeys(
        ("dropped_turns", "cut_answers"), LENGTH_DTYPE
    )
    _REASONS = {
        "joined_messages": "messages joined to the one before, of the same role",
        "leading_answers": "answers before the first question left out",
        "inline_thoughts": "answers begin with <think>, read as text; --parse_think reads thoughts",
        "unanswered_turns": "last turns left out: they have no answer",
        "dropped_turns": "turns left out: their conversations are longer than --max_seq_len",
        "cut_answers": "last answers cut: longer than --max_seq_len",
        "left_out": "conversations left out: nothing to learn, or nothing of that fits",
    }

    @abstractmethod
    def _keep(
        self, chats: Encoded, turns: Turns, encoder: ChatEncoder
    ) -> tuple[Spans, dict[str, np.ndarray]]:
        """What items take of some conversations, and further columns of the table."""

    def _tabulate(self, first: int, stop: int, encoder: ChatEncoder) -> dict[str, np.ndarray]:
        chats = self.store.read(first, stop)
        spans, columns = self._keep(chats, find_turns(chats), encoder)
        taken = (spans.ends > spans.begins).reshape(-1, self._DOCUMENTS)
        used = np.repeat(taken.all(axis=1), self._DOCUMENTS)
        columns |= {
            "documents": np.arange(first, stop),
            "prefixes": spans.prefixes,
            "begins": spans.begins + self.store.offsets[first],
            "lengths": spans.prefixes + spans.ends - spans.begins,
            "dropped_turns": spans.dropped_turns,
            "cut_answers": spans.cut,
        }
        return {name: values[used] for name, values in columns.items()}
