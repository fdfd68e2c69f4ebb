"""Read and check one record of a data file, which `dataset.reader` finds.

A record that cannot be used raises `RecordError` with the reason alone; whoever reads the file
knows its name and the record's line, collects both in `BadLines`, and tells the user through
`UserError`.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from common import UserError

MAX_LINE_BYTES = 1 << 30
SHOWN_BAD_LINES = 10
MAX_WEIGHT = 1e6  # what is above is a mistake, and may not fit a float32

_BOM = "\ufeff"
_ESCAPE_LENGTH = len("\\u0000")
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# Fields of a message that are false or 0 where its tokens must not be learnt.
_LEARN_FLAGS = ("train", "training", "loss", "loss_mask")
# Fields of a preference pair that rate the chosen and the rejected reply.
_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
)
# The roles that a message may follow; a tool message follows a call.
_FOLLOWS = {"system": (None,), "user": (None, "system", "assistant"), "assistant": ("user", "tool")}


class RecordError(ValueError):
    """Why one line cannot be used: a short reason, without file name and line number."""


@dataclass
class BadLines:
    """The number of bad lines of a file, and the first ten of them as (line number, reason).

    `total` is the number of all its records, good ones too; blank lines are none.
    """

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)
    total: int = 0

    def add(self, line_number: int, reason: str) -> None:
        """Note one bad line; line numbers start at 1. The total stays as it is."""
        self.count += 1
        if len(self.first) < SHOWN_BAD_LINES:
            self.first.append((line_number, reason))

    def check(self, path: Path, skip_bad_lines: float) -> None:
        """Raise UserError if more than the share `skip_bad_lines` of the file's lines is bad.

        It names the first ten as `file:line: reason`, then the total, and the way out if that does
        not lose most of the file.
        """
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
    record = _parse_object(line)
    if "text" not in record:
        raise RecordError('"text" is missing')
    return _check_text(record["text"], '"text"')


class Conversation(NamedTuple):
    """The messages of a chat and the tools in it, whatever the shape of the record was.

    `messages` are dicts as `apply_chat_template` takes them. Each has `role` (system, user,
    assistant or tool) and `content`, a string. One of the assistant may have `reasoning_content`, a
    string; `tool_calls`, dicts of `name` and `arguments`, which is a dict or a string of JSON; and
    `weight`, what its tokens' loss is multiplied by. `tools` are JSON schemas, as dicts.

    A system message is the first. A user and the assistant take turns; after an assistant's calls
    may come as many tool messages, which the assistant answers. There is an assistant message, but
    the last message may be one that nobody answers.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


def record_text(line: bytes) -> str:
    """All text of a record of any kind, its parts joined by newlines. Raises RecordError.

    Of a preference pair that is the chosen side; tools and calls are left out.
    """
    names = _parse_object(line).keys()
    if "text" in names:
        return parse_text(line)
    messages = parse_preference(line).chosen if "chosen" in names else parse_chat(line).messages
    parts = [message.get(name) for message in messages for name in ("reasoning_content", "content")]
    return _check_text("\n".join(part for part in parts if part), "its text")


class Preference(NamedTuple):
    """Two continuations of one prompt, of which the first is preferred.

    `chosen` and `rejected` are messages as those of a Conversation, and begin with the same
    `shared` ones, a user's among them; an assistant's follows in both. `tools` are JSON schemas.
    `scores` rate the chosen and the rejected reply, where the record has such numbers.
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

    Messages are as for `parse_chat`, and "system" and "tools" may stand beside them, and numbers
    as "score_chosen" and "score_rejected". A prompt that both sides repeat counts once.
    """
    record = _parse_object(line)
    given = {}
    for side in ("chosen", "rejected"):
        if side not in record:
            raise RecordError(f'"{side}" is missing')
        given[side] = _as_messages(record[side], "assistant", f'"{side}"')
    prompt = _parse_prompt(record, list(given.values()))
    sides = {}
    for side, messages in given.items():
        try:
            parsed = _add_system(record, _parse_messages([*prompt, *messages], ""))
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
        if not reply or reply[0]["role"] != "assistant":
            raise RecordError(f'"{name}": no reply of the assistant after what both sides share')
        if reply[-1]["role"] != "assistant":
            raise RecordError(f'"{name}": the last message is not the assistant\'s')
        if not any(_says_something(message) for message in reply):
            raise RecordError(f'"{name}": the reply is empty')
    tools = _take_tools(record, chosen)
    rejected[0].pop("tools", None)  # the same, as it is shared
    return Preference(chosen, rejected, shared, tools, _find_scores(record))


def _find_scores(record: dict[str, Any]) -> tuple[float, float] | None:
    """How a record rates the chosen and the rejected reply, if by two numbers."""
    for names in _SCORES:
        chosen, rejected = (record.get(name) for name in names)
        if all(type(score) in (int, float) for score in (chosen, rejected)):
            return chosen, rejected
    return None


def _parse_prompt(record: dict[str, Any], sides: list[list[Any]]) -> list[Any]:
    """The messages that stand before both sides; none where these are whole conversations."""
    whole = all(side and _begins_a_conversation(side[0]) for side in sides)
    for name in ("prompt", "conversations", "messages"):
        if record.get(name) is None:
            continue
        prompt = _as_messages(record[name], "user", f'"{name}"')
        # "messages" beside whole conversations may be the chosen one once more.
        if whole and (name != "prompt" or all(_repeats(side, prompt) for side in sides)):
            return []
        return prompt
    return []


def _repeats(side: list[Any], prompt: list[Any]) -> bool:
    """Whether a conversation begins with a prompt, which may lack its system message."""
    first, second = (
        [_parse_message(item, f"message {i}") for i, item in enumerate(items, 1)]
        for items in (side, prompt)
    )
    if first[:1] != second[:1] and first[0]["role"] == "system":
        first = first[1:]
    return first[: len(second)] == second


def _begins_a_conversation(message: Any) -> bool:
    return isinstance(message, dict) and _ROLES.get(_role_name(message)) in ("system", "user")


def _as_messages(value: Any, role: str, name: str) -> list[Any]:
    """Messages, one message, or a string that one of `role` says, as an array of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else _expect(value, list, name)


def is_empty_answer(message: dict[str, Any]) -> bool:
    """Whether an assistant's message has no text, no reasoning and no calls."""
    return (
        message["role"] == "assistant"
        and not _says_something(message)
        and not message.get("reasoning_content", "").strip()
    )


def _says_something(message: dict[str, Any]) -> bool:
    """Whether an assistant's message, which any other message is not, has text or calls a tool."""
    return message["role"] == "assistant" and bool(
        message["content"].strip() or message.get("tool_calls")
    )


def parse_chat(line: bytes) -> Conversation:
    """The conversation on one line, of any of these shapes. Raises RecordError.

        {"conversations": [{"role": "user", "content": "…"}, …]}    or "messages"
        {"conversations": [{"from": "human", "value": "…"}, …]}     as ShareGPT has it
        {"instruction": "…", "input": "…", "output": "…"}           as Alpaca has it

    Beside each there may be "system", a string; "tools", an array or the JSON of one, which the
    system message may have instead; and "mask_history": if it is true, only answers to the last
    question are learnt. The last shape may have "history", an array of [question, answer].

    Of an assistant's message, "weight" scales the loss of its tokens; it is 0 if one of "train",
    "training", "loss" and "loss_mask" is false or 0.
    """
    record = _parse_object(line)
    for name in ("conversations", "messages"):
        if record.get(name) is not None:
            messages = _parse_messages(record[name], f'"{name}"')
            break
    else:
        if "instruction" not in record:
            raise RecordError('no "conversations", "messages" or "instruction"')
        messages = _parse_messages(_alpaca_messages(record), "")
    if _parse_flag(record.get("mask_history"), '"mask_history"'):
        _mask_history(messages)
    messages = _add_system(record, messages)
    return Conversation(messages, _take_tools(record, messages))


def parse_question(line: bytes) -> tuple[Conversation, str | None]:
    """What is to be answered on one line, and the answer that it gives itself, if it does.

    The line is as for `parse_chat`, and need not have an answer; or in place of the conversation it
    has a "prompt", a string or messages. Raises RecordError.
    """
    record = _parse_object(line)
    names = [n for n in ("conversations", "messages", "prompt") if record.get(n) is not None]
    if names:
        items = _as_messages(record[names[0]], "user", f'"{names[0]}"')
        messages = _parse_messages(items, f'"{names[0]}"', answered=False)
    elif "instruction" in record:
        messages = _parse_messages(_alpaca_messages({"output": "", **record}), "")
    else:
        raise RecordError('no "prompt", "conversations", "messages" or "instruction"')
    messages = _add_system(record, messages) if messages else messages
    tools = _take_tools(record, messages)
    reference = None
    if messages and messages[-1]["role"] == "assistant":
        reference = messages.pop()["content"] or None
    if not messages or messages[-1]["role"] == "system":
        raise RecordError("nothing to be answered")
    return Conversation(messages, tools), reference


def _add_system(record: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages after the record's own "system", if there is one that they do not begin with."""
    if not record.get("system"):
        return messages
    content = _check_string(record["system"], '"system"')
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": content}, *messages]
    if messages[0]["content"] != content:
        raise RecordError('"system" and the system message differ')
    return messages


def _take_tools(record: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools of a record or of its system message, from which they are taken away."""
    tools = _parse_tools(record.get("tools"), '"tools"')
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
    question = _check_string(record["instruction"], '"instruction"')
    if record.get("input"):
        question += "\n" * bool(question) + _check_string(record["input"], '"input"')
    answer = _check_string(record.get("output"), '"output"')
    return [
        {"role": role, "content": content}
        for pair in [*history, [question, answer]]
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def _parse_messages(items: Any, name: str, answered: bool = True) -> list[dict[str, Any]]:
    """The messages of a record, in an order that makes sense, an answer among them."""
    messages: list[dict[str, Any]] = []
    open_calls = 0
    for number, item in enumerate(_expect(items, list, name), 1):
        where = f"message {number}"
        message = _parse_message(item, where)
        role = message["role"]
        last = messages[-1] if messages else {"role": None}
        calls = message.get("tool_calls", [])
        if role == "tool":
            if not open_calls:
                raise RecordError(f"{where}: a tool message without a call")
            open_calls -= 1
        elif _role_name(item) == "function_call" and _is_same_turn(last, message):
            last["tool_calls"] = last.get("tool_calls", []) + calls
            open_calls += len(calls)
            continue
        elif last["role"] not in _FOLLOWS[role]:
            raise RecordError(f"{where}: {_wrong_order(role, last['role'])}")
        else:
            open_calls = len(calls)
        messages.append(message)
    if answered and all(message["role"] != "assistant" for message in messages):
        raise RecordError("no assistant message")
    return messages


def _is_same_turn(last: dict[str, Any], message: dict[str, Any]) -> bool:
    """Whether a function_call belongs to the message before: ShareGPT has each on its own."""
    return last["role"] == "assistant" and last.get("weight") == message.get("weight")


def _wrong_order(role: str, before: str | None) -> str:
    """Why a message of `role` cannot come after one of `before`."""
    if role == "system":
        return "a system message that is not the first"
    if role == before:
        return f"two {role} messages in a row"
    if role == "assistant":
        return "an assistant message before any user message"
    return "a user message before the assistant answers the tool"


def _role_name(item: dict[str, Any]) -> Any:
    """What the record calls the role of a message."""
    return item.get("role", item.get("from"))


def _parse_message(item: Any, where: str) -> dict[str, Any]:
    """One message with role and content, or ShareGPT's from and value."""
    name = _expect(_role_name(_expect(item, dict, where)), str, f"{where}: its role")
    if name not in _ROLES:
        raise RecordError(f"{where}: unknown role {json.dumps(name)[:40]}")
    content = item.get("content", item.get("value"))
    message = {"role": _ROLES[name], "content": content}
    learn_flags = [_parse_flag(item.get(name), f'{where}: "{name}"') for name in _LEARN_FLAGS]
    tools = _parse_tools(item.get("tools"), f'{where}: "tools"')
    if tools:
        if message["role"] != "system":
            raise RecordError(f'{where}: "tools" belong to the system message')
        message["tools"] = tools
    if message["role"] == "assistant":
        if name == "function_call":
            calls, message["content"] = _as_calls(content, f"{where}: the function_call"), None
        else:
            calls = _find_calls(item, where)
        if calls:
            message["tool_calls"] = [_parse_call(call, where) for call in calls]
            message["content"] = "" if message["content"] is None else message["content"]
        if item.get("reasoning_content"):
            reasoning = _check_string(item["reasoning_content"], f"{where}: reasoning_content")
            message["reasoning_content"] = reasoning
        if item.get("weight") is not None:
            message["weight"] = _check_weight(item["weight"], where)
        if False in learn_flags:
            message["weight"] = 0.0
    _check_string(message["content"], f"{where}: its content")
    return message


def _find_calls(item: dict[str, Any], where: str) -> list[Any]:
    """The calls of an assistant's message: an array, the JSON of one, or one "function_call"."""
    calls = _parse_array(item.get("tool_calls"), f'{where}: "tool_calls"')
    if not item.get("function_call"):
        return calls
    if calls:
        raise RecordError(f"{where}: both tool_calls and a function_call")
    return _as_calls(item["function_call"], f"{where}: the function_call")


def _as_calls(value: Any, name: str) -> list[Any]:
    """One call, the JSON of one, or the JSON of an array of them, as an array."""
    calls = _parse_json(value, name) if isinstance(value, str) else value
    return calls if isinstance(calls, list) else [calls]


def _parse_call(call: Any, where: str) -> dict[str, Any]:
    """Name and arguments of a call, alone or under "function"."""
    call = _expect(call, dict, f"{where}: a tool call")
    function = _expect(call.get("function") or call, dict, f"{where}: a tool call")
    name = _check_string(function.get("name"), f"{where}: the name of a tool call")
    arguments = function.get("arguments")
    where = f'{where}: "arguments" of a tool call'
    if not isinstance(arguments, str):
        arguments = _expect({} if arguments is None else arguments, dict, where)
    _check_json(arguments, where)
    return {"name": name, "arguments": arguments}


def _parse_tools(tools: Any, name: str) -> list[dict[str, Any]]:
    """The schemas of tools: an array or the JSON of one."""
    tools = _parse_array(tools, name)
    for tool in tools:
        _check_json(_expect(tool, dict, f"one of {name}"), name)
    return tools


def _parse_array(value: Any, name: str) -> list[Any]:
    """An array or the JSON of one, where it is given."""
    if isinstance(value, str):
        value = _parse_json(value, name) if value.strip() else None
    return _expect(value or [], list, name)


def _parse_flag(value: Any, name: str) -> bool | None:
    """A flag that may be absent or null."""
    if value is not None and value not in (0, 1):
        raise RecordError(f"{name} is neither true or 1 nor false or 0")
    return None if value is None else bool(value)


def _parse_json(text: Any, name: str) -> Any:
    """What the JSON in a string means."""
    _check_string(text, name)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RecordError(f"{name} is not the JSON that it should be") from None


def _check_json(value: Any, name: str) -> None:
    """Raise RecordError if the JSON of `value` cannot be written in UTF-8."""
    try:
        _check_string(json.dumps(value, ensure_ascii=False), name)
    except RecursionError:
        raise RecordError(f"{name} is nested too deeply") from None


def _check_weight(value: Any, where: str) -> float:
    """`value` if it is a number that a loss can be multiplied by."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MAX_WEIGHT:
        raise RecordError(f"{where}: its weight is not a number from 0 to {MAX_WEIGHT:,.0f}")
    return float(value)


def _check_text(value: Any, name: str) -> str:
    """`value` if it is a string with something in it that UTF-8 can hold."""
    if not _check_string(value, name):
        raise RecordError(f"{name} is empty")
    if value.isspace():
        raise RecordError(f"{name} is blank")
    return value


def _check_string(value: Any, name: str) -> str:
    """`value` if it is a string that UTF-8 can hold."""
    try:
        _expect(value, str, name).encode("utf-8")
    except UnicodeEncodeError as error:
        code, at = ord(value[error.start]), error.start + 1
        raise RecordError(
            f"{name} holds a lone surrogate, \\u{code:04x}, at character {at}"
        ) from None
    return value


def _parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object on a line; its line end, and a byte order mark before it, are left out."""
    if len(line) > MAX_LINE_BYTES:
        raise RecordError(f"longer than {MAX_LINE_BYTES:,} bytes")
    try:
        text = line.rstrip(b"\r\n").decode("utf-8").removeprefix(_BOM)
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            raise RecordError("cut off in the middle of a character; truncated?") from None
        raise RecordError(f"invalid UTF-8 at byte {error.start + 1}") from None
    if not text.strip():
        raise RecordError("blank line")
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        if _is_cut_off(text, error):
            raise RecordError(f"JSON ends too early, at column {len(text)}; truncated?") from None
        what = error.msg.removesuffix(" at")
        where = f"line {error.lineno} of the record, " if error.lineno > 1 else ""
        raise RecordError(f"broken JSON: {what} at {where}column {error.colno}") from None
    except RecursionError:
        raise RecordError("broken JSON: nested too deeply") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise RecordError("broken JSON: a number of several thousand digits") from None
    return _expect(record, dict, "the record")


def _is_cut_off(text: str, error: json.JSONDecodeError) -> bool:
    """Whether more characters could have made the text valid."""
    if error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()):
        return True
    escape = text[error.pos :]
    return error.msg.startswith("Invalid \\uXXXX escape") and len(escape) < _ESCAPE_LENGTH


_JSON_NAMES = {bool: "a boolean", str: "a string", list: "an array", dict: "an object"}


def _expect(value: Any, kind: type, name: str) -> Any:
    """`value` if it is of that kind: dict, list or str. Raises RecordError."""
    if not isinstance(value, kind):
        found = "null" if value is None else _JSON_NAMES.get(type(value), "a number")
        raise RecordError(f"{name} is {found}, not {_JSON_NAMES[kind]}")
    return value
