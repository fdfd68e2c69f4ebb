"""A teacher's most probable tokens for every target, cached beside the data."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from .arrays import INDEX_DTYPE, Append, build_once
from .packing import PackedRows, PaddedRows, Row, collate

DTYPES = {"ids": np.dtype("<i4"), "logps": np.dtype("<f4"), "ends": INDEX_DTYPE}

# Of consecutive rows: ids and log-probabilities (targets, top) of the most probable tokens, and
# how many targets each row has.
Scored = tuple[np.ndarray, np.ndarray, Sequence[int]]


class TeacherTopK(Dataset):
    """Rows, each with a teacher's most probable tokens for its targets.

    Row `i` is that of `rows` with `teacher_ids` int64 and `teacher_logps` float32, (targets, top),
    for each position whose loss mask is above 0, in order. `key` names the teacher and what it is
    given; `score` computes what is stored for all rows, in order, unless it is cached. Raises
    UserError if the cache cannot be written.
    """

    def __init__(
        self,
        rows: PackedRows | PaddedRows,
        key: str,
        top: int,
        score: Callable[[], Iterable[Scored]],
    ) -> None:
        self.rows = rows
        self.dataset = rows.dataset
        self.top = top

        def fill(append: Append) -> None:
            end = 0
            for ids, logps, counts in score():
                ends = end + np.cumsum(counts)
                append(ids=ids.flatten(), logps=logps.flatten(), ends=ends)
                end = int(ends[-1])

        name = f"teacher_{key}_top{top}_{rows.key}"
        self._cached_teacher = build_once(self.dataset.store.folder / name, DTYPES, fill)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        arrays = self._cached_teacher.arrays
        start = int(arrays["ends"][index - 1]) if index > 0 else 0
        part = slice(start * self.top, int(arrays["ends"][index]) * self.top)
        ids, logps = (arrays[name][part].reshape(-1, self.top) for name in ("ids", "logps"))
        return {
            **self.rows[index],
            "teacher_ids": torch.from_numpy(ids.astype(np.int64)),
            "teacher_logps": torch.from_numpy(logps.copy()),
        }

    @property
    def fill(self) -> float:
        """The share of positions that hold a real token."""
        return self.rows.fill


def collate_with_teacher(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Stack rows as `collate` does, with the teacher's tokens where rows have them.

    `teacher_ids` and `teacher_logps` are (targets, top), in the order of `batch[…][loss_mask > 0]`.
    """
    names = [name for name in ("teacher_ids", "teacher_logps") if rows and name in rows[0]]
    batch = collate([{name: row[name] for name in row if name not in names} for row in rows])
    return batch | {name: torch.cat([row[name] for row in rows]) for name in names}
