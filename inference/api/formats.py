"""The two kinds of completion: how their prompts become ids, and their choices JSON."""

import logging
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from dataset import RecordError
from model import Tokenizer

from .. import chat_texts as texts
from ..batcher import Token
from ..chat_model import ChatModel
from ..grammar import COMPACT, Grammar, GrammarError, answer_grammar, calls_rule, json_rule
from ..parts import AnswerParts, Delta
from ..text import TextStream, token_bytes
from .choices import Chunk, Prompt
from .errors import ApiError
from .schema import BaseRequest, ChatRequest, CompletionRequest, Function, NamedTool

LOG = logging.getLogger("uvicorn.error")


def thought_of(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Whether a prompt ends within a thought ("open"), after one ("closed"), or with "none"."""
    answer = ids[len(ids) - 1 - ids[::-1].index(tokenizer.bos_token_id) :]
    begin, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    if end in answer:
        return "closed"
    return "open" if begin in answer else "none"


class OneCall(AnswerParts):
    """An answer that ends after its first call."""

    _has_called = False

    @property
    def stopped(self) -> bool:
        """Whether the answer has ended, also before a stop string."""
        return self._has_called or super().stopped

    def add(self, token: int) -> list[Delta]:
        """Add a token, and return what it makes certain; nothing once the answer has ended."""
        found = super().add(token)
        self._has_called |= any(delta.kind == "call" for delta in found)
        return found


class Format:
    """What the kinds of completion share: the fields of their objects, and the texts of tokens."""

    def __init__(self, chat_model: ChatModel, request: BaseRequest, kind: str, prefix: str):
        self.chat_model = chat_model
        self.request = request
        vocab_size = chat_model.model.config.vocab_size
        for token in request.logit_bias or {}:
            if int(token) >= vocab_size:
                message = f"Invalid 'logit_bias': {token} is no token; there are {vocab_size}."
                raise ApiError(400, message, "logit_bias", "invalid_value")
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
        self._n_calls: Counter[int] = Counter()  # of each choice so far

    def prompts(self) -> list[Prompt]:
        """The conversation; a stream of the answer begins with an event of its role alone.

        Raises ApiError for what the model, its tokenizer or its grammars cannot do.
        """
        request, chat_model = self.request, self.chat_model
        functions = self._functions()
        tools = [tool.record() for tool in request.tools or () if request.tool_choice != "none"]
        messages = [message.record() for message in request.messages]
        messages = chat_model.recent(messages, self._note_left_out)
        kwargs = request.chat_template_kwargs
        thinking = kwargs.enable_thinking if kwargs else None
        try:
            ids = chat_model.chat_ids(messages, tools, enable_thinking=thinking)
        except RecordError as error:
            raise ApiError(400, f"Invalid 'messages': {error}.", "messages") from None
        thought = thought_of(ids, chat_model.tokenizer)
        return [
            Prompt(ids, "", grammar=self._grammar(functions, thought), thinking=thought == "open")
        ]

    def decode(self, prompt: Prompt) -> AnswerParts:
        """What turns the tokens of a choice into its parts."""
        make = OneCall if self.request.parallel_tool_calls is False else AnswerParts
        return make(self.chat_model.tokenizer, prompt.thinking, self.request.stop_strings())

    def _functions(self) -> list[Function]:
        """The functions of which one must be called, if any. Raises ApiError."""
        choice = self.request.tool_choice
        functions = [tool.function for tool in self.request.tools or ()]
        if isinstance(choice, NamedTool):
            functions = [one for one in functions if one.name == choice.function.name]
        elif choice != "required":
            return []
        if not functions:
            message = "'tool_choice' asks for a call of what is not among the 'tools'."
            raise ApiError(400, message, "tool_choice", "invalid_value")
        return functions

    def _grammar(self, functions: Sequence[Function], thought: str) -> Grammar | None:
        """The form that an answer must have. Raises ApiError if it cannot be enforced."""
        form, param = self.request.response_format, "response_format"
        try:
            if functions:
                several = self.request.tool_choice == "required"  # a named one is called once
                several = several and self.request.parallel_tool_calls is not False
                param = "tools"
                rule = calls_rule([one.model_dump() for one in functions], several)
            elif form is None or form.type == "text":
                return None
            elif form.json_schema is None:
                rule = json_rule({"type": "object"}, COMPACT, strict=True)
            else:
                schema = form.json_schema
                rule = json_rule(schema.schema_, COMPACT, bool(schema.strict))
            return answer_grammar(self.chat_model.grammar_tokenizer, rule, thought)
        except GrammarError as error:
            raise ApiError(400, f"Invalid '{param}': {error}.", param, "invalid_value") from None

    def _note_left_out(self, kept: int) -> None:
        LOG.warning(f"{self.chat_model.name}: {texts.LEFT_OUT.format(count=kept)}")

    def _content(self, chunk: Chunk) -> dict[str, Any]:
        deltas, calls = chunk.deltas, [delta for delta in chunk.deltas if delta.kind == "call"]
        content = "".join(delta.text for delta in deltas if delta.kind in ("content", "broken"))
        more: dict[str, Any] = {}
        if reasoning := "".join(delta.text for delta in deltas if delta.kind == "reasoning"):
            more["reasoning_content"] = reasoning
        if calls:
            more["tool_calls"] = [self._call(chunk.index, call) for call in calls]
        if not self.request.stream:
            text = content or (None if calls else "")
            return {"message": {"role": "assistant", "content": text, "refusal": None, **more}}
        if chunk.index not in self._begun:
            self._begun.add(chunk.index)
            return {"delta": {"role": "assistant", "content": content, **more}}
        return {"delta": {"content": content, **more} if content else more}

    def _call(self, index: int, call: Delta) -> dict[str, Any]:
        """A choice's next call; in a stream it comes whole."""
        function = {"name": call.name, "arguments": call.text}
        body = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        if self.request.stream:
            body["index"] = self._n_calls[index]
        self._n_calls[index] += 1
        return body

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

    def decode(self, prompt: Prompt) -> TextStream:
        """What turns the tokens of a choice into text."""
        return TextStream(self.chat_model.tokenizer, self.request.stop_strings())

    def _content(self, chunk: Chunk) -> dict[str, Any]:
        return {"text": "".join(delta.text for delta in chunk.deltas)}

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
