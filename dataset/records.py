"""Parse one record of a data file, which `dataset.reader` finds.

One that cannot be used raises `RecordError`; what reads the file collects these in `BadLines`.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from common import UserError

from .fields import RecordError, check_text, expect, parse_flag, parse_object
from .messages import (
    as_messages,
    begins_a_conversation,
    is_empty_answer,
    parse_message,
    parse_messages,
    parse_tools,
)

SHOWN_BAD_LINES = 10


@dataclass
class BadLines:
    """The number of bad lines of a file, the first ten as (line number, reason), and all lines."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)
    total: int = 0

    def add(self, line_number: int, reason: str) -> None:
        """Note one bad line; the total stays as it is."""
        self.count += 1
        if len(self.first) < SHOWN_BAD_LINES:
            self.first.append((line_number, reason))

    def check(self, path: Path, skip_bad_lines: float) -> None:
        """Raise UserError if more than the share `skip_bad_lines` of the file's lines is bad."""
        share = self.count / max(1, self.total)
        if share <= skip_bad_lines:
            return
        last = f"{path}: {self.count:,} of {self.total:,} lines are bad"
        if share <= 0.5:
            last += f"; --skip_bad_lines {math.ceil(100 * share) / 100} goes on without them"
        else:
            last += ", most of the file"
        raise UserError("\n".join([*(f"{path}:{n}: {why}" for n, why in self.first), last]))


def parse_text(line: bytes) -> str:
    """The text of one `{"text": "…"}` line. Raises RecordError."""
    record = parse_object(line)
    if "text" not in record:
        raise RecordError('"text" is missing')
    return check_text(record["text"], '"text"')


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


def record_text(line: bytes) -> str:
    """All text of a record, of a pair the chosen side, joined by newlines. Raises RecordError."""
    names = parse_object(line).keys()
    if "text" in names:
        return parse_text(line)
    messages = parse_preference(line).chosen if "chosen" in names else parse_chat(line).messages
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


def parse_preference(line: bytes) -> Preference:
    """The pair on one line, of any of these shapes. Raises RecordError.

        {"chosen": [messages], "rejected": [messages]}      whole conversations
        {"prompt": …, "chosen": …, "rejected": …}           strings, messages or arrays of them
        {"conversations": [messages], "chosen": …, "rejected": …}   as ShareGPT; or "messages"

    "system", "tools", and numbers as "score_chosen" and "score_rejected" may stand beside them.
    """
    record = parse_object(line)
    given = {}
    for side in ("chosen", "rejected"):
        if side not in record:
            raise RecordError(f'"{side}" is missing')
        given[side] = as_messages(record[side], "assistant", f'"{side}"')
    prompt = _parse_prompt(record, list(given.values()))
    sides = {}
    for side, messages in given.items():
        try:
            parsed = _add_system(record, parse_messages([*prompt, *messages], ""))
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
    scores = record.get("score_chosen"), record.get("score_rejected")
    are_numbers = all(type(score) in (int, float) for score in scores)
    return Preference(chosen, rejected, shared, tools, scores if are_numbers else None)


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


def parse_chat(line: bytes) -> ParsedChat:
    """The conversation on one line, of any of these shapes. Raises RecordError.

        {"conversations": [{"role": "user", "content": "…"}, …]}    or "messages"
        {"conversations": [{"from": "human", "value": "…"}, …]}     as ShareGPT has it
        {"instruction": "…", "input": "…", "output": "…"}           as Alpaca has it

    Beside each there may be "system", a string; "tools", an array or the JSON of one, which the
    system message may have instead; and "mask_history": if it is true, only answers to the last
    question are learnt. The last shape may have "history", an array of [question, answer].
    """
    record = parse_object(line)
    messages = _find_messages(record, "conversations", "messages")
    if parse_flag(record.get("mask_history"), '"mask_history"'):
        _mask_history(messages)
    messages = _add_system(record, messages)
    return ParsedChat(messages, _take_tools(record, messages))


def parse_question(line: bytes) -> tuple[ParsedChat, str | None]:
    """What is to be answered on one line, and the answer that it gives itself, if it does.

    As `parse_chat`, but no answer is needed, and there may be a "prompt". Raises RecordError.
    """
    record = parse_object(line)
    names = ("conversations", "messages", "prompt")
    messages = _find_messages({"output": "", **record}, *names, answered=False)
    messages = _add_system(record, messages)
    tools = _take_tools(record, messages)
    reference = None
    if messages and messages[-1]["role"] == "assistant":
        reference = messages.pop()["content"] or None
    if not messages or messages[-1]["role"] == "system":
        raise RecordError("nothing to be answered")
    return ParsedChat(messages, tools), reference


def _find_messages(
    record: dict[str, Any], *names: str, answered: bool = True
) -> list[dict[str, Any]]:
    """The messages of the first of these fields that is there, or of an instruction."""
    for name in names:
        if record.get(name) is not None:
            items = as_messages(record[name], "user", f'"{name}"')
            return parse_messages(items, f'"{name}"', answered)
    if "instruction" not in record:
        raise RecordError("no " + ", ".join(f'"{name}"' for name in names) + ' or "instruction"')
    return parse_messages(_alpaca_messages(record), "")


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


def _alpaca_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The exchanges of an instruction record, as messages."""
    history = record.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise RecordError('"history" is not an array of [question, answer]')
    question = expect(record["instruction"], str, '"instruction"')
    if record.get("input"):
        question += "\n" * bool(question) + expect(record["input"], str, '"input"')
    answer = expect(record.get("output"), str, '"output"')
    return [
        {"role": role, "content": content}
        for pair in [*history, [question, answer]]
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
