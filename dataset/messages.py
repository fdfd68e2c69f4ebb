"""The messages of a record, in any of the forms that people write them in."""

import json
from typing import Any

from .fields import (
    RecordError,
    check_json,
    check_string,
    expect,
    parse_array,
    parse_flag,
    parse_json,
)

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
        where = f"message {number}"
        message = parse_message(item, where)
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
            before = f"after {last['role']}" if messages else "first"
            raise RecordError(f"{where}: role {role} cannot come {before}")
        else:
            open_calls = len(calls)
        messages.append(message)
    if answered and all(message["role"] != "assistant" for message in messages):
        raise RecordError("no assistant message")
    return messages


def _is_same_turn(last: dict[str, Any], message: dict[str, Any]) -> bool:
    """Whether a function_call belongs to the message before: ShareGPT has each on its own."""
    return last["role"] == "assistant" and last.get("weight") == message.get("weight")


def _role_name(item: dict[str, Any]) -> Any:
    """What the record calls the role of a message."""
    return item.get("role", item.get("from"))


def parse_message(item: Any, where: str) -> dict[str, Any]:
    """One message with role and content, or ShareGPT's from and value."""
    name = expect(_role_name(expect(item, dict, where)), str, f"{where}: its role")
    if name not in _ROLES:
        raise RecordError(f"{where}: unknown role {json.dumps(name)[:40]}")
    content = item.get("content", item.get("value"))
    message = {"role": _ROLES[name], "content": content}
    learn_flags = [parse_flag(item.get(name), f'{where}: "{name}"') for name in _LEARN_FLAGS]
    tools = parse_tools(item.get("tools"), f'{where}: "tools"')
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
            reasoning = check_string(item["reasoning_content"], f"{where}: reasoning_content")
            message["reasoning_content"] = reasoning
        if item.get("weight") is not None:
            message["weight"] = _check_weight(item["weight"], where)
        if False in learn_flags:
            message["weight"] = 0.0
    check_string(message["content"], f"{where}: its content")
    return message


def _find_calls(item: dict[str, Any], where: str) -> list[Any]:
    """The calls of an assistant's message: an array, the JSON of one, or one "function_call"."""
    calls = parse_array(item.get("tool_calls"), f'{where}: "tool_calls"')
    if not item.get("function_call"):
        return calls
    if calls:
        raise RecordError(f"{where}: both tool_calls and a function_call")
    return _as_calls(item["function_call"], f"{where}: the function_call")


def _as_calls(value: Any, name: str) -> list[Any]:
    """One call, the JSON of one, or the JSON of an array of them, as an array."""
    calls = parse_json(value, name) if isinstance(value, str) else value
    return calls if isinstance(calls, list) else [calls]


def _parse_call(call: Any, where: str) -> dict[str, Any]:
    """Name and arguments of a call, alone or under "function"."""
    call = expect(call, dict, f"{where}: a tool call")
    function = expect(call.get("function") or call, dict, f"{where}: a tool call")
    name = check_string(function.get("name"), f"{where}: the name of a tool call")
    arguments = function.get("arguments")
    where = f'{where}: "arguments" of a tool call'
    if not isinstance(arguments, str):
        arguments = expect({} if arguments is None else arguments, dict, where)
    check_json(arguments, where)
    return {"name": name, "arguments": arguments}


def parse_tools(tools: Any, name: str) -> list[dict[str, Any]]:
    """The schemas of tools: an array or the JSON of one."""
    tools = parse_array(tools, name)
    for tool in tools:
        check_json(expect(tool, dict, f"one of {name}"), name)
    return tools


def _check_weight(value: Any, where: str) -> float:
    """`value` if it is a number that a loss can be multiplied by."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MAX_WEIGHT:
        raise RecordError(f"{where}: its weight is not a number from 0 to {MAX_WEIGHT:,.0f}")
    return float(value)
