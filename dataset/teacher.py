"""What a teacher says of every target: the likeliest tokens, kept beside the data."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .packing import PackedRows, PaddedRows, Row, collate
from .token_store import INDEX_DTYPE, ArrayWriter

ID_DTYPE, LOGP_DTYPE = np.dtype("<i4"), np.dtype("<f4")

# Of consecutive rows: ids and log-probabilities (targets, top) of the likeliest tokens, and how
# many targets each row has.
Scored = tuple[np.ndarray, np.ndarray, Sequence[int]]


class TeacherTopK(Dataset):
    """Rows, each with a teacher's likeliest tokens for its targets.

    Row `i` is that of `rows`, and `teacher_ids` int64 and `teacher_logps` float32, (targets, top):
    for each position whose loss mask is above 0, in order.

    Args:
        rows: to add to; `dataset` and `fill` are theirs.
        key: names the teacher and what is asked of it; fit for a file name.
        top: how many tokens are kept of each target.
        score: gives what is kept for all rows, in order; called unless it is there already.

    Raises:
        UserError: if it cannot be written.
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

        def build(folder: Path) -> dict[str, Any]:
            with ArrayWriter(folder, ids=ID_DTYPE, logps=LOGP_DTYPE, ends=INDEX_DTYPE) as writer:
                end = 0
                for ids, logps, counts in score():
                    writer.append("ids", ids.flatten())
                    writer.append("logps", logps.flatten())
                    ends = end + np.cumsum(counts)
                    writer.append("ends", ends)
                    end = int(ends[-1])
            return {"arrays": writer.description()}

        self._kept = self.dataset.store.derived(f"teacher_{key}_top{top}_{rows.key}", build)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        kept = self._kept.arrays
        start = int(kept["ends"][index - 1]) if index > 0 else 0
        part = slice(start * self.top, int(kept["ends"][index]) * self.top)
        ids, logps = (kept[name][part].reshape(-1, self.top) for name in ("ids", "logps"))
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
    """As `dataset.packing.collate`, and of rows that a teacher was asked about what it said.

    `teacher_ids` and `teacher_logps` are (targets of the batch, top), in the order of
    `batch[…][loss_mask > 0]`.
    """
    taught = [name for name in ("teacher_ids", "teacher_logps") if rows and name in rows[0]]
    batch = collate([{name: row[name] for name in row if name not in taught} for row in rows])
    return batch | {name: torch.cat([row[name] for row in rows]) for name in taught}
