"""The two kinds of completion: how their prompts become ids, and their choices JSON."""

import time
import uuid
from collections import defaultdict
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..batcher import Token
from ..chat_model import ChatModel
from .choices import Chunk, Prompt
from .errors import ApiError
from .schema import ChatRequest, CompletionRequest

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
MIN_LOGPROB = -9999.0  # OpenAI's for what cannot be
DEFAULT_COMPLETION = 16  # OpenAI's limit of new tokens if a completion names none


class ChatFormat:
    """Chat completions.

    Args:
        chat_model: the model.
        request: the request.

    Raises:
        ApiError: if the model does not chat, or the request contradicts itself.
    """

    prompt_param = "messages"

    def __init__(self, chat_model: ChatModel, request: ChatRequest):
        if request.top_logprobs and not request.logprobs:
            raise ApiError(400, "'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
        if chat_model.encoder is None:
            message = f"'{request.model}' continues texts; use /v1/completions."
            raise ApiError(400, message, "model")
        self.chat_model = chat_model
        self.request = request
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        self.head = make_head("chatcmpl", kind, request.model)

    def prompts(self) -> list[Prompt]:
        """The prompt."""
        messages = [message.record() for message in self.request.messages]
        return [Prompt(self.chat_model.chat_ids(messages))]

    def max_tokens(self, limit: int) -> int:
        """The most new tokens, by default the server's limit."""
        return self.request.max_completion_tokens or self.request.max_tokens or limit

    def first_delta(self, index: int) -> dict[str, Any] | None:
        """The choice object that a stream begins with."""
        return self._choice(Chunk(index), "delta", {"role": "assistant", "content": ""})

    def delta(self, chunk: Chunk) -> dict[str, Any]:
        """The choice object for a part of a stream."""
        return self._choice(chunk, "delta", {"content": chunk.text} if chunk.text else {})

    def choice(self, whole: Chunk) -> dict[str, Any]:
        """The choice object for a whole choice."""
        message = {"role": "assistant", "content": whole.text, "refusal": None}
        return self._choice(whole, "message", message)

    def _choice(self, chunk: Chunk, key: str, message: dict[str, Any]) -> dict[str, Any]:
        logprobs = None
        if self.request.logprobs:
            eos = self.chat_model.tokenizer.eos_token_id  # no part of the message
            content = [self._logprob(token) for token in chunk.tokens if token.token != eos]
            logprobs = {"content": content, "refusal": None}
        return {
            "index": chunk.index,
            key: message,
            "logprobs": logprobs,
            "finish_reason": chunk.finish_reason,
        }

    def _logprob(self, token: Token) -> dict[str, Any]:
        top = [self._entry(id_, logprob) for id_, logprob in token.top_logprobs]
        return {**self._entry(token.token, token.logprob), "top_logprobs": top}

    def _entry(self, id_: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(self.chat_model.tokenizer, id_)
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}


class CompletionFormat:
    """Completions of texts; methods as those of ChatFormat.

    Args:
        chat_model: the model.
        request: the request.
    """

    prompt_param = "prompt"

    def __init__(self, chat_model: ChatModel, request: CompletionRequest):
        self.chat_model = chat_model
        self.request = request
        self.head = make_head("cmpl", "text_completion", request.model)
        self._bytes: dict[int, bytes] = defaultdict(bytes)  # of each choice's text so far

    def prompts(self) -> list[Prompt]:
        """The prompts. Raises ApiError for ids that the model does not have."""
        return [self._prompt(prompt) for prompt in self.request.prompts()]

    def _prompt(self, prompt: str | list[int]) -> Prompt:
        echo = self.request.echo
        if isinstance(prompt, str):  # its ids begin with the token that begins a document
            return Prompt(self.chat_model.text_ids(prompt), prompt if echo else None, 1)
        vocab_size = self.chat_model.model.config.vocab_size
        if max(prompt) >= vocab_size:
            message = f"Invalid 'prompt': {max(prompt)} is no token; there are {vocab_size}."
            raise ApiError(400, message, "prompt", "invalid_value")
        decode = self.chat_model.tokenizer.backend_tokenizer.decode
        return Prompt(prompt, decode(prompt, skip_special_tokens=True) if echo else None)

    def max_tokens(self, limit: int) -> int:
        """The most new tokens, by default OpenAI's."""
        given = self.request.max_tokens
        return min(DEFAULT_COMPLETION, limit) if given is None else given

    def first_delta(self, index: int) -> dict[str, Any] | None:
        """None: a stream begins with its first text."""
        return None

    def delta(self, chunk: Chunk) -> dict[str, Any]:
        """The choice object for a part of a stream."""
        return {
            "index": chunk.index,
            "text": chunk.text,
            "logprobs": None if self.request.logprobs is None else self._logprobs(chunk),
            "finish_reason": chunk.finish_reason,
        }

    choice = delta

    def _logprobs(self, chunk: Chunk) -> dict[str, Any]:
        return {
            "tokens": [self._text(token.token) for token in chunk.tokens],
            "token_logprobs": [
                None if token.logprob is None else max(token.logprob, MIN_LOGPROB)
                for token in chunk.tokens
            ],
            "top_logprobs": [self._top_logprobs(token) for token in chunk.tokens],
            "text_offset": [self._offset(chunk.index, token.token) for token in chunk.tokens],
        }

    def _offset(self, index: int, id_: int) -> int:
        """Where a choice's next token begins in its text, in characters."""
        text = self._bytes[index].decode("utf-8", "replace")
        decode = self.chat_model.tokenizer.backend_tokenizer.decode
        if not decode([id_], skip_special_tokens=True):  # a control token, in no text
            return len(text)
        raw = token_bytes(self.chat_model.tokenizer, id_)
        self._bytes[index] += raw
        # A token that continues a character begins where the character does.
        return len(text) - (raw[0] & 0xC0 == 0x80 and text.endswith("�"))

    def _text(self, id_: int) -> str:
        return token_bytes(self.chat_model.tokenizer, id_).decode("utf-8", "replace")

    def _top_logprobs(self, token: Token) -> dict[str, float] | None:
        """The log-probabilities of the top tokens and of this one, by their texts."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for id_, logprob in [*token.top_logprobs, (token.token, token.logprob)]:
            # Parts of characters share a text, �: the most likely one stays.
            top.setdefault(self._text(id_), max(logprob, MIN_LOGPROB))
        return top


def token_bytes(tokenizer: PreTrainedTokenizerBase, id_: int) -> bytes:
    """The bytes of the text that a token stands for."""
    name = tokenizer.convert_ids_to_tokens(id_)
    if all(character in BYTE_OF for character in name):
        return bytes(BYTE_OF[character] for character in name)
    return name.encode("utf-8")


def make_head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """The fields that every object of a response begins with."""
    id_ = f"{prefix}-{uuid.uuid4().hex}"
    return {"id": id_, "object": kind, "created": int(time.time()), "model": model}
