"""The small world that the project teaches itself when it has no data."""

from .files import FILES, SAMPLE, SEED, ensure_sample, write_sample
from .scoring import Score, is_right, score_answers

__all__ = [
    "FILES",
    "SAMPLE",
    "SEED",
    "Score",
    "ensure_sample",
    "is_right",
    "score_answers",
    "write_sample",
]
