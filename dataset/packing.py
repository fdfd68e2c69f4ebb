"""Rows and batches for training, made of the `(X, Y, loss_mask)` items of a data set.

A row is a dict of tensors, each (T,):

    input_ids       int64
    targets         int64, the id to predict after each position
    loss_mask       float32, the weight of each target, 0 where nothing is to be learnt
    position_ids    int64, from 0 at the start of each item
    attention_mask  int64, 0 on padding

and `sample`, the index of its first item. Padding has id 0, and restarts the positions as an item
of its own would.
"""

import bisect
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .arrays import INDEX_DTYPE, Append, build_once
from .stored import Item, StoredDataset

PLAN_VERSION = 1
GROUP, GROUPED = 32, 1024  # rows of like length, found among so many
WINDOW = 2048  # items that are packed together; neighbours in the file, so that reads stay local

Row = dict[str, torch.Tensor | int]


class PackedRows(Dataset):
    """Rows of exactly `row_length` positions, each of one or several whole items.

    Every item of the data set is in one row. Which items share a row is decided once and stored, so
    that the number of rows is the same in each epoch. `key` differs from that of other rows of the
    same store. Raises UserError if the plan cannot be written.
    """

    def __init__(self, dataset: StoredDataset, row_length: int) -> None:
        longest = dataset.max_length - 1
        if longest > row_length:
            raise ValueError(f"items of up to {longest} positions do not fit rows of {row_length}")
        self.dataset = dataset
        self.row_length = row_length
        self.key = f"rows_{row_length}_{dataset.items_key}_v{PLAN_VERSION}"
        dtypes = {"items": INDEX_DTYPE, "ends": INDEX_DTYPE}
        self._plan = build_once(dataset.store.folder / self.key, dtypes, self._write_plan)

    def __len__(self) -> int:
        return len(self._plan.arrays["ends"])

    def __getitem__(self, index: int) -> Row:
        items = self.items(index)
        row = make_row([self.dataset[item] for item in items], items[0])
        return pad_row(row, self.row_length)

    def items(self, index: int) -> list[int]:
        """The items of a row, in their order in the row and in the file."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        ends = self._plan.arrays["ends"]
        start = int(ends[index - 1]) if index > 0 else 0
        return self._plan.arrays["items"][start : ends[index]].tolist()

    @property
    def fill(self) -> float:
        """The share of all positions that hold a real token."""
        return self.dataset.n_positions / (len(self) * self.row_length)

    def _write_plan(self, append: Append) -> None:
        """Write the items of all rows, one row after the other, and where each row ends."""
        for start in range(0, len(self.dataset), WINDOW):
            lengths = self.dataset.lengths(start, start + WINDOW)
            rows = best_fit(lengths, self.row_length)
            ends = start + np.cumsum(np.bincount(rows))
            append(items=start + np.argsort(rows, kind="stable"), ends=ends)


class PaddedRows(Dataset):
    """Each item as a row of its own; `collate` pads the rows of a batch to the longest."""

    def __init__(self, dataset: StoredDataset) -> None:
        self.dataset = dataset
        self.key = f"items_{dataset.items_key}"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        return make_row([self.dataset[index]], index)

    @property
    def fill(self) -> float:
        """The share of real tokens if each row were padded to the most that an item may have."""
        return self.dataset.n_positions / (len(self) * (self.dataset.max_length - 1))


def best_fit(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """The row of each item, packed by best-fit decreasing; rows are numbered by their first item.

    The longest item comes first, each goes into the row with the least room that is enough.
    Lengths are between 1 and `row_length`.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    open_rows: list[tuple[int, int, int]] = []  # (room, -step, row) in order
    for step, item in enumerate(np.argsort(-lengths, kind="stable").tolist()):
        length = int(lengths[item])
        best = bisect.bisect_left(open_rows, (length,))
        is_new = best == len(open_rows)
        room, _, row = (row_length, 0, len(open_rows)) if is_new else open_rows.pop(best)
        rows[item] = row
        bisect.insort(open_rows, (room - length, -step, row))
    first_items = np.unique(rows, return_index=True)[1]
    return np.argsort(np.argsort(first_items))[rows]


def make_row(items: Sequence[Item], sample: int) -> Row:
    """The row of `(X, Y, loss_mask)` items, one after the other, without padding."""
    inputs, targets, masks = zip(*items, strict=True)
    input_ids = torch.cat(inputs)
    return {
        "input_ids": input_ids,
        "targets": torch.cat(targets),
        "loss_mask": torch.cat(masks),
        "position_ids": torch.cat([torch.arange(len(x)) for x in inputs]),
        "attention_mask": torch.ones_like(input_ids),
        "sample": sample,
    }


def pad_row(row: Row, length: int) -> Row:
    """The row with padding up to `length`."""
    padding = length - len(row["input_ids"])
    if padding == 0:
        return row
    tensors = {name: values for name, values in row.items() if name != "sample"}
    padded = row | {name: F.pad(values, (0, padding)) for name, values in tensors.items()}
    padded["position_ids"][-padding:] = torch.arange(padding)
    return padded


def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Stack rows into a batch: (B, T) each, `sample` (B,) int64; shorter rows are padded.

    No rows at all give one position of padding, with `sample` -1, so that a process that is left
    without data can still take part in a step.
    """
    if not rows:
        nothing = torch.empty(0, dtype=torch.int64)
        rows = [pad_row(make_row([(nothing, nothing, nothing.float())], sample=-1), 1)]
    length = max(len(row["input_ids"]) for row in rows)
    return default_collate([pad_row(row, length) for row in rows])


def shorten_rows(batch: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """The same positions in rows of `length`: (B, T) becomes (B · ceil(T / length), length).

    Every target stays; what a cut separates is no longer seen. `sample` stays (B,).
    """
    width = batch["input_ids"].shape[1]
    if width <= length:
        return batch
    padding = -width % length  # at position 0, each
    rows = {
        name: F.pad(values, (0, padding)).reshape(-1, length)
        for name, values in batch.items()
        if name != "sample"
    }
    positions = rows["position_ids"]
    is_rest = (positions == 0).cumsum(1) == 0  # of an item that began before the cut
    rows["position_ids"] = torch.where(is_rest, positions - positions[:, :1], positions)
    return {**rows, "sample": batch["sample"]}


@dataclass(eq=False)
class RowBatches(Sampler[list[int]]):
    """The rows of each micro-batch of one epoch, for one process: a DataLoader's `batch_sampler`.

    All processes walk through one order of the rows, a permutation that follows from `seed` and
    `epoch` alone (the order in the file without `shuffle`). A micro-batch takes the next
    `batch_size` rows for each of the `world_size` processes; the last one is split as evenly as
    can be, and may leave a process an empty list. So an accumulation holds the same rows
    however it is split into batches and processes, and no row is dropped or repeated.

    `start` is the number of rows that the epoch has already used. With `lengths`, those of the
    rows, batches need little padding: of every GROUPED rows of the permutation, runs of GROUP rows
    of like length stay together, and the runs of the epoch are permuted once more. `order` gives
    the rows of the epoch where they are no permutation, as those of a `Mixture`.
    """

    n_rows: int
    batch_size: int
    _: KW_ONLY
    seed: int
    epoch: int = 0
    rank: int = 0
    world_size: int = 1
    start: int = 0
    shuffle: bool = True
    lengths: np.ndarray | None = None
    order: np.ndarray | None = None

    def __len__(self) -> int:
        return -(-max(0, self.n_rows - self.start) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        together = self.batch_size * self.world_size
        for start in range(self.start, self.n_rows, together):
            rows = order[start : start + together]
            share, extra = divmod(len(rows), self.world_size)
            begin = self.rank * share + min(self.rank, extra)
            yield rows[begin : begin + share + (self.rank < extra)].tolist()

    def _order(self) -> torch.Tensor:
        """(n_rows,) the order of this epoch."""
        if not self.shuffle:
            if self.lengths is None:
                return torch.arange(self.n_rows)
            return torch.from_numpy(np.argsort(self.lengths, kind="stable"))
        state = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        if self.order is None:
            order = torch.randperm(self.n_rows, generator=generator)
        else:
            order = torch.from_numpy(self.order)
        if self.lengths is None:
            return order
        lengths = torch.from_numpy(self.lengths)
        runs = [
            run
            for part in order.split(GROUPED)
            for run in part[lengths[part].argsort(stable=True)].split(GROUP)
        ]
        return torch.cat([runs[i] for i in torch.randperm(len(runs), generator=generator)])


def make_loader(
    rows: Dataset,
    batch_size: int,
    *,
    collate_fn: Callable[[Sequence[Any]], dict[str, torch.Tensor]] = collate,
    num_workers: int | None = None,
    on_cuda: bool = False,
    shuffle: bool = False,
    **order: Any,
) -> DataLoader:
    """A DataLoader of one process's micro-batches of one epoch; `order`: see `RowBatches`.

    `num_workers` processes read ahead; None: 2 for a GPU (`on_cuda`), else none.
    """
    if num_workers is None:
        num_workers = 2 if on_cuda else 0
    return DataLoader(
        rows,
        batch_sampler=RowBatches(len(rows), batch_size, shuffle=shuffle, **order),
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=on_cuda,
        # Its own: it would draw from the global one, and a resumed run makes more loaders.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_parent,
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the whole process group must not end what reads ahead before a run has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
