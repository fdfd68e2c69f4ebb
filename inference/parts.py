"""The parts of an answer: reasoning, content and calls, told apart by its control tokens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from model import Tokenizer

from .text import TextStream


@dataclass(frozen=True)
class Call:
    """A call of a tool; the arguments are JSON of an object, as the chat format renders it."""

    name: str
    arguments: str


@dataclass
class Parts:
    """What a token adds to an answer, or all of it."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)

    def add(self, more: "Parts") -> None:
        """Append what follows."""
        self.content += more.content
        self.reasoning += more.reasoning
        self.calls += more.calls


class PartStream:
    """Decodes the tokens of an answer to its parts, as far as they are certain.

    The newlines that the chat format puts around parts are left out. A call that is not whole, or
    not a JSON object with a name and an object of arguments, is content with its marks. `thinking`
    is whether the prompt ends within a thought. The answer ends before a `stop` string of its
    content, and after its first call if it may have `one_call` only. Without `marks`, all of it is
    content.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        thinking: bool = False,
        one_call: bool = False,
        marks: bool = True,
    ):
        names = ("<think>", "</think>", "<tool_call>", "</tool_call>") if marks else ()
        self._marks = {tokenizer.convert_tokens_to_ids(name): name for name in names}
        self._tokenizer = tokenizer
        self._stop = stop
        self._one_call = one_call
        self._part = ""  # the mark of the part that is open; content has none
        self._held = ""  # a newline that is left out if a mark follows
        self._left_out = ""  # the newline before an open call
        self._drops_newline = False  # that follows a mark
        self._text = TextStream(tokenizer, stop)
        self.stopped = False
        if thinking:
            self._open("<think>")

    def add(self, token: int) -> Parts:
        """Add a token, and return what it makes certain; nothing once the answer has ended."""
        if self.stopped:
            return Parts()
        mark = self._marks.get(token)
        if mark in ("<think>", "<tool_call>") and not self._part:
            parts = self._close(before_mark=mark == "<tool_call>")
            self._open(mark)
            return parts
        if self._part and mark == f"</{self._part[1:]}":
            parts = self._close(before_mark=True)
            self._open("")
            self._drops_newline = True
            self.stopped |= self._one_call and bool(parts.calls)
            return parts
        return self._take(self._text.add(token))

    def finish(self) -> Parts:
        """Return what was held back, when no token follows."""
        return Parts() if self.stopped else self._close(before_mark=False)

    def _open(self, mark: str) -> None:
        self._part, self._drops_newline = mark, bool(mark)
        self._text = TextStream(self._tokenizer, () if mark else self._stop)

    def _close(self, before_mark: bool) -> Parts:
        """End the open part, before a mark or where the answer ends."""
        parts = self._take(self._text.finish())
        held, self._held = self._held, ""
        if self._part == "<tool_call>":
            call = parse_call(held) if before_mark else None
            end = "</tool_call>" if before_mark else ""
            text = f"{self._left_out}<tool_call>{held}{end}"
            parts = Parts(text) if call is None else Parts(calls=[call])
        elif not before_mark and not self.stopped:
            parts.add(Parts(**{self._name: held}))
        self._left_out = held if before_mark else ""
        return parts

    @property
    def _name(self) -> str:
        return "reasoning" if self._part else "content"

    def _take(self, piece: str) -> Parts:
        """Text of the open part, without what is held back."""
        self.stopped |= self._text.stopped
        if self._part == "<tool_call>":  # held until it is whole
            self._held += piece
            return Parts()
        if piece and self._drops_newline:
            self._drops_newline = False
            piece = piece.removeprefix("\n")
        piece = self._held + piece
        self._held = "\n" if self._marks and piece.endswith("\n") and not self.stopped else ""
        return Parts(**{self._name: piece.removesuffix("\n") if self._held else piece})


def parse_call(text: str) -> Call | None:
    """The call that the text of a tool_call block makes; None if it is broken."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not call.keys() <= {"name", "arguments"}:
        return None
    name, arguments = call.get("name"), call.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return Call(name, json.dumps(arguments, ensure_ascii=False))
