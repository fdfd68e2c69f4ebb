"""The texts that a request asked for, as they are written."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from ..batcher import Batcher, Event, GenerationRequest, QueueFull, Token
from ..text import TextStream
from .schema import Request

# Between the seeds of a request's texts: the second of one seed is not the first of the next.
SEED_STEP = 0x9E3779B97F4A7C15


class Piece(NamedTuple):
    """A further piece of text `index`: the tokens that it is of; at the end how it ended."""

    index: int
    text: str
    tokens: list[Token]
    ending: str | None


class Echo(NamedTuple):
    """What texts begin with: their prompt, of which it leaves out the tokens before `start`."""

    text: str
    start: int


class Choices:
    """The texts of one request.

    Args:
        batcher: writes them.
        prompts: ids of each; as many texts go on from it as the request says.
        request: how.
        limit: new tokens of each.
        seconds: until they end.
        logprobs: as of GenerationRequest.
        echoes: what the texts of each prompt begin with; with `logprobs`, those of its tokens are
            told too. None: the texts begin with what is new.

    Attributes:
        number: of texts.
        prompt_tokens: of all prompts, each counted once.
        written: tokens so far, of all texts.

    Raises:
        QueueFull, Closed: as `Batcher.submit`.
    """

    def __init__(
        self,
        batcher: Batcher,
        prompts: Sequence[Sequence[int]],
        request: Request,
        limit: int,
        seconds: float,
        logprobs: int | None,
        echoes: Sequence[Echo] | None = None,
    ):
        repeated = [ids for ids in prompts for _ in range(request.n or 1)]
        self.number = len(repeated)
        self.prompt_tokens = sum(map(len, prompts))
        self.written = 0
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._echoes = [echo for echo in echoes or () for _ in range(request.n or 1)]
        self._scores = echoes is not None and logprobs is not None
        self._end = batcher.chat_model.tokenizer.eos_token_id
        deadline = time.monotonic() + seconds
        self._jobs = [
            GenerationRequest(
                ids=ids,
                max_new_tokens=limit,
                sampling=request.sampling(),
                seed=None if request.seed is None else (request.seed + i * SEED_STEP) % 2**63,
                emit=partial(self._tell, i),
                logprobs=logprobs,
                prompt_logprobs=self._scores,
                deadline=deadline,
            )
            for i, ids in enumerate(repeated)
        ]
        self._texts = [TextStream(batcher.chat_model.tokenizer, request.stops()) for _ in repeated]
        batcher.submit(self._jobs)

    def _tell(self, index: int, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server ends
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def pieces(self) -> AsyncIterator[Piece]:
        """All pieces of all texts. However this ends, their places are free within one step.

        Raises:
            QueueFull: if none of them had a place before its time was over; if one of them had
                none, where the prompts' log-probabilities are told: there is no part of these.
            Exception: what went wrong with one of them.
        """
        going = set(range(len(self._jobs)))
        unscored = set(going) if self._scores else set()
        late: dict[int, QueueFull] = {}
        try:
            if not self._scores:
                for index, echo in enumerate(self._echoes):
                    yield Piece(index, echo.text, [], None)
            while going:
                index, event = await self._events.get()
                if index not in going:
                    continue
                text = self._texts[index]
                if event == "length" and index in unscored:  # its time was over
                    event = QueueFull(1.0)
                if isinstance(event, QueueFull):
                    if self._scores:
                        raise event
                    going.remove(index)
                    late[index] = event
                    continue
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, str):
                    going.remove(index)
                    yield Piece(index, text.finish(), [], event)
                    continue
                if isinstance(event, list):
                    unscored.remove(index)
                    echo = self._echoes[index]
                    tokens = event[echo.start :]
                    tokens[:1] = [Token(token.token) for token in tokens[:1]]  # nothing before it
                    yield Piece(index, echo.text, tokens, None)
                    continue
                self.written += event.token != self._end
                yield Piece(index, text.add(event.token), [event], None)
                if text.stopped:
                    self._jobs[index].cancelled = True
                    going.remove(index)
                    yield Piece(index, "", [], "stop")
            if len(late) == len(self._jobs):
                raise late[0]
            for index in late:
                yield Piece(index, "", [], "length")
        finally:
            for job in self._jobs:
                job.cancelled = True
