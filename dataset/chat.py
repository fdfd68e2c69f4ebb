"""A conversation as token ids, and what the model must learn of it.

The text is the one that the tokenizer's chat template renders. But there it becomes one string, in
which a `</s>` that somebody typed looks like one that ends a message. Here it stays in pieces:
control tokens come from the structure alone, and all else is encoded as ordinary text.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import TemplateError

from common import UserError

from .fields import RecordError
from .messages import is_empty_answer
from .reader import Record
from .records import DEFAULT, RecordOptions, parse_chat
from .text import TextTokenizer
from .token_store import ROLES, Encoded, Parsed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 5  # of the ids, their messages, and the tables that dataset.turns derives

_BEFORE_TOOLS = "You can call these tools, described by one JSON schema per line:\n"
_AFTER_TOOLS = (
    'To call one, put a JSON object with its "name" and "arguments" in a tool_call block; '
    "an answer may contain several."
)


class Piece(NamedTuple):
    """A part of a rendered conversation: a control token, or text that is never one."""

    text: str
    is_control: bool
    weight: float = 0.0  # of each of its ids as a target
    role: str = ""  # of the message that begins with this piece; empty within a message


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
) -> list[Piece]:
    """What the chat template renders of messages as in a `ParsedChat`, in pieces.

    The targets are all that follows the header of an assistant message, `</s>` included, but an
    empty thought: it is for a prompt to say that none is wanted. `add_generation_prompt` adds the
    header of the assistant's next message, and `enable_thinking` to that the beginning of a thought
    (True) or an empty one (False).
    """
    messages = list(messages)
    if tools:
        schemas = "".join(f"{_to_json(tool)}\n" for tool in tools)
        tools_text = f"{_BEFORE_TOOLS}{schemas}{_AFTER_TOOLS}"
        if messages and messages[0]["role"] == "system":
            content = messages.pop(0)["content"]
            tools_text = f"{content}\n\n{tools_text}" if content else tools_text
        messages.insert(0, {"role": "system", "content": tools_text})
    pieces = []
    for message in messages:
        role, content, weight = message["role"], message["content"], 0.0
        pieces += _header(role)
        if role == "assistant":
            weight = message.get("weight", 1.0)
            pieces += _answer(message, weight)
        elif role == "tool":
            pieces += _block("tool_response", content, weight)
        else:
            pieces.append(Piece(content, False, weight))
        pieces += [Piece("</s>", True, weight), Piece("\n", False)]
    if add_generation_prompt:
        pieces += _header("assistant")
        if enable_thinking:
            pieces += [Piece("<think>", True), Piece("\n", False)]
        elif enable_thinking is not None:
            pieces += [*_block("think", "", 0.0), Piece("\n", False)]
    return pieces


def _header(role: str) -> list[Piece]:
    return [Piece("<s>", True, role=role), Piece(f"{role}\n", False)]


def _block(name: str, text: str, weight: float) -> list[Piece]:
    """Text between the two control tokens of that name."""
    return [
        Piece(f"<{name}>", True, weight),
        Piece(f"\n{text}\n", False, weight),
        Piece(f"</{name}>", True, weight),
    ]


def _answer(message: Mapping[str, Any], weight: float) -> list[Piece]:
    """Reasoning, content and calls of an assistant message."""
    content, pieces, reasoning = message["content"], [], message.get("reasoning_content")
    if reasoning:
        pieces += _block("think", reasoning, weight)
        content = f"\n{content}"
    elif reasoning is not None:
        pieces += [*_block("think", "", 0.0), Piece("\n", False)]
    pieces.append(Piece(content, False, weight))
    for number, call in enumerate(message.get("tool_calls", ())):
        arguments = call["arguments"]
        if not isinstance(arguments, str):
            arguments = _to_json(arguments)
        if message["content"] or number:
            pieces.append(Piece("\n", False, weight))
        call_text = f'{{"name": {_to_json(call["name"])}, "arguments": {arguments}}}'
        pieces += _block("tool_call", call_text, weight)
    return pieces


def _to_json(value: Any) -> str:
    """As the `tojson` of chat templates. Raises RecordError."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise RecordError("nested too deeply") from None


class ChatEncoder(TextTokenizer):
    """Encodes conversations: ids, the weight of each as a target, and where the messages begin.

    The ids are those of the tokenizer's chat template wherever a newline is a token of its own and
    no text has the characters of a control token. UserError if the tokenizer lacks `<s>` or `</s>`,
    or its template renders another format.
    """

    is_chat = True
    counted: tuple[str, ...] = (
        *("empty_answers", "unanswered_turns"),
        *("joined_messages", "leading_answers", "inline_thoughts"),
    )

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", options: RecordOptions = DEFAULT
    ) -> None:
        super().__init__(tokenizer)
        self.options = options
        for token in ("<s>", "</s>"):
            if token not in self.special:
                raise UserError(
                    f"--tokenizer_path: this tokenizer lacks {token} as a special token"
                )
        _check_template(tokenizer)
        self.end_think = self.special.get("</think>", -1)  # -1 if there is none
        header, newline = self.encode_batch(["assistant\n", "\n"])
        # Ids of an assistant message before its content, and after the `</s>` of any message.
        self.header_length, self.newline_length = 1 + len(header), len(newline)
        self.key = f"chat {FORMAT_VERSION} {self.hash}{options.key}"

    def parse(self, record: Record) -> Parsed:
        """The pieces of the conversation of a record, and counts. Raises RecordError.

        Counted are empty answers, which are not learnt, a last turn without an answer, and what
        `parse_messages` counts.
        """
        counts: Counter[str] = Counter()
        messages, tools = parse_chat(record, self.options, counts)
        for message in messages:
            if is_empty_answer(message) and message.get("weight", 1) > 0:
                message["weight"] = 0.0
                counts["empty_answers"] += 1
        pieces = self.check_control(render_chat(messages, tools))
        counts["unanswered_turns"] = int(messages[-1]["role"] != "assistant")
        return pieces, tuple(counts[name] for name in self.counted)

    def check_control(self, pieces: list[Piece]) -> list[Piece]:
        """The same pieces. Raises RecordError if they need a token that the tokenizer lacks."""
        for piece in pieces:
            if piece.is_control and piece.text not in self.special:
                raise RecordError(f"needs the control token {piece.text}; this tokenizer has none")
        return pieces

    def encode(self, records: Sequence[Sequence[Piece]]) -> Encoded:
        """Encode conversations, each the pieces that `render_chat` gives."""
        pieces = list(chain.from_iterable(records))
        texts = list({piece.text: None for piece in pieces if not piece.is_control})
        ids_of_text = dict(zip(texts, self.encode_batch(texts), strict=True))
        ids_of_control = {t: np.array([id_], self.dtype) for t, id_ in self.special.items()}
        parts = [(ids_of_control if p.is_control else ids_of_text)[p.text] for p in pieces]
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        weights = np.array([piece.weight for piece in pieces], dtype=np.float32)
        begins = np.append(0, np.cumsum(lengths))  # of each piece, and the end
        records_begin = np.append(0, np.cumsum([len(r) for r in records], dtype=np.int64))
        headers = [i for i, piece in enumerate(pieces) if piece.role]
        return Encoded(
            ids=np.concatenate([np.empty(0, dtype=self.dtype), *parts]),
            lengths=np.diff(begins[records_begin]),
            weights=np.repeat(weights, lengths),
            messages=begins[np.array(headers, dtype=np.int64)],
            roles=np.array([ROLES.index(pieces[i].role) for i in headers], dtype=np.uint8),
        )


def _check_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise UserError unless the tokenizer's chat template renders what `render_chat` does."""
    call = {"name": "f", "arguments": {"x": ["1", None]}}
    messages = [
        {"role": "system", "content": " Be kind.\n"},
        {"role": "user", "content": "\nHi "},
        {"role": "assistant", "content": "Hello", "tool_calls": [call, call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": " Bye\n", "reasoning_content": "hm"},
        {"role": "user", "content": ""},
    ]
    for tools in ([{"name": "f"}], []):
        pieces = render_chat(messages, tools, add_generation_prompt=True)
        try:
            theirs = tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"--tokenizer_path: its chat template fails ({error})") from None
        if theirs != "".join(piece.text for piece in pieces):
            raise UserError("--tokenizer_path: its chat template is not the one of this project")
