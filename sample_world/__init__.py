"""The small world that the project teaches itself when it has no data."""

from .conversations import EXCHANGES, history_questions
from .files import FILES, SAMPLE, SEED, ensure_sample, write_sample
from .scoring import (
    Score,
    Scores,
    format_examples,
    format_scorecard,
    is_right,
    read_test,
    score_answers,
    score_calls,
)
from .tools import CLOCK
from .world import build_world
