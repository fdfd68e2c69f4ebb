"""The shapes of records that people write, by the fields that make them."""

import difflib
import json
from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

from .fields import RecordError

Kind = Literal["text", "conversation", "pair"]


class Shape(NamedTuple):
    """A shape of records: those that have all of its fields, unless an earlier shape has them."""

    name: str
    kind: Kind
    fields: tuple[str, ...]
    context: str = ""  # of an exchange: the field whose text follows the question


SHAPES = (
    Shape("preference pair", "pair", ("chosen", "rejected")),
    Shape("judged completion (KTO)", "pair", ("prompt", "completion", "label")),
    Shape("judged conversation (KTO)", "pair", ("messages", "label")),
    Shape("judged conversation (KTO)", "pair", ("conversations", "label")),
    Shape("conversation", "conversation", ("conversations",)),
    Shape("conversation", "conversation", ("messages",)),
    Shape("instruction (Alpaca)", "conversation", ("instruction", "output"), "input"),
    Shape("instruction (Dolly)", "conversation", ("instruction", "response"), "context"),
    Shape("prompt and completion", "conversation", ("prompt", "completion")),
    Shape("prompt and answer", "conversation", ("prompt", "answer")),
    Shape("prompt and response", "conversation", ("prompt", "response")),
    Shape("question and answer", "conversation", ("question", "answer")),
    Shape("query and response", "conversation", ("query", "response")),
    Shape("text", "text", ("text",)),
    Shape("text", "text", ("content",)),
)
CONVERSATIONS = ("conversations", "messages")
EXCHANGES = tuple(
    shape for shape in SHAPES if shape.kind == "conversation" and len(shape.fields) == 2
)
FIELDS = {name for shape in SHAPES for name in shape.fields} - {"label"}


def find_shape(names: Collection[str]) -> Shape | None:
    """The shape of a record with fields of these names."""
    return next((shape for shape in SHAPES if set(shape.fields) <= set(names)), None)


def not_of_kind(names: Iterable[str], kind: Kind) -> RecordError:
    """Why a record with these fields is of another kind, or of none that is known."""
    names = list(names)
    shape = find_shape(names)
    if shape is not None:
        return RecordError(f"no {kind}, but of the shape {shape.name} ({_quoted(shape.fields)})")
    own = [shape for shape in SHAPES if shape.kind == kind]

    def likeness(shape: Shape) -> float:
        ratios = [
            max((difflib.SequenceMatcher(None, field, name).ratio() for name in names), default=0)
            for field in shape.fields
        ]
        return sum(ratio for ratio in ratios if ratio > 0.5) / len(ratios)

    nearest = max(own, key=likeness)
    found = f"its fields are {_quoted(names)}" if names else "it has no fields"
    return RecordError(f"no {kind}: {found}; nearest: {nearest.name} ({_quoted(nearest.fields)})")


def _quoted(names: Iterable[str]) -> str:
    names = [json.dumps(name, ensure_ascii=False)[:20] for name in names]
    return ", ".join([*names[:5], *(["…"] if len(names) > 5 else [])])
