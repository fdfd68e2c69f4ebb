"""Tools that a model may call: what runs them, and the rounds of call, result and answer."""

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from common import UserError

from .calculator import calculator
from .parts import Delta, extend_answer, new_answer

MOST_ROUNDS = 5  # of calls before an answer
LONGEST_RESULT = 4000  # characters of what a tool returns

Message = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """A function that a model may call, and its JSON schema, which the prompt shows."""

    schema: dict[str, Any]
    function: Callable[..., Any]

    @property
    def name(self) -> str:
        """What calls name it by."""
        return tool_name(self.schema)


def tool_name(schema: Mapping[str, Any]) -> str:
    """The name in a tool's schema; empty if it has none."""
    function = schema.get("function", schema)
    return str(function.get("name", "")) if isinstance(function, dict) else ""


def clock() -> str:
    """The time of day, in hours and minutes."""
    return f"{datetime.now().astimezone():%H:%M}"


def _built_in(function: Callable[..., Any], *arguments: str) -> Tool:
    """A tool whose arguments are texts. A small model reads its schema each time: it is short."""
    properties = {argument: {"type": "string"} for argument in arguments}
    parameters = {"type": "object", "properties": properties}
    about = {"name": function.__name__, "parameters": parameters}
    return Tool({"type": "function", "function": about}, function)


BUILT_IN = {tool.name: tool for tool in (_built_in(calculator, "expression"), _built_in(clock))}


def find_tools(names: Sequence[str], file: Path | None) -> dict[str, Tool]:
    """The built-in tools of these names and those of a Python file, by name; raises UserError."""
    tools = {name: BUILT_IN[name] for name in names}
    for tool in () if file is None else read_tool_file(file):
        if tool.name in tools:
            raise UserError(f"--tool_file {file}: {tool.name} is one of --tools already")
        tools[tool.name] = tool
    return tools


def read_tool_file(path: Path) -> list[Tool]:
    """Run a Python file, and make a tool of each public function that it defines.

    Its schema follows from the types of its arguments and its docstring, which has a description
    and an "Args:" section. Raises UserError if a function lacks these, or the file cannot be run.
    """
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
    )

    spec = importlib.util.spec_from_file_location(f"tools of {path.name}", path)
    if spec is None or not path.is_file():
        raise UserError(f"--tool_file {path}: there is no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and types look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UserError(f"--tool_file {path}: {type(error).__name__}: {error}") from None
    tools = []
    for name, function in vars(module).items():
        is_own = inspect.isfunction(function) and function.__module__ == spec.name
        if name.startswith("_") or not is_own:
            continue
        try:
            schema = get_json_schema(function)
        except (DocstringParsingException, TypeHintParsingException, NameError) as error:
            raise UserError(f"--tool_file {path}: {name}: {error}") from None
        schema["function"].pop("return", None)  # no part of OpenAI's schemas
        tools.append(Tool(schema, function))
    if not tools:
        raise UserError(f"--tool_file {path}: it defines no public function")
    return tools


def run_call(call: Mapping[str, Any], tools: Mapping[str, Tool]) -> str:
    """What a tool returns to a call: text, or JSON of a value; an error is text for the model.

    Of a longer text than LONGEST_RESULT the beginning.
    """
    text = _run(call, tools)
    return text if len(text) <= LONGEST_RESULT else f"{text[:LONGEST_RESULT]}…"


def _run(call: Mapping[str, Any], tools: Mapping[str, Tool]) -> str:
    if call["name"] not in tools:
        return f"error: there is no tool {call['name']}"
    arguments = call["arguments"]
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        result = tools[call["name"]].function(**arguments)
        if isinstance(result, str):
            return result
        return json.dumps(result, ensure_ascii=False, default=str)
    except Exception as error:  # a tool may raise anything
        return f"error: {type(error).__name__}: {error}"


def run_calls(
    answer: Message, schemas: Sequence[Mapping[str, Any]], tools: Mapping[str, Tool]
) -> Iterator[Message]:
    """Run the calls of an answer, and yield the messages of the tools.

    There are none where a tool that `schemas` offer is called, which nothing here runs. One that
    they do not offer does not exist for the model.
    """
    offered = {tool_name(schema) for schema in schemas}
    calls = answer.get("tool_calls", [])
    if any(call["name"] in offered - tools.keys() for call in calls):
        return
    usable = {name: tool for name, tool in tools.items() if name in offered}
    for call in calls:
        yield {"role": "tool", "content": run_call(call, usable)}


def answer_in_rounds(
    stream: Callable[[list[Message]], Iterator[Delta]],
    messages: Sequence[Message],
    made: list[Message],
    schemas: Sequence[Mapping[str, Any]] = (),
    tools: Mapping[str, Tool] | None = None,
    enable_thinking: bool | None = None,
) -> Iterator[Delta]:
    """Answer a conversation: as long as an answer calls tools, run them, and let it go on.

    `made` gets the new messages, of which the last one grows while its deltas come; so it is whole
    also if this ends early. It ends with a call where nothing runs that, or after MOST_ROUNDS.

    Args:
        stream: generates the answer to messages; `enable_thinking` is that of its prompts.
        messages: the conversation so far.
        made: an empty list.
        schemas: the tools that the prompts offer.
        tools: those that can be run, by name.
    """
    for number in range(MOST_ROUNDS + 1):
        answer = new_answer(enable_thinking)
        before = [*messages, *made]
        made.append(answer)
        for delta in stream(before):
            extend_answer(answer, delta)
            yield delta
        if number < MOST_ROUNDS:
            calls = iter(answer.get("tool_calls", ()))
            for result in run_calls(answer, schemas, tools or {}):
                made.append(result)
                yield Delta("result", result["content"], next(calls)["name"])
        if made[-1] is answer:
            return
