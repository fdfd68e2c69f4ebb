"""The messages of a record, in any of the forms that people write them in."""

import json
from typing import Any

from .fields import RecordError, expect, parse_array, parse_flag, parse_json

MAX_WEIGHT = 1e6  # what is above is a mistake, and may not fit a float32

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
# The roles that a message may follow; a tool message follows a call.
_FOLLOWS = {"system": (None,), "user": (None, "system", "assistant"), "assistant": ("user", "tool")}


def as_messages(value: Any, role: str, name: str) -> list[Any]:
    """Messages, one message, or the text of one by `role`, as an array of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else expect(value, list, name)


def begins_a_conversation(message: Any) -> bool:
    """Whether an unparsed message is the system's or a user's."""
    return isinstance(message, dict) and _ROLES.get(_role_name(message)) in ("system", "user")


def is_empty_answer(message: dict[str, Any]) -> bool:
    """Whether an assistant's message has no text, no reasoning and no calls."""
    parts = (message["content"].strip(), message.get("reasoning_content", "").strip())
    return message["role"] == "assistant" and not any(parts) and not message.get("tool_calls")


def parse_messages(items: Any, name: str, answered: bool = True) -> list[dict[str, Any]]:
    """The messages of a record, in an order that makes sense, an answer among them."""
    messages: list[dict[str, Any]] = []
    open_calls = 0
    for number, item in enumerate(expect(items, list, name), 1):
        try:
            open_calls = _add_message(messages, item, open_calls)
        except RecordError as error:
            raise RecordError(f"message {number}: {error}") from None
    if answered and all(message["role"] != "assistant" for message in messages):
        raise RecordError("no assistant message")
    return messages


def _add_message(messages: list[dict[str, Any]], item: Any, open_calls: int) -> int:
    """Append a message. Takes and returns the number of calls that have no result yet."""
    message = parse_message(item)
    role, calls = message["role"], message.get("tool_calls", [])
    last = messages[-1] if messages else {"role": None}
    if role == "tool":
        if not open_calls:
            raise RecordError("a tool message without a call")
        messages.append(message)
        return open_calls - 1
    is_same_turn = role == last["role"] and message.get("weight") == last.get("weight")
    if is_same_turn and _role_name(item) == "function_call":  # ShareGPT has each on its own
        last["tool_calls"] = last.get("tool_calls", []) + calls
        return open_calls + len(calls)
    if last["role"] not in _FOLLOWS[role]:
        before = f"after {last['role']}" if messages else "first"
        raise RecordError(f"role {role} cannot come {before}")
    messages.append(message)
    return len(calls)


def _role_name(item: dict[str, Any]) -> Any:
    """What the record calls the role of a message."""
    return item.get("role", item.get("from"))


def parse_message(item: Any) -> dict[str, Any]:
    """One message with role and content, or ShareGPT's from and value."""
    name = expect(_role_name(expect(item, dict, "it")), str, "its role")
    if name not in _ROLES:
        raise RecordError(f"unknown role {json.dumps(name)[:40]}")
    message = {"role": _ROLES[name], "content": item.get("content", item.get("value"))}
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
        if item.get("reasoning_content"):
            message["reasoning_content"] = expect(item["reasoning_content"], str, "its reasoning")
        weight = item.get("weight")
        if weight is not None:
            if type(weight) not in (int, float) or not 0 <= weight <= MAX_WEIGHT:
                raise RecordError(f"its weight is not a number from 0 to {MAX_WEIGHT:,.0f}")
            message["weight"] = float(weight)
        if False in learn_flags:
            message["weight"] = 0.0
    expect(message["content"], str, "its content")
    return message


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
