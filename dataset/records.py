"""Parse one record of a source, which `dataset.reader` finds.

One that cannot be used raises `RecordError`; what reads the source collects these in `BadLines`.
"""

import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from common import UserError

from .fields import RecordError, check_text, expect, parse_array, parse_flag, parse_object
from .messages import (
    as_messages,
    begins_a_conversation,
    is_empty_answer,
    parse_message,
    parse_messages,
    parse_tools,
)
from .reader import Place, Record, locate
from .shapes import CONVERSATIONS, EXCHANGES, FIELDS, Kind, find_shape, not_of_kind

SHOWN_BAD_LINES = 10
COLUMN = re.compile(r"\{(\w+)\}")  # in a --text_template
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # of the strings of HH-RLHF


class LeftOut(Exception):
    """A good record that is not used: why, as a noun in the plural."""


@dataclass
class BadLines:
    """The bad records of a source: their number, and the first ten as (file, line, reason).

    `file` and `line` are those of a `Place`. `total` counts all records, `left_out` good ones that
    are not used, by the reason.
    """

    count: int = 0
    first: list[tuple[str, int, str]] = field(default_factory=list)
    total: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    def add(self, place: Place, reason: str) -> None:
        """Note one bad record; the total stays as it is."""
        self.count += 1
        if len(self.first) < SHOWN_BAD_LINES:
            self.first.append((*place, reason))

    def leave_out(self, reason: str) -> None:
        """Count one good record that is not used."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def reasons(self, source: Path) -> list[str]:
        """`file:line: reason` of the first bad records."""
        return [f"{locate(source, Place(file, n))}: {why}" for file, n, why in self.first]

    def check(self, source: Path, skip_bad_lines: float) -> None:
        """Raise UserError if more than the share `skip_bad_lines` of the records is bad."""
        share = self.count / max(1, self.total)
        if share <= skip_bad_lines:
            return
        last = f"{source}: {self.count:,} of {self.total:,} lines are bad"
        if share <= 0.5:
            last += f"; --skip_bad_lines {math.ceil(100 * share) / 100} goes on without them"
        else:
            last += ", most of the file"
        last += "; scripts/check_data.py shows what it holds"
        raise UserError("\n".join([*self.reasons(source), last]))


@dataclass(frozen=True)
class RecordOptions:
    """What flags of the same names say about records."""

    text_column: str | None = None  # the field of a text; None: "text" or "content"
    text_template: str | None = None  # a text with the fields that it names in braces
    separator: str | None = None  # between documents of plain text
    parse_think: bool = False  # whether <think>…</think> at the start of an answer is reasoning
    empty_think_ratio: float = 0.0  # of conversations whose plain answers follow an empty thought
    min_margin: float | None = None  # by which the chosen reply of a pair must score higher

    @classmethod
    def of(cls, flags: Any) -> "RecordOptions":
        """The options among parsed flags; a command may lack some."""
        given = vars(flags)
        return cls(**{f.name: given[f.name] for f in fields(cls) if f.name in given})

    @property
    def key(self) -> str:
        """Differs wherever records may be read otherwise; empty by default."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen = {name: value for name, value in values.items() if value not in (None, False)}
        return f" {json.dumps(chosen, sort_keys=True)}" if chosen else ""


DEFAULT = RecordOptions()


def record_kind(record: Record) -> Kind | None:
    """The kind of a record by its fields, also of one that is bad; None of one that has none."""
    try:
        names = parse_object(record).keys()
    except RecordError:  # which must be named as what it is
        if not isinstance(record, bytes):
            return None
        names = {name for name in FIELDS if f'"{name}"'.encode() in record}
    shape = find_shape(names)
    for missing in ("output", "rejected", "chosen"):
        shape = shape or find_shape({*names, missing})
    return None if shape is None else shape.kind


def parse_text(record: Record, options: RecordOptions = DEFAULT) -> str:
    """The text of a record, `{"text": "…"}` or as the options say. Raises RecordError."""
    values = parse_object(record)
    if options.text_template is not None:

        def column(match: re.Match[str]) -> str:
            name = match[1]
            if name not in values:
                raise RecordError(f'"{name}" is missing')
            return "" if values[name] is None else expect(values[name], str, f'"{name}"')

        return check_text(COLUMN.sub(column, options.text_template), "the text")
    names = ("text", "content") if options.text_column is None else (options.text_column,)
    name = next((name for name in names if name in values), names[0])
    if name not in values:
        if options.text_column is not None:
            raise RecordError(f'"{name}", the --text_column, is missing')
        raise not_of_kind(values, "text")
    return check_text(values[name], f'"{name}"')


class ParsedChat(NamedTuple):
    """The messages of a chat and the tools in it, whatever the shape of the record was.

    `messages` are dicts as `apply_chat_template` takes them, with `role` (system, user, assistant
    or tool) and `content`, a string. The assistant's may have `reasoning_content`, a string;
    `tool_calls`, dicts of `name` and `arguments`, a dict or a string of JSON; and `weight`, a
    factor of its tokens' loss. `tools` are JSON schemas, as dicts.

    A system message is the first. User and assistant take turns; after an assistant's calls may
    come as many tool messages. The last message may be one without an answer.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


def record_text(record: Record) -> str:
    """All text of a record, of a pair the chosen side, joined by newlines. Raises RecordError."""
    kind = record_kind(record)
    if kind in ("text", None):
        return parse_text(record)
    messages = parse_preference(record).chosen if kind == "pair" else parse_chat(record).messages
    parts = [message.get(name) for message in messages for name in ("reasoning_content", "content")]
    return check_text("\n".join(part for part in parts if part), "its text")


class Preference(NamedTuple):
    """Two continuations of one prompt, of which the first is preferred.

    `chosen` and `rejected` are messages as in a ParsedChat, and begin with the same `shared` ones,
    a user's among them; an assistant's follows in both. `scores` rate the two replies.
    """

    chosen: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    shared: int
    tools: list[dict[str, Any]]
    scores: tuple[float, float] | None


def parse_preference(line: Record, options: RecordOptions = DEFAULT) -> Preference:
    """The pair of one record, of any of these shapes. Raises RecordError.

        {"chosen": [messages], "rejected": [messages]}      whole conversations
        {"chosen": "Human: … Assistant: …", "rejected": …}  the same in strings, as HH-RLHF has them
        {"prompt": …, "chosen": …, "rejected": …}           strings, messages or arrays of them
        {"conversations": [messages], "chosen": …, "rejected": …}   as ShareGPT; or "messages"

    "system", "tools", and numbers as "score_chosen" and "score_rejected" may stand beside them.
    Raises LeftOut if the scores are nearer than `options.min_margin`.
    """
    record = parse_object(line)
    given = {}
    for side in ("chosen", "rejected"):
        if side not in record:
            if len({"chosen", "rejected"} & record.keys()) == 1:
                raise RecordError(f'"{side}" is missing')
            raise not_of_kind(record, "pair")
        given[side] = _split_turns(record[side], f'"{side}"')
    scores = record.get("score_chosen"), record.get("score_rejected")
    if not all(type(score) in (int, float) for score in scores):
        scores = None
    if options.min_margin is not None:
        if scores is None:
            raise RecordError('no numbers as "score_chosen" and "score_rejected" (--min_margin)')
        if scores[0] - scores[1] < options.min_margin:
            raise LeftOut("pairs left out: their scores differ by less than --min_margin")
    prompt = _parse_prompt(record, list(given.values()))
    sides = {}
    for side, messages in given.items():
        try:
            items = [*prompt, *messages]
            parsed = parse_messages(items, "", parse_think=options.parse_think)
            parsed = _add_system(record, parsed)
        except RecordError as error:
            raise RecordError(f'"{side}": {error}') from None
        for message in parsed:
            message.pop("weight", None)  # whatever a message weighs, both replies count alike
        sides[side] = parsed
    chosen, rejected = sides.values()
    if chosen == rejected:
        raise RecordError("the two replies are equal")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if all(message["role"] != "user" for message in chosen[:shared]):
        raise RecordError("the two sides have no prompt in common")
    for name, messages in sides.items():
        reply = messages[shared:]
        if not reply or not reply[0]["role"] == reply[-1]["role"] == "assistant":
            raise RecordError(f'"{name}": what both sides share is not followed by a reply')
        if all(is_empty_answer(message) for message in reply if message["role"] == "assistant"):
            raise RecordError(f'"{name}": the reply is empty')
    tools = _take_tools(record, chosen)
    rejected[0].pop("tools", None)  # the same, as it is shared
    return Preference(chosen, rejected, shared, tools, scores)


def _split_turns(value: Any, name: str) -> list[Any]:
    """The messages of one side of a pair, of which a string may hold several."""
    if not (isinstance(value, str) and value.lstrip().startswith("Human:")):
        return as_messages(value, "assistant", name)
    _, *parts = HH_TURN.split(value.strip())
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[who], "content": text.strip()} for who, text in turns]


def pair_judged(
    records: Iterable[tuple[Place, Record]], left_out: BadLines
) -> Iterator[tuple[Place, Record]]:
    """Records with a good and a bad completion of each prompt as pairs; all others as they are.

    A judged record has a true or false "label", and a completion (KTO): it waits for one with the
    same prompt and the other label. What finds none is counted in `left_out`. What waits is in
    memory: prompts that only one record has, and their completions.
    """
    waiting: dict[tuple[str, bool], list[tuple[Place, Any]]] = {}
    for place, record in records:
        try:
            values = parse_object(record)
            judged = _split_judged(values)
        except RecordError as error:
            yield place, error
            continue
        if judged is None:
            yield place, record
            continue
        prompt, completion = judged
        label = bool(values["label"])
        key = json.dumps([prompt, values.get("system"), values.get("tools")], default=str)
        if others := waiting.get((key, not label)):
            place, other = others.pop(0)
            left_out.total -= 1  # two records, one pair
            sides = (completion, other) if label else (other, completion)
            yield place, values | {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
        else:
            waiting.setdefault((key, label), []).append((place, completion))
    for waits in waiting.values():
        left_out.total += len(waits)
        for _ in waits:
            left_out.leave_out("judged completions left out: no other of the same prompt")


def _split_judged(values: dict[str, Any]) -> tuple[list[Any], Any] | None:
    """Prompt and completion of a judged record; None of any other. Raises RecordError."""
    if values.get("label") not in (False, True, 0, 1) or "chosen" in values:
        return None
    if "completion" in values:
        prompt = as_messages(values.get("prompt"), "user", '"prompt"')
        return prompt, as_messages(values["completion"], "assistant", '"completion"')
    name = next((name for name in CONVERSATIONS if name in values), None)
    if name is None:
        return None
    messages = as_messages(values[name], "user", f'"{name}"')
    if len(messages) < 2:
        raise RecordError(f'"{name}": a prompt and its completion are needed')
    return messages[:-1], messages[-1:]


def _parse_prompt(record: dict[str, Any], sides: list[list[Any]]) -> list[Any]:
    """The messages that stand before both sides; none where these are whole conversations."""
    names = [n for n in ("prompt", "conversations", "messages") if record.get(n) is not None]
    if not names:
        return []
    prompt = as_messages(record[names[0]], "user", f'"{names[0]}"')
    is_whole = all(side and begins_a_conversation(side[0]) for side in sides)
    # "messages" beside whole conversations may be the chosen one once more.
    if is_whole and (names[0] != "prompt" or all(_repeats(side, prompt) for side in sides)):
        return []
    return prompt


def _repeats(side: list[Any], prompt: list[Any]) -> bool:
    """Whether a conversation begins with a prompt, which may lack its system message."""
    first, second = ([parse_message(item) for item in items] for items in (side, prompt))
    if first[:1] != second[:1] and first[0]["role"] == "system":
        first = first[1:]
    return first[: len(second)] == second


def parse_chat(
    line: Record, options: RecordOptions = DEFAULT, counts: Counter[str] | None = None
) -> ParsedChat:
    """The conversation of one record, of any of these shapes. Raises RecordError.

        {"conversations": [{"role": "user", "content": "…"}, …]}    or "messages"
        {"conversations": [{"from": "human", "value": "…"}, …]}     as ShareGPT has it
        {"instruction": "…", "input": "…", "output": "…"}           as Alpaca has it
        {"prompt": …, "completion": …}      strings or messages; only the completion is learnt

    and the other exchanges in `dataset.shapes`. Beside each there may be "system", a string;
    "tools", an array or the JSON of one, which the system message may have instead; and
    "mask_history": if it is true, only answers to the last question are learnt. An exchange may
    have "history", an array of [question, answer]. `counts`: see `parse_messages`.
    """
    record = parse_object(line)
    items, name = _find_items(record)
    messages = parse_messages(items, name, parse_think=options.parse_think, counts=counts)
    if parse_flag(record.get("mask_history"), '"mask_history"'):
        _mask_history(messages)
    messages = _add_system(record, messages)
    if options.empty_think_ratio:
        _add_empty_thoughts(messages, options.empty_think_ratio)
    return ParsedChat(messages, _take_tools(record, messages))


def _add_empty_thoughts(messages: list[dict[str, Any]], ratio: float) -> None:
    """Give answers without reasoning an empty thought, in a share of all conversations.

    Which these are follows from their texts alone, so that a file is always read the same.
    """
    texts = json.dumps([message["content"] for message in messages])
    if zlib.crc32(texts.encode()) < ratio * 2**32:
        for message in messages:
            if message["role"] == "assistant":
                message.setdefault("reasoning_content", "")


def parse_question(
    line: Record, options: RecordOptions = DEFAULT
) -> tuple[ParsedChat, dict[str, Any] | None]:
    """What is to be answered in one record, and the answer that it gives itself, if it does.

    As `parse_chat`, but no answer is needed. The record's own is an assistant's message, or "gt"
    holds it, a string or an array of them. Raises RecordError.
    """
    record = parse_object(line)
    items, name = _find_items(record, answered=False)
    messages = parse_messages(items, name, answered=False, parse_think=options.parse_think)
    messages = _add_system(record, messages)
    tools = _take_tools(record, messages)
    reference = None
    if messages and messages[-1]["role"] == "assistant":
        reference = messages.pop()
        if is_empty_answer(reference):
            reference = None
    if not messages or messages[-1]["role"] == "system":
        raise RecordError("nothing to be answered")
    if reference is None and record.get("gt"):
        truths = [record["gt"]] if isinstance(record["gt"], str) else record["gt"]
        text = ", ".join(expect(t, str, '"gt"') for t in expect(truths, list, '"gt"'))
        reference = {"role": "assistant", "content": text}
    return ParsedChat(messages, tools), reference


def _find_items(record: dict[str, Any], answered: bool = True) -> tuple[list[Any], str]:
    """The unparsed messages of a record, and what errors call them."""
    for name in CONVERSATIONS:
        if record.get(name) is not None:
            value = record[name]
            if isinstance(value, str) and value.lstrip().startswith("["):  # JSON in a cell
                value = parse_array(value, f'"{name}"')
            return as_messages(value, "user", f'"{name}"'), f'"{name}"'
    named = [shape for shape in EXCHANGES if shape.fields[0] in record]
    whole = [shape for shape in named if shape.fields[1] in record]
    if not named or (answered and not whole and named[0].fields[0] != "instruction"):
        raise not_of_kind(record, "conversation")
    question, answer = (whole or named)[0].fields
    asked = as_messages(record[question], "user", f'"{question}"') if record[question] else []
    if context := (whole or named)[0].context:
        text = expect(record[question], str, f'"{question}"')
        if record.get(context):
            text += "\n" * bool(text) + expect(record[context], str, f'"{context}"')
        asked = [{"role": "user", "content": text}]
    items = [*_history(record), *asked]
    if "history" not in record:
        # A prompt may hold answers of its own, which are not learnt.
        items = [{**item, "train": False} if isinstance(item, dict) else item for item in items]
    if answered or isinstance(record.get(answer), str | list | dict):
        if isinstance(record.get(answer), list | dict):
            return [*items, *as_messages(record[answer], "assistant", f'"{answer}"')], ""
        text = expect(record.get(answer), str, f'"{answer}"')
        items.append({"role": "assistant", "content": text})
    return items, ""


def _history(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The exchanges before a question, as messages."""
    history = record.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise RecordError('"history" is not an array of [question, answer]')
    for pair in history:
        for role, content in zip(("user", "assistant"), pair, strict=True):
            yield {"role": role, "content": content}


def _add_system(record: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages after the record's own "system", if there is one that they do not begin with."""
    if not record.get("system") or not messages:
        return messages
    content = expect(record["system"], str, '"system"')
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": content}, *messages]
    if messages[0]["content"] != content:
        raise RecordError('"system" and the system message differ')
    return messages


def _take_tools(record: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools of a record or of its system message, from which they are taken away."""
    tools = parse_tools(record.get("tools"))
    others = messages[0].pop("tools", tools) if messages else tools
    if tools and others != tools:
        raise RecordError('"tools" and the "tools" of the system message differ')
    return others


def _mask_history(messages: list[dict[str, Any]]) -> None:
    """Set the weight of every answer before the last question that is answered to 0."""
    roles = [message["role"] for message in messages]
    answered = len(roles) - roles[::-1].index("assistant")
    question = answered - roles[answered - 1 :: -1].index("user") - 1
    for message in messages[:question]:
        if message["role"] == "assistant":
            message["weight"] = 0.0
