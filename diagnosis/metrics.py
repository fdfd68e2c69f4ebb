"""The metrics.jsonl of a run, and the arithmetic on its columns that the findings share."""

import json
import math
import statistics
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

Metrics = list[dict[str, Any]]
T = TypeVar("T")

# A training loss at a step is the mean over so many steps before it, and over three lines at least.
TRAINING_LOSS_STEPS = 30


def read_metrics(path: Path) -> Metrics:
    """Read the lines of a metrics.jsonl, without a last one that a killed run left incomplete.

    Raises OSError, or a ValueError that names the line, as file:line, that is not a JSON object.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    metrics = []
    for number, line in enumerate([*lines, rest], start=1):
        try:
            figures = json.loads(line.decode("utf-8"))
        except ValueError:
            figures = None
        if isinstance(figures, dict):
            metrics.append(figures)
        elif number <= len(lines):
            raise ValueError(f"{path}:{number}: not a JSON object")
    return metrics


def has_number(line: dict[str, Any], name: str) -> bool:
    """Whether a line holds a finite figure of that name; others are null in the file."""
    value = line.get(name)
    return isinstance(value, (int, float)) and math.isfinite(value)


def having(metrics: Metrics, name: str) -> Metrics:
    """The lines that hold a finite figure of that name."""
    return [line for line in metrics if has_number(line, name)]


def column(metrics: Metrics, name: str) -> list[float]:
    """The finite figures of that name."""
    return [line[name] for line in having(metrics, name)]


def latest(metrics: Metrics, name: str) -> int:
    """The last value of a count; 0 if it was never logged."""
    return next(reversed(column(metrics, name)), 0)


def best_evaluation(evaluations: Metrics) -> dict[str, Any]:
    """The line with the lowest validation loss, which is that of the best weights."""
    return min(evaluations, key=lambda line: line["val_loss"])


def last_third(values: list[T]) -> list[T]:
    """The last third of the values, and at least one of them."""
    return values[-max(1, len(values) // 3) :]


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """The means of all `width` values in a row."""
    sums = [0.0, *accumulate(values)]
    return [(sums[i] - sums[i - width]) / width for i in range(width, len(sums))]


def count_rises(values: Sequence[float], height: float) -> int:
    """How often the values rise by more than `height` from a low, after falling as far before."""
    rises, rising, turn = 0, False, values[0]
    for value in values:
        if rising and value < turn - height:
            rising, turn = False, value
        elif not rising and value > turn + height:
            rising, turn = True, value
            rises += 1
        else:
            turn = max(turn, value) if rising else min(turn, value)
    return rises


def training_loss_at(lines: Metrics, step: int) -> float | None:
    """The mean training loss of the steps up to this one; None if none was logged."""
    before = [line for line in lines if line["step"] <= step]
    recent = [line for line in before if line["step"] > step - TRAINING_LOSS_STEPS]
    losses = column(max(recent, before[-3:], key=len), "loss")
    return statistics.fmean(losses) if losses else None
