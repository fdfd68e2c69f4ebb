"""How texts are told by each of the two kinds of request."""

import codecs
import time
import uuid
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..batcher import Token
from ..chat_model import ChatModel
from .schema import ChatRequest, CompletionRequest

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
LEAST = -9999.0  # OpenAI's logprob of what cannot be


def token_text(chat_model: ChatModel, token: int) -> tuple[str, list[int]]:
    """A token as text (with � for parts of characters) and as bytes."""
    name = chat_model.tokenizer.convert_ids_to_tokens(token)
    if all(character in BYTE_OF for character in name):
        raw = bytes(BYTE_OF[character] for character in name)
        return raw.decode("utf-8", "replace"), list(raw)
    return name, list(name.encode("utf-8"))


def make_head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """What every object of an answer begins with."""
    name = f"{prefix}-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


class ChatFormat:
    """/v1/chat/completions.

    Args:
        chat_model: whose tokens are told.
        request: what was asked for.
    """

    def __init__(self, chat_model: ChatModel, request: ChatRequest):
        self.chat_model = chat_model
        self.logprobs = bool(request.logprobs)
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        self.head = make_head("chatcmpl", kind, request.model)

    def opening(self, number: int) -> list[dict[str, Any]]:
        """What a stream of so many texts begins with."""
        delta = {"role": "assistant", "content": ""}
        return [self._choice(i, "delta", delta, [], None) for i in range(number)]

    def chunk(
        self, index: int, text: str, tokens: Sequence[Token], ending: str | None
    ) -> dict[str, Any]:
        """A piece of a stream."""
        return self._choice(index, "delta", {"content": text} if text else {}, tokens, ending)

    def whole(self, index: int, text: str, tokens: Sequence[Token], ending: str) -> dict[str, Any]:
        """A text that is not streamed."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._choice(index, "message", message, tokens, ending)

    def _choice(
        self, index: int, kind: str, said: Any, tokens: Sequence[Token], ending: str | None
    ) -> dict[str, Any]:
        told = None
        if self.logprobs:
            end = self.chat_model.tokenizer.eos_token_id  # no part of the message
            written = [self._token(token) for token in tokens if token.token != end]
            told = {"content": written, "refusal": None}
        return {
            "index": index,
            kind: said,
            "logprobs": told,
            "finish_reason": ending,
        }

    def _token(self, token: Token) -> dict[str, Any]:
        top = [self._entry(number, logprob) for number, logprob in token.top_logprobs]
        return {**self._entry(token.token, token.logprob), "top_logprobs": top}

    def _entry(self, number: int, logprob: float) -> dict[str, Any]:
        text, raw = token_text(self.chat_model, number)
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": raw}


class CompletionFormat:
    """/v1/completions.

    Args:
        chat_model: whose tokens are told.
        request: what was asked for.
    """

    def __init__(self, chat_model: ChatModel, request: CompletionRequest):
        self.chat_model = chat_model
        self.logprobs = request.logprobs is not None
        self.head = make_head("cmpl", "text_completion", request.model)
        self._offsets: dict[int, TextOffsets] = {}  # of each text's tokens

    def opening(self, number: int) -> list[dict[str, Any]]:
        """What a stream of so many texts begins with."""
        return []

    def chunk(
        self, index: int, text: str, tokens: Sequence[Token], ending: str | None
    ) -> dict[str, Any]:
        """A piece of a stream."""
        told = self._tokens(index, tokens) if self.logprobs else None
        return {"index": index, "text": text, "logprobs": told, "finish_reason": ending}

    def whole(self, index: int, text: str, tokens: Sequence[Token], ending: str) -> dict[str, Any]:
        """A text that is not streamed."""
        return self.chunk(index, text, tokens, ending)

    def _tokens(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        if index not in self._offsets:
            self._offsets[index] = TextOffsets(self.chat_model.tokenizer)
        told = [(token, *token_text(self.chat_model, token.token)) for token in tokens]
        return {
            "tokens": [text for _, text, _ in told],
            "token_logprobs": [
                None if token.logprob is None else max(token.logprob, LEAST) for token in tokens
            ],
            "top_logprobs": [self._likeliest(token) for token in tokens],
            "text_offset": [self._offsets[index].add(token.token, raw) for token, _, raw in told],
        }

    def _likeliest(self, token: Token) -> dict[str, float] | None:
        """The likeliest tokens and the one that is there, by their texts."""
        if token.logprob is None:
            return None
        told: dict[str, float] = {}
        for number, logprob in [*token.top_logprobs, (token.token, token.logprob)]:
            # Parts of characters share a text, �: that of the likeliest stays.
            told.setdefault(token_text(self.chat_model, number)[0], max(logprob, LEAST))
        return told


class TextOffsets:
    """Where the tokens of a text begin in it, in characters.

    Args:
        tokenizer: of the tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        added = tokenizer.added_tokens_decoder
        self._special = {number for number, token in added.items() if token.special}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0  # that are whole

    def add(self, token: int, raw: Sequence[int]) -> int:
        """Where the next token begins, of these bytes: a part of a character, where that does."""
        if token in self._special:  # no text holds it
            return self._characters
        is_part = bool(raw) and raw[0] & 0xC0 == 0x80
        if not is_part:  # what came before it stays a part of a character: a � of its own
            self._characters += len(self._decoder.decode(b"", final=True))
        begin = self._characters
        self._characters += len(self._decoder.decode(bytes(raw)))
        return begin
