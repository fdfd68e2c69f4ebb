"""The messages of a record, in any of the forms that people write them in."""

import json
import re
from collections import Counter
from typing import Any

from .fields import RecordError, expect, parse_array, parse_flag, parse_json

MAX_WEIGHT = 1e6  # what is above is a mistake, and may not fit a float32

# By the name in lower case.
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "ai", "model"), "assistant"),
    "function_call": "assistant",
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
}
_REASONING = ("reasoning_content", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
# Fields of a message that are false or 0 where its tokens must not be learnt.
_LEARN_FLAGS = ("train", "training", "loss", "loss_mask")
# The roles that a message may follow; a tool message follows a call.
_FOLLOWS = {"system": (None,), "user": (None, "system", "assistant"), "assistant": ("user", "tool")}


def as_messages(value: Any, role: str, name: str) -> list[Any]:
    """Messages, one message, or the text of one by `role`, as an array of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, dict):
        return expect(value, list, name)
    nested = value.get("messages", value.get("conversations"))
    return [value] if nested is None else expect(nested, list, name)


def begins_a_conversation(message: Any) -> bool:
    """Whether an unparsed message is the system's or a user's."""
    return isinstance(message, dict) and _ROLES.get(_role_name(message)) in ("system", "user")


def is_empty_answer(message: dict[str, Any]) -> bool:
    """Whether an assistant's message has no text, no reasoning and no calls."""
    parts = (message["content"].strip(), message.get("reasoning_content", "").strip())
    return message["role"] == "assistant" and not any(parts) and not message.get("tool_calls")


def parse_messages(
    items: Any,
    name: str,
    *,
    answered: bool = True,
    parse_think: bool = False,
    counts: Counter[str] | None = None,
) -> list[dict[str, Any]]:
    """The messages of a record, in an order that makes sense, an answer among them.

    Consecutive messages of one role become one, and answers before the first question are left out:
    both are counted in `counts`, as `joined_messages` and `leading_answers`, and as
    `inline_thoughts` answers that begin with `<think>`, which is text unless `parse_think` is set.
    """
    messages: list[dict[str, Any]] = []
    counts = Counter() if counts is None else counts
    open_calls = 0
    for number, item in enumerate(expect(items, list, name), 1):
        try:
            message = parse_message(item)
            has_thought = message["role"] == "assistant" and _has_thought(message)
            if has_thought and parse_think:
                _take_thought(message)
            elif has_thought:
                counts["inline_thoughts"] += 1
            if message["role"] == "assistant" and not any(m["role"] == "user" for m in messages):
                counts["leading_answers"] += 1
                continue
            is_call = _role_name(item) == "function_call"  # ShareGPT has each on its own
            open_calls = _add_message(messages, message, is_call, open_calls, counts)
        except RecordError as error:
            raise RecordError(f"message {number}: {error}") from None
    if answered and all(message["role"] != "assistant" for message in messages):
        leading = " after a user's" if counts["leading_answers"] else ""
        raise RecordError(f"no assistant message{leading}")
    return messages


def _add_message(
    messages: list[dict[str, Any]],
    message: dict[str, Any],
    is_call: bool,
    open_calls: int,
    counts: Counter[str],
) -> int:
    """Append a message. Takes and returns the number of calls that have no result yet."""
    role, n_calls = message["role"], len(message.get("tool_calls", []))
    last = messages[-1] if messages else {"role": None}
    if role == "tool":
        if not open_calls:
            raise RecordError("a tool message without a call")
        messages.append(message)
        return open_calls - 1
    if role == last["role"]:
        _join(last, message)
        if not is_call:
            counts["joined_messages"] += 1
        return open_calls + n_calls
    if last["role"] not in _FOLLOWS[role]:
        before = f"after {last['role']}" if messages else "first"
        raise RecordError(f"role {role} cannot come {before}")
    messages.append(message)
    return n_calls


def _join(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Append a message to the one before it, of the same role."""
    if first.get("weight") != second.get("weight"):
        raise RecordError("its weight is not that of the message before, which it continues")
    if first.get("tool_calls") and (second["content"] or "reasoning_content" in second):
        raise RecordError("an answer after calls that have no result yet")
    if first.get("tools", second.get("tools")) != second.get("tools", first.get("tools")):
        raise RecordError("its tools are not those of the message before, which it continues")
    for name in ("content", "reasoning_content"):
        parts = [message[name] for message in (first, second) if message.get(name)]
        if parts:
            first[name] = "\n".join(parts)
    for name in ("tool_calls", "tools"):
        if name in second:
            first[name] = second[name] if name == "tools" else first.get(name, []) + second[name]


def _role_name(item: dict[str, Any]) -> Any:
    """What the record calls the role of a message, in lower case."""
    name = item.get("role", item.get("from"))
    return name.lower() if isinstance(name, str) else name


def parse_message(item: Any) -> dict[str, Any]:
    """One message with role and content, or ShareGPT's from and value."""
    name = expect(_role_name(expect(item, dict, "it")), str, "its role")
    if name not in _ROLES:
        raise RecordError(f"unknown role {json.dumps(name)[:40]}")
    message = {"role": _ROLES[name], "content": item.get("content", item.get("value"))}
    if isinstance(message["content"], list):
        message["content"] = "".join(map(_text_of_part, message["content"]))
    learn_flags = [parse_flag(item.get(name), f'"{name}"') for name in _LEARN_FLAGS]
    tools = parse_tools(item.get("tools"))
    if tools:
        if message["role"] != "system":
            raise RecordError('"tools" belong to the system message')
        message["tools"] = tools
    if message["role"] == "assistant":
        call = item.get("function_call")
        if name == "function_call":
            call, message["content"] = message["content"], None
        calls = _parse_calls(item.get("tool_calls"), call)
        if calls:
            message["tool_calls"] = calls
            message["content"] = "" if message["content"] is None else message["content"]
        thoughts = [item[field] for field in _REASONING if item.get(field) is not None]
        if thoughts:  # an empty one is there for a prompt that wants none
            reasoning = next(filter(None, thoughts), thoughts[0])
            message["reasoning_content"] = expect(reasoning, str, "its reasoning")
        weight = item.get("weight")
        if weight is not None:
            if type(weight) not in (int, float) or not 0 <= weight <= MAX_WEIGHT:
                raise RecordError(f"its weight is not a number from 0 to {MAX_WEIGHT:,.0f}")
            message["weight"] = float(weight)
        if False in learn_flags:
            message["weight"] = 0.0
    expect(message["content"], str, "its content")
    return message


def _text_of_part(part: Any) -> str:
    """The text of one of OpenAI's content parts."""
    if isinstance(part, str):
        return part
    kind = expect(part, dict, "a part of its content").get("type")
    if kind not in _TEXT_PARTS:
        raise RecordError(f"a part of kind {json.dumps(kind)[:40]}: only text can be learnt")
    return expect(part.get("text"), str, "the text of a part")


def _has_thought(message: dict[str, Any]) -> bool:
    return bool(_THOUGHT.match(message["content"])) and "reasoning_content" not in message


def _take_thought(message: dict[str, Any]) -> None:
    """Make `<think>…</think>` at the beginning of an answer its reasoning."""
    found = _THOUGHT.match(message["content"])
    message["content"] = message["content"][found.end() :]
    if found[1].strip():
        message["reasoning_content"] = found[1].strip("\n")


def _parse_calls(calls: Any, call: Any) -> list[dict[str, Any]]:
    """Names and arguments of tool_calls and a function_call, values or the JSON of them."""
    calls = parse_array(calls, '"tool_calls"')
    if call:
        call = parse_json(call, "the function_call") if isinstance(call, str) else call
        calls = calls + (call if isinstance(call, list) else [call])
    parsed = []
    for item in calls:
        item = expect(item, dict, "a tool call")
        function = expect(item.get("function") or item, dict, "a tool call")
        name = expect(function.get("name"), str, "the name of a tool call")
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            arguments = {} if arguments is None else arguments
            expect(arguments, dict, '"arguments" of a tool call')
        parsed.append({"name": name, "arguments": arguments})
    return parsed


def parse_tools(tools: Any) -> list[dict[str, Any]]:
    """The schemas of tools: an array or the JSON of one."""
    return [expect(tool, dict, 'one of "tools"') for tool in parse_array(tools, '"tools"')]
