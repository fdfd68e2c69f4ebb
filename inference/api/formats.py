"""How texts are told by each of the two kinds of request."""

import time
import uuid
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..batcher import Token
from ..talker import Talker
from .schema import ChatRequest, CompletionRequest

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
LEAST = -9999.0  # OpenAI's logprob of what cannot be


def token_text(talker: Talker, token: int) -> tuple[str, list[int]]:
    """A token as text (with � for parts of characters) and as bytes."""
    name = talker.tokenizer.convert_ids_to_tokens(token)
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
        talker: whose tokens are told.
        request: what was asked for.
    """

    def __init__(self, talker: Talker, request: ChatRequest):
        self.talker = talker
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
            told = {"content": [self._token(t) for t in tokens], "refusal": None}
        return {
            "index": index,
            kind: said,
            "logprobs": told,
            "finish_reason": ending,
        }

    def _token(self, token: Token) -> dict[str, Any]:
        likeliest = [self._entry(number, logprob) for number, logprob in token.likeliest]
        return {**self._entry(token.token, token.logprob), "top_logprobs": likeliest}

    def _entry(self, number: int, logprob: float) -> dict[str, Any]:
        text, raw = token_text(self.talker, number)
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": raw}


class CompletionFormat:
    """/v1/completions.

    Args:
        talker: whose tokens are told.
        request: what was asked for.
    """

    def __init__(self, talker: Talker, request: CompletionRequest):
        self.talker = talker
        self.logprobs = request.logprobs is not None
        repeated = [text for text in request.prompts() for _ in range(request.n or 1)]
        self.echoed = [text if request.echo else "" for text in repeated]
        self.ends = [len(text) for text in self.echoed]  # of each text, as far as it was told
        self.head = make_head("cmpl", "text_completion", request.model)

    def opening(self, number: int) -> list[dict[str, Any]]:
        """What a stream of so many texts begins with."""
        return [self.chunk(i, text, [], None) for i, text in enumerate(self.echoed) if text]

    def chunk(
        self, index: int, text: str, tokens: Sequence[Token], ending: str | None
    ) -> dict[str, Any]:
        """A piece of a stream."""
        told = self._tokens(index, tokens) if self.logprobs else None
        return {"index": index, "text": text, "logprobs": told, "finish_reason": ending}

    def whole(self, index: int, text: str, tokens: Sequence[Token], ending: str) -> dict[str, Any]:
        """A text that is not streamed."""
        return self.chunk(index, self.echoed[index] + text, tokens, ending)

    def _tokens(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        texts = [token_text(self.talker, token.token)[0] for token in tokens]
        *offsets, self.ends[index] = accumulate(map(len, texts), initial=self.ends[index])
        return {
            "tokens": texts,
            "token_logprobs": [max(token.logprob, LEAST) for token in tokens],
            "top_logprobs": [
                {token_text(self.talker, n)[0]: max(p, LEAST) for n, p in token.likeliest}
                for token in tokens
            ],
            "text_offset": offsets,
        }
