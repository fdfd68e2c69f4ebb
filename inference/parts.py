"""What a model generates, told apart by its control tokens: reasoning, content and tool calls.

The characters of a text never decide: `<think>` that a model spells in ordinary tokens is content.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from model import Tokenizer

from .text import TextStream

_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_ENDS = {("</think>", "reasoning"), ("</tool_call>", "call")}
# What `dataset.render_chat` writes of a call whose arguments are `arguments`.
_CALL = re.compile(r'\{"name": (?P<name>"(?:[^"\\]|\\.)*"), "arguments": (?P<arguments>.*)\}', re.S)


class Delta(NamedTuple):
    """A piece of an answer; a call comes whole, with its arguments, an object of JSON, as `text`.

    "broken" is what stood in a call's place without being one. It is content too. "result" is what
    a tool returned, see `tools.answer_in_rounds`; a model generates none.
    """

    kind: Literal["reasoning", "content", "call", "broken", "result"]
    text: str
    name: str = ""  # of a call's or a result's tool


class AnswerParts:
    """Tells the parts of an answer apart while its tokens come.

    The chat template sets parts off by a newline on either side of a control token. These are in
    no part, so that the message that the parts make, rendered again, gives the generated tokens.

    Args:
        tokenizer: what the tokens are decoded with.
        thinks: whether the prompt has opened a thought.
        stop: strings before which the content ends, and the answer with it.
    """

    def __init__(self, tokenizer: Tokenizer, thinks: bool = False, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        known = tokenizer.get_added_vocab()
        self._tags = {known[tag]: tag for tag in _TAGS if tag in known}
        self._kind: Literal["reasoning", "content", "call"] = "reasoning" if thinks else "content"
        self._text = TextStream(tokenizer, () if thinks else stop)
        self._call = ""  # the text of the call so far
        self._began = thinks  # whether anything has come
        self._drops_newline = False  # the next one, after a control token
        self._held_newline = False  # perhaps the one before a control token

    @property
    def stopped(self) -> bool:
        """Whether the answer has ended before a stop string."""
        return self._text.stopped

    def add(self, token: int) -> list[Delta]:
        """Add a token, and return what it makes certain; nothing once the answer has ended."""
        tag, began, self._began = self._tags.get(token), self._began, True
        if tag == "<think>" and not began:
            return [*self._begin("reasoning"), Delta("reasoning", "")]
        if (tag, self._kind) in _ENDS:
            return self._begin("content")
        if tag == "<tool_call>" and self._kind == "content":
            return self._begin("call")
        if self._drops_newline and self._tokenizer.decode([token]) == "\n":
            self._drops_newline = False  # before a stop string could begin with it
            return []
        return self._deltas(self._text.add(token))

    def finish(self) -> list[Delta]:
        """Return what was held back, when no token follows; a call that has no end is broken."""
        found = self._deltas(self._text.finish())
        if self._kind == "call":
            return [Delta("broken", self._call)]
        return [*found, Delta(self._kind, "\n")] if self._held_newline else found

    def parse(self, tokens: Iterable[int]) -> Iterator[Delta]:
        """Yield the parts of a whole answer."""
        for token in tokens:
            yield from self.add(token)
        yield from self.finish()

    def _begin(self, kind: Literal["reasoning", "content", "call"]) -> list[Delta]:
        """End the part at a control token, and begin another."""
        found = self._deltas(self._text.finish())
        if self.stopped:
            return found
        if self._kind == "call":
            found.append(read_call(self._call.removesuffix("\n")))
        self._kind, self._call = kind, ""
        self._drops_newline, self._held_newline = True, False
        self._text = TextStream(self._tokenizer, self._stop if kind == "content" else ())
        return found

    def _deltas(self, text: str) -> list[Delta]:
        """The certain part of what was held back and `text`."""
        if text and self._drops_newline:
            text, self._drops_newline = text.removeprefix("\n"), False
        if self._kind == "call":
            self._call += text
            return []
        if self._held_newline and (text or self.stopped):
            text, self._held_newline = f"\n{text}", False
        if text.endswith("\n") and not self.stopped:
            text, self._held_newline = text[:-1], True
        return [Delta(self._kind, text)] if text else []


def read_call(text: str) -> Delta:
    """The call that the text between `<tool_call>` and `</tool_call>` makes, or a broken one.

    Arguments keep their characters if the text is as `dataset.render_chat` writes it.
    """
    with suppress(ValueError, RecursionError):
        if found := _CALL.fullmatch(text):
            name, arguments = json.loads(found["name"]), found["arguments"]
            with suppress(ValueError):
                if isinstance(_load(arguments), dict):
                    name.encode()
                    return Delta("call", arguments, name)
        call = _load(text)
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            arguments = call.get("arguments", {})
            if isinstance(arguments, dict):
                arguments = json.dumps(arguments, ensure_ascii=False)
                f"{call['name']}{arguments}".encode()
                return Delta("call", arguments, call["name"])
    return Delta("broken", text)


def _load(text: str) -> Any:
    """The value of JSON. Raises ValueError, also for NaN and the like, which are none."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def new_answer(enable_thinking: bool | None = None) -> dict[str, Any]:
    """An assistant's message without any text yet, as a prompt with `enable_thinking` begins it."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    return message if enable_thinking is None else {**message, "reasoning_content": ""}


def extend_answer(message: dict[str, Any], delta: Delta) -> None:
    """Add a piece to an assistant's message, which is as in training data.

    What broken calls say is content; their number is in `broken_calls`.
    """
    if delta.kind == "broken":
        message["broken_calls"] = message.get("broken_calls", 0) + 1
    if delta.kind == "call":
        calls = message.setdefault("tool_calls", [])
        calls.append({"name": delta.name, "arguments": delta.text})
    else:
        field = "reasoning_content" if delta.kind == "reasoning" else "content"
        message[field] = message.get(field, "") + delta.text


def parse_answer(
    tokenizer: Tokenizer, tokens: Iterable[int], enable_thinking: bool | None = None
) -> dict[str, Any]:
    """The assistant's message that tokens after a prompt with `enable_thinking` make."""
    message = new_answer(enable_thinking)
    for delta in AnswerParts(tokenizer, bool(enable_thinking)).parse(tokens):
        extend_answer(message, delta)
    return message
