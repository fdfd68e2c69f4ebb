"""Rows of several sources, drawn in shares that weights give."""

import bisect
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from common import Text

POINTS = 10_001  # at which the tokens drawn of each source are computed in between

SourceEnd = Literal["repeat", "stop"]


class Mixture(Dataset):
    """Rows of several sources, each with a weight: its share of the target tokens.

    An epoch has as many rows as all sources together. Its order, `order(epoch)`, follows from the
    seed alone, and after any number of rows each source has given its share to within a row or so,
    rows counted with the mean number of tokens that the source's have. The rows of a source come in
    a new order each time it is read. Row `i` of `mixture[i]` counts the rows of all sources one
    after the other; its `sample` counts their items in the same way.

    Args:
        parts: rows of each source, by its name.
        weights: relative weights, in the order of `parts`.
        seed: seed of all orders.
        source_end: "repeat" begins a source anew where it runs out, and goes on with it in the next
            epoch; with "stop" each source is read once an epoch, and the others go on without it.
        final_weights: weights at the end of a run, which are approached linearly; None: the same.
    """

    def __init__(
        self,
        parts: Mapping[str, Any],
        weights: list[float],
        seed: int,
        source_end: SourceEnd = "repeat",
        final_weights: list[float] | None = None,
    ) -> None:
        self.parts = dict(parts)
        self.seed, self.source_end = seed, source_end
        final = weights if final_weights is None else final_weights
        self.weights, self.final_weights = (np.array(w) / np.sum(w) for w in (weights, final))
        rows = self._rows = list(self.parts.values())
        self._sizes = np.array([len(part) for part in rows])
        self._first_rows = np.append(0, np.cumsum(self._sizes)).tolist()
        self._items_before = np.append(0, np.cumsum([len(part.dataset) for part in rows]))
        self._tokens = np.array([part.dataset.n_tokens for part in rows])
        self._total: float | None = None  # tokens of the run, where weights change
        lengths = [getattr(part, "lengths", None) for part in rows]
        self.lengths = None if lengths[0] is None else np.concatenate(lengths)

    def map(self, make: Callable[[Any], Any]) -> "Mixture":
        """The same mixture of what `make` makes of the rows of each source."""
        parts = {name: make(part) for name, part in self.parts.items()}
        weights = (self.weights.tolist(), self.final_weights.tolist())
        return Mixture(parts, weights[0], self.seed, self.source_end, weights[1])

    def __len__(self) -> int:
        return int(self._sizes.sum())

    def __getitem__(self, index: int) -> dict[str, Any]:
        source = bisect.bisect_right(self._first_rows, index) - 1
        row = self._rows[source][index - self._first_rows[source]]
        return _move_sample(row, int(self._items_before[source]))

    @property
    def dataset(self) -> "Mixture":
        """What stands for the data set of these rows."""
        return self

    @property
    def n_tokens(self) -> int:
        """Targets in one epoch, of weights in the middle between the first and the last."""
        if self.source_end == "stop":
            return int(self._tokens.sum())
        weights = (self.weights + self.final_weights) / 2
        return round(len(self) / (weights / self._row_tokens).sum())

    @property
    def _row_tokens(self) -> np.ndarray:
        """Mean targets of a row of each source."""
        return self._tokens / self._sizes

    @property
    def content(self) -> str:
        """Identifies sources and weights."""
        parts = [part.dataset.content for part in self.parts.values()]
        weights = self.weights.tolist(), self.final_weights.tolist()
        text = json.dumps([parts, weights, self.source_end])
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    def place(self, sample: int) -> str:
        """`file:line` of what an item comes from."""
        source = int(self.sources(np.array([sample]))[0])
        return self._rows[source].dataset.place(sample - int(self._items_before[source]))

    def sources(self, samples: np.ndarray) -> np.ndarray:
        """The source of each of some items, as an index of `parts`."""
        return np.searchsorted(self._items_before, samples, side="right") - 1

    def describe(self) -> Iterator[Text]:
        """What an epoch takes of each source: a line each."""
        read = self.n_tokens * (self.weights + self.final_weights) / 2 / self._tokens
        for i, name in enumerate(self.parts):
            share = f"{self.weights[i]:.3g}"
            if self.final_weights[i] != self.weights[i]:
                share = Text("{first} to {last:.3g}", first=share, last=self.final_weights[i])
            times = Text("once, then the others go on")
            if self.source_end == "repeat" and read[i] > 1:
                times = Text("{n:.3g} times, so it is repeated", n=read[i])
            elif self.source_end == "repeat":
                times = Text("{n:.3g} times", n=read[i])
            yield Text(
                "{name}: share {share} of the tokens, read {times} in an epoch",
                name=name,
                share=share,
                times=times,
            )

    def set_total(self, tokens: float) -> None:
        """Say how many tokens the run draws: where weights change, it ends with the last ones."""
        self._total = tokens

    def order(self, epoch: int) -> np.ndarray:
        """(rows,) int64, the rows of an epoch in their order."""
        size = len(self)
        if self.source_end == "stop":
            draws, first, skipped = self._sizes, epoch * self._sizes, 0
            times = [self._jittered(k, draws[k]) / self.weights[k] for k in range(len(draws))]
        else:
            skipped = epoch * size
            grid, drawn = self._drawn(skipped + size + len(self._sizes))
            draws, first = np.ceil(drawn[-1]).astype(int), np.zeros_like(self._sizes)
            row_tokens = self._row_tokens
            times = [
                np.interp(self._jittered(k, n) / row_tokens[k], drawn[:, k], grid)
                for k, n in enumerate(draws)
            ]
        together = np.argsort(np.concatenate(times), kind="stable")[skipped : skipped + size]
        begins = np.append(0, np.cumsum(draws))
        sources = np.searchsorted(begins, together, side="right") - 1
        numbers = together - begins[sources] + first[sources]  # of the draws of each source
        rows = np.empty(size, dtype=np.int64)
        for k, length in enumerate(self._sizes):
            chosen = sources == k
            passes, within = np.divmod(numbers[chosen], length)
            own = np.empty_like(within)
            for number in np.unique(passes):
                state = np.random.SeedSequence((self.seed, k, int(number)))
                order = np.random.default_rng(state).permutation(length)
                own[passes == number] = order[within[passes == number]]
            rows[chosen] = self._first_rows[k] + own
        return rows

    def _jittered(self, source: int, draws: int) -> np.ndarray:
        """Tokens that a source has given in the middle of each draw, or so."""
        shift = np.random.default_rng((self.seed, source)).random()
        return (np.arange(draws) + shift) * self._row_tokens[source]

    def _drawn(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """After some tokens of all sources, the rows drawn of each: until there are `rows` in all.

        Returns tokens (POINTS,), and rows (POINTS, sources).
        """
        tokens = rows * self._row_tokens.max()
        total = tokens if self._total is None else self._total
        grid = np.linspace(0, tokens, POINTS)
        weights = self.weights[None], (self.final_weights - self.weights)[None]
        before, after = np.minimum(grid, total)[:, None], np.maximum(grid - total, 0)[:, None]
        given = before * weights[0] + before**2 / (2 * total) * weights[1]
        drawn = (given + after * self.final_weights) / self._row_tokens
        end = int(np.searchsorted(drawn.sum(1), rows)) + 1
        return grid[:end], drawn[:end]


def _move_sample(row: dict[str, Any], by: int) -> dict[str, Any]:
    """A row, or a pair of them, whose `sample` is that much higher."""
    if "sample" in row:
        return {**row, "sample": row["sample"] + by}
    return {
        name: _move_sample(part, by) if isinstance(part, dict) else part
        for name, part in row.items()
    }
