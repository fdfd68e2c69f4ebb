"""The two kinds of completion: how their prompts become ids, and their choices JSON."""

import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .. import chat_texts as texts
from ..batcher import Token
from ..chat_model import ChatModel
from ..text import token_bytes
from .choices import Chunk, Prompt
from .errors import ApiError
from .schema import BaseRequest, ChatRequest, CompletionRequest

LOG = logging.getLogger("uvicorn.error")


class Format:
    """What the kinds of completion share: the fields of their objects, and the texts of tokens."""

    def __init__(self, chat_model: ChatModel, request: BaseRequest, kind: str, prefix: str):
        self.chat_model = chat_model
        self.request = request
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": request.model,
        }

    def body(self, chunks: Sequence[Chunk], **more: Any) -> dict[str, Any]:
        """A response, or an event of a stream, with more fields."""
        choices = [
            {
                "index": chunk.index,
                **self._content(chunk),
                "logprobs": None if self.request.n_logprobs is None else self._logprobs(chunk),
                "finish_reason": chunk.finish_reason,
            }
            for chunk in chunks
        ]
        return {**self._head, "choices": choices, **more}

    def token_bytes(self, id_: int) -> bytes:
        """The bytes of the text that a token stands for."""
        return token_bytes(self.chat_model.tokenizer, id_)

    def token_text(self, id_: int) -> str:
        """The text that a token stands for; what is no whole character becomes �."""
        return self.token_bytes(id_).decode("utf-8", "replace")


class ChatFormat(Format):
    """Chat completions. Raises ApiError if the model does not chat or `logprobs` is missing."""

    prompt_param = "messages"
    request: ChatRequest

    def __init__(self, chat_model: ChatModel, request: ChatRequest):
        if request.top_logprobs and not request.logprobs:
            raise ApiError(400, "'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
        if chat_model.encoder is None:
            message = f"'{request.model}' continues texts; use /v1/completions."
            raise ApiError(400, message, "model")
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        super().__init__(chat_model, request, kind, "chatcmpl")
        self._begun: set[int] = set()  # choices of which a stream has named the role

    def prompts(self) -> list[Prompt]:
        """The conversation; a stream of the answer begins with an event of its role alone."""
        messages = [message.record() for message in self.request.messages]
        messages = self.chat_model.recent(messages, self._note_left_out)
        return [Prompt(self.chat_model.chat_ids(messages), echo="")]

    def _note_left_out(self, kept: int) -> None:
        LOG.warning(f"{self.chat_model.name}: {texts.LEFT_OUT.format(count=kept)}")

    def _content(self, chunk: Chunk) -> dict[str, Any]:
        if not self.request.stream:
            return {"message": {"role": "assistant", "content": chunk.text, "refusal": None}}
        delta = {"content": chunk.text} if chunk.text else {}
        if chunk.index not in self._begun:
            self._begun.add(chunk.index)
            delta = {"role": "assistant", "content": chunk.text}
        return {"delta": delta}

    def _logprobs(self, chunk: Chunk) -> dict[str, Any]:
        eos = self.chat_model.tokenizer.eos_token_id  # no part of the message
        content = [self._logprob(token) for token in chunk.tokens if token.token != eos]
        return {"content": content, "refusal": None}

    def _logprob(self, token: Token) -> dict[str, Any]:
        own, *top = (
            {"token": self.token_text(id_), "logprob": p, "bytes": list(self.token_bytes(id_))}
            for id_, p in [(token.token, token.logprob), *token.top_logprobs]
        )
        return {**own, "top_logprobs": top}


class CompletionFormat(Format):
    """Completions of texts."""

    prompt_param = "prompt"
    request: CompletionRequest

    def __init__(self, chat_model: ChatModel, request: CompletionRequest):
        super().__init__(chat_model, request, "text_completion", "cmpl")
        self._decode = chat_model.tokenizer.backend_tokenizer.decode
        self._bytes: dict[int, bytes] = defaultdict(bytes)  # of each choice's text so far

    def prompts(self) -> list[Prompt]:
        """The texts; raises ApiError for ids that the model does not have."""
        return [self._prompt(prompt) for prompt in self.request.prompts()]

    def _prompt(self, prompt: str | list[int]) -> Prompt:
        echo = self.request.echo
        if isinstance(prompt, str):  # its ids begin with the token that begins a document
            return Prompt(self.chat_model.text_ids(prompt), prompt if echo else None, 1)
        vocab_size = self.chat_model.model.config.vocab_size
        if max(prompt) >= vocab_size:
            message = f"Invalid 'prompt': {max(prompt)} is no token; there are {vocab_size}."
            raise ApiError(400, message, "prompt", "invalid_value")
        return Prompt(prompt, self._decode(prompt, skip_special_tokens=True) if echo else None)

    def _content(self, chunk: Chunk) -> dict[str, Any]:
        return {"text": chunk.text}

    def _logprobs(self, chunk: Chunk) -> dict[str, Any]:
        return {
            "tokens": [self.token_text(token.token) for token in chunk.tokens],
            "token_logprobs": [token.logprob for token in chunk.tokens],
            "top_logprobs": [self._top_logprobs(token) for token in chunk.tokens],
            "text_offset": [self._offset(chunk.index, token.token) for token in chunk.tokens],
        }

    def _offset(self, index: int, id_: int) -> int:
        """Where a choice's next token begins in its text, in characters."""
        text = self._bytes[index].decode("utf-8", "replace")
        if not self._decode([id_], skip_special_tokens=True):  # a control token, in no text
            return len(text)
        raw = self.token_bytes(id_)
        self._bytes[index] += raw
        # A token that continues a character begins where the character does.
        return len(text) - (raw[0] & 0xC0 == 0x80 and text.endswith("�"))

    def _top_logprobs(self, token: Token) -> dict[str, float] | None:
        """The log-probabilities of the top tokens and of this one, by their texts."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for id_, logprob in [*token.top_logprobs, (token.token, token.logprob)]:
            # Parts of characters share a text, �: the most likely one stays.
            top.setdefault(self.token_text(id_), logprob)
        return top
