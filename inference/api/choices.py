"""The texts that a request asks for: as a stream of chunks, or whole."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from ..batcher import Batcher, Event, GenerationRequest, QueueFull, Token
from ..grammar import Grammar
from ..parts import AnswerParts, Delta
from ..text import TextStream
from .middleware import Limits
from .schema import BaseRequest, CompletionRequest

# Between the seeds of a request's choices: the second of one seed is not the first of the next.
SEED_STEP = 0x9E3779B97F4A7C15


@dataclass
class Prompt:
    """A prompt as ids; and as text for choices to begin with, without its first `n_hidden` ids."""

    ids: list[int]
    echo: str | None = None
    n_hidden: int = 0
    grammar: Grammar | None = None  # of the choices
    thinking: bool = False  # whether it ends within a thought


@dataclass
class Chunk:
    """A part of choice `index`, or all of it: whole characters and their tokens."""

    index: int
    deltas: list[Delta] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None


class Choices:
    """The choices of one request, `n` for each prompt; they end after `limits.max_seconds`.

    `decode` makes what turns the tokens that follow a prompt into the parts of a choice.
    Raises QueueFull if the batcher has not enough room.
    """

    def __init__(
        self,
        batcher: Batcher,
        prompts: Sequence[Prompt],
        request: BaseRequest,
        limits: Limits,
        decode: Callable[[Prompt], AnswerParts | TextStream],
    ):
        self.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        self.completion_tokens = 0  # so far
        self.first_token_time: float | None = None  # `time.perf_counter()`
        self._prompts = [prompt for prompt in prompts for _ in range(request.n or 1)]
        echoes = isinstance(request, CompletionRequest) and request.echo
        self._scores_prompts = bool(echoes) and request.n_logprobs is not None
        self._eos = batcher.chat_model.tokenizer.eos_token_id
        self._streams = [decode(prompt) for prompt in self._prompts]
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        deadline = time.monotonic() + limits.max_seconds
        self._requests = [
            GenerationRequest(
                ids=prompt.ids,
                max_new_tokens=request.max_new_tokens(limits.max_tokens),
                sampling=request.sampling(),
                seed=None if request.seed is None else (request.seed + i * SEED_STEP) % 2**63,
                emit=partial(self._emit, i),
                logprobs=request.n_logprobs,
                prompt_logprobs=self._scores_prompts,
                deadline=deadline,
                constraint=prompt.grammar.constraint() if prompt.grammar else None,
            )
            for i, prompt in enumerate(self._prompts)
        ]
        batcher.submit(self._requests)

    @property
    def usage(self) -> dict[str, int]:
        """The tokens of the request as the API gives them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def _emit(self, index: int, event: Event) -> None:
        """Take an event of choice `index` from the batcher's thread."""
        with suppress(RuntimeError):  # the loop is closed: the server ends
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def stream(self) -> AsyncIterator[Chunk]:
        """Stream the chunks of all choices, and raise an error of one of them.

        It is QueueFull if the time is over before a token is generated or all prompts are scored.
        """
        for index, prompt in enumerate(self._prompts):
            if prompt.echo is not None and not self._scores_prompts:
                yield Chunk(index, as_deltas(prompt.echo))  # a chat's names the role
        running = set(range(len(self._prompts)))
        called: set[int] = set()  # choices that have made a call
        held: list[list[Token]] = [[] for _ in running]  # not yet a whole character
        while running:
            index, event = await self._events.get()
            if index not in running:
                continue
            stream, deltas, reason = self._streams[index], [], None
            began = self.completion_tokens and not self._scores_prompts
            if isinstance(event, list):
                held[index] = event[self._prompts[index].n_hidden :]
                if held[index]:  # the first one is unscored: in the text it has none before it
                    held[index][0] = Token(held[index][0].token)
                deltas = as_deltas(self._prompts[index].echo)
            elif isinstance(event, Token):
                self.first_token_time = self.first_token_time or time.perf_counter()
                self.completion_tokens += event.token != self._eos
                held[index].append(event)
                deltas = as_deltas(stream.add(event.token))
                if stream.stopped:
                    self._requests[index].cancelled = True
                    reason = "stop"
            elif isinstance(event, str):
                deltas, reason = as_deltas(stream.finish()), event
            elif isinstance(event, QueueFull) and began:
                reason = "length"
            else:
                raise event
            if any(delta.kind == "call" for delta in deltas):
                called.add(index)
            if reason == "stop" and index in called:
                reason = "tool_calls"
            if deltas or reason:
                yield Chunk(index, deltas, held[index], reason)
                held[index] = []
            if reason:
                running.remove(index)

    async def collect(self) -> list[Chunk]:
        """Wait for all choices, each as one chunk. Raises the errors of `stream`."""
        choices = [Chunk(index) for index in range(len(self._prompts))]
        async for chunk in self.stream():
            choice = choices[chunk.index]
            choice.deltas += chunk.deltas
            choice.tokens += chunk.tokens
            choice.finish_reason = chunk.finish_reason
        return choices

    def cancel(self) -> None:
        """End the generation of all choices before the next step."""
        for request in self._requests:
            request.cancelled = True


def as_deltas(found: str | list[Delta]) -> list[Delta]:
    """Pieces of an answer; a text is content."""
    if isinstance(found, list):
        return found
    return [Delta("content", found)] if found else []
