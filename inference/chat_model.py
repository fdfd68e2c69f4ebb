"""A model to talk to: weights, tokenizer, decoder, and the way from messages to ids to text."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from common import UserError
from dataset import ChatEncoder, fit_prompt, render_chat
from model import Decoder, MiniMindLM, Tokenizer, TorchDecoder

from .parts import AnswerParts, Delta, parse_answer
from .text import TextStream


@dataclass(eq=False)
class ChatModel:
    """A model with its tokenizer, and a decoder for `rows` sequences at a time.

    The model is in eval mode and on its device. One that does not chat continues texts, and has no
    encoder. `engine` computes the tokens: "torch", "onnx" (ONNX Runtime), "int8" (there, with 8-bit
    weights), or None for ONNX Runtime where it can and else PyTorch. Raises UserError if ONNX
    Runtime is asked for and cannot.
    """

    name: str
    model: MiniMindLM
    tokenizer: Tokenizer
    chats: bool
    engine: str | None = None
    rows: int = 1
    longest_conversation: Mapping[str, int] | None = None  # that it was trained on; `read_about`
    examples: Sequence[str] = ()  # questions to offer
    history_cnt: int | None = field(init=False, default=None)  # see `recent`
    _has_told: bool = field(init=False, default=False)  # that something was left out

    def __post_init__(self) -> None:
        self.history_cnt = earlier_exchanges(self.longest_conversation)
        self.encoder = ChatEncoder(self.tokenizer) if self.chats else None
        self.decoder = make_decoder(self.model, self.engine, self.rows)

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.model.config.max_seq_len

    def text_ids(self, text: str) -> list[int]:
        """Ids of the beginning of a document."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return [self.tokenizer.bos_token_id, *ids["input_ids"]]

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        room: int | None = None,
        enable_thinking: bool | None = None,
    ) -> list[int]:
        """Ids of a conversation, up to where the assistant's next answer begins, or its thought.

        A model that continues texts gets the last message alone. To leave `room` tokens for the
        answer, at most half of the context, the oldest exchanges are dropped; the system message,
        the tools (JSON schemas) and the last exchange stay. Raises RecordError if a control token
        is needed that the tokenizer lacks.
        """
        if self.encoder is None:
            return self.text_ids(messages[-1]["content"])
        pieces = render_chat(messages, tools, True, enable_thinking)
        prompt = self.encoder.encode([self.encoder.check_control(pieces)])
        if room is None:
            return prompt.ids.tolist()
        return fit_prompt(prompt, self.context - min(room, self.context // 2)).tolist()

    def recent(
        self, messages: Sequence[Mapping[str, Any]], tell: Callable[[int], object]
    ) -> Sequence[Mapping[str, Any]]:
        """The messages without the exchanges before the last `history_cnt` and the question.

        Models answer worse after more exchanges than they were trained on, so it is by default
        `earlier_exchanges` of their longest conversation; None keeps all. A system message stays.
        The first time that something is left out, `tell` gets how many exchanges stay.
        """
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if self.history_cnt is None or len(users) <= self.history_cnt + 1:
            return messages
        if not self._has_told:
            self._has_told = True
            tell(self.history_cnt)
        return [*messages[: users[0]], *messages[users[-1 - self.history_cnt] :]]

    def stream(
        self,
        ids: Sequence[int],
        generator: torch.Generator,
        new_tokens: list[int],
        enable_thinking: bool | None = None,
        **options: Any,
    ) -> Iterator[Delta]:
        """Generate after a prompt, and yield the parts; options and errors as of `generate`.

        `enable_thinking` is the prompt's. `new_tokens` gets the tokens; the last one is the end
        token unless the text was cut.
        """
        tokens = self.model.generate(
            torch.tensor([ids], device=self.decoder.device),
            eos_token_id=self.tokenizer.eos_token_id,
            generator=generator,
            stream=True,
            decoder=self.decoder,
            **options,
        )

        def noted() -> Iterator[int]:
            for token in tokens:
                new_tokens.append(token.item())
                yield new_tokens[-1]

        yield from self.parse(noted(), enable_thinking)

    def parse(self, tokens: Iterable[int], enable_thinking: bool | None = None) -> Iterator[Delta]:
        """The parts that tokens after a prompt make; of a model that does not chat, content."""
        if self.chats:
            yield from AnswerParts(self.tokenizer, bool(enable_thinking)).parse(tokens)
        else:
            for text in TextStream(self.tokenizer).decode(tokens):
                yield Delta("content", text)

    def message(self, tokens: Iterable[int], enable_thinking: bool | None = None) -> dict[str, Any]:
        """The assistant's message that tokens after a prompt make."""
        if self.chats:
            return parse_answer(self.tokenizer, tokens, enable_thinking)
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return {"role": "assistant", "content": text}


def earlier_exchanges(longest: Mapping[str, int] | None) -> int | None:
    """The exchanges before the last question of a longest conversation; None if there is none.

    `longest` is a model's `longest_conversation`, see `read_about`.
    """
    return max(longest["exchanges"] - 1, 0) if longest else None


def make_decoder(model: MiniMindLM, engine: str | None, rows: int) -> Decoder:
    """The decoder that computes a model's tokens; `engine` and errors as of ChatModel."""
    if engine == "torch":
        return TorchDecoder(model, rows)
    try:
        if model.device.type != "cpu":
            raise ValueError("on a CPU only; add --device cpu")
        from model.onnx_decoder import OnnxDecoder  # slow to import, and may not be installed

        return OnnxDecoder(model, rows, bits=8 if engine == "int8" else 32)
    except ImportError as error:
        reason = f"needs {error.name}: pip install -r scripts/requirements.txt"
    except ValueError as error:
        reason = str(error)
    if engine is None:
        return TorchDecoder(model, rows)
    flag = "--quantize int8" if engine == "int8" else "--engine onnx"
    raise UserError(f"{flag}: {reason}")
