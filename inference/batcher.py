"""Continuous batching: requests join and leave a model's sampling loop between its steps."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model import Continuation, Sampling, SamplingLoop

from .chat_model import ChatModel


class Closed(Exception):
    """The batcher has ended; another one may have taken its place."""


class QueueFull(Exception):
    """There is no room for another request; `seconds` is a guess of when there will be."""

    def __init__(self, seconds: float):
        super().__init__("the queue is full")
        self.seconds = seconds


@dataclass
class Token:
    """A token of a text.

    Attributes:
        token: its id.
        logprob: log-probability in nats by the model's own distribution, where it was asked for; a
            text's first token has none.
        top_logprobs: the most likely tokens in its place, each with its log-probability.
    """

    token: int
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] = field(default_factory=list)


Event = list[Token] | Token | str | Exception


@dataclass(eq=False, kw_only=True)
class GenerationRequest(Continuation):
    """A continuation for which somebody waits.

    Attributes:
        emit: called, on the batcher's thread, with the list of the prompt's Tokens where
            `prompt_logprobs` asks for it, with every new Token (the end token only with
            `logprobs`), and then with the reason of its end: "stop" (the end token), "length" (the
            limit, the context or the deadline was reached), "cancelled", or an exception: QueueFull
            if it never began.
        seed: seed of the sampling; None for a new one each time.
        logprobs: how many of the most likely tokens come with each token, or None.
        prompt_logprobs: whether the prompt's tokens come with theirs too.
        deadline: `time.monotonic()` at which the text ends, however long it is.
        cancelled: set it, and the text ends before the next step.
        began: `time.monotonic()` at which the batcher took it up.
        prompt_tokens: the prompt's Tokens, as far as their log-probabilities are computed.
    """

    emit: Callable[[Event], None]
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    deadline: float = float("inf")
    cancelled: bool = False
    began: float = 0.0
    prompt_tokens: list[Token] = field(default_factory=list)

    def ended(self, now: float) -> str | None:
        """Return why it ends without another token, if it does."""
        if self.cancelled:
            return "cancelled"
        return "length" if now >= self.deadline else None


class Batcher:
    """Generates the texts of several requests at a time, each as if it were alone.

    Each round takes at most one part of one new prompt and then one step of all texts, so that no
    prompt delays the others for longer than one part takes. Requests start in the order of their
    arrival.

    Args:
        chat_model: the model; its decoder needs one row more than `rows`, where prompts begin.
        rows: how many texts are generated at a time.
        queue: how many more may wait.
    """

    def __init__(self, chat_model: ChatModel, rows: int, queue: int):
        self.chat_model = chat_model
        self.decoder = chat_model.decoder
        self.rows = rows
        self.queue = queue
        self.loop = SamplingLoop(self.decoder)
        self.waiting: deque[GenerationRequest] = deque()
        self._starting: tuple[GenerationRequest, Iterator[Tensor]] | None = None
        self._seconds = 1.0  # that a request takes from its start, a running mean
        # Held to change any of the three above that hold requests, and the two below.
        self._work = threading.Condition()
        self._closed = self._retired = False
        self._thread = threading.Thread(
            target=self._run, name=f"batcher of {chat_model.name}", daemon=True
        )
        self._thread.start()

    @property
    def active(self) -> list[GenerationRequest]:
        """The requests that have a row of the decoder, in the order of the rows."""
        return self.loop.active

    @property
    def load(self) -> int:
        """Number of requests that are not done."""
        return len(self.waiting) + len(self.active) + (self._starting is not None)

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Take requests, all or none.

        Raises:
            Closed: if the batcher has ended.
            QueueFull: if there is not enough room.
        """
        with self._work:
            if self._closed:
                raise Closed
            excess = self.load + len(requests) - self.rows - self.queue
            if excess > 0:
                raise QueueFull(self._seconds * max(1, excess / self.rows))
            self.waiting.extend(requests)
            self._work.notify()

    def close(self, only_if_idle: bool = False) -> bool:
        """End, with all requests, and return True; with `only_if_idle`, only if there are none."""
        with self._work:
            if only_if_idle and self.load:
                return False
            self._closed = True
            self._work.notify()
        self._thread.join()
        return True

    def retire(self) -> None:
        """End as soon as there are no requests; until then accept further ones."""
        with self._work:
            self._retired = True
            self._work.notify()

    def _run(self) -> None:
        while True:
            with self._work:
                if not self.load:
                    self.decoder.release()
                while not (self.load or self._closed or self._retired):
                    self._work.wait()
                self._closed = self._closed or not self.load
                if self._closed:
                    break
            try:
                self._round()
            except Exception as error:
                # A bug, or memory ran out: the texts end, the server goes on.
                self._end_all(error)
        self._end_all(Closed())

    def _end_all(self, reason: Exception) -> None:
        with self._work:
            starting = [] if self._starting is None else [self._starting[0]]
            requests = [*self.active, *starting, *self.waiting]
            self.waiting.clear()
            self.active.clear()
            self._starting = None
        self.decoder.release()
        self.decoder.prefix_cache.clear()
        for request in requests:
            request.emit(reason)

    @torch.no_grad()
    def _round(self) -> None:
        self._drop_ended()
        self._start_next()
        if self.active:
            self._sample(list(self.active), self.loop.step())

    def _drop_ended(self) -> None:
        """Drop requests that are cancelled or past their deadline."""
        now = time.monotonic()
        with self._work:
            ended = [
                (request, reason) for request in self.waiting if (reason := request.ended(now))
            ]
            for request, _ in ended:
                self.waiting.remove(request)
            ended = [(r, QueueFull(self._seconds) if why == "length" else why) for r, why in ended]
            if self._starting is not None and (reason := self._starting[0].ended(now)):
                ended.append((self._starting[0], reason))
                self._starting = None
        for request, reason in ended:
            request.emit(reason)
        for request in list(self.active):
            if reason := request.ended(now):
                self._end(request, reason)

    def _start_next(self) -> None:
        """Compute the next part of a prompt; after the last one, the text joins the others."""
        with self._work:
            if self._starting is None:
                if not self.waiting or len(self.active) == self.rows:
                    return
                request = self.waiting.popleft()
                parts = self.decoder.prefill_in_chunks(
                    self.rows, request.ids, request.prompt_logprobs
                )
                self._starting = request, parts
                request.began = time.monotonic()
            request, parts = self._starting
        try:
            logits = next(parts)
            if request.prompt_logprobs:
                self._score_prompt(request, logits)
                logits = logits[-1]
            if len(self.decoder.tokens[self.rows]) < len(request.ids):
                return
            if request.prompt_logprobs:
                request.emit(request.prompt_tokens)
            if request.max_new_tokens == 0:
                with self._work:
                    self._starting = None
                request.emit("length")
                return
            self._prepare(request)
            self.decoder.move(self.rows, len(self.active))
        except Exception as error:  # fails this request alone: the others go on
            with self._work:
                self._starting = None
            self.decoder.tokens[self.rows] = []
            request.emit(error)
            return
        with self._work:
            self.active.append(request)
            self._starting = None
        self._sample([request], logits[None])

    def _score_prompt(self, request: GenerationRequest, logits: Tensor) -> None:
        """Compute the prompt's next Tokens from the logits (T, vocab_size) before them."""
        if not request.prompt_tokens:
            request.prompt_tokens.append(Token(request.ids[0]))
        start = len(request.prompt_tokens)
        tokens = request.ids[start : start + len(logits)]  # none after the last one
        if tokens:
            request.prompt_tokens += with_logprobs(tokens, logits[: len(tokens)], request.logprobs)

    def _prepare(self, request: GenerationRequest) -> None:
        request.end_tokens = frozenset([self.chat_model.tokenizer.eos_token_id])
        if request.sampling.do_sample:
            request.generator = torch.Generator(self.decoder.device)
            if request.seed is None:
                request.generator.seed()
            else:
                request.generator.manual_seed(request.seed)

    def _sample(self, requests: Sequence[GenerationRequest], logits: Tensor) -> None:
        """Sample and emit the next token of active requests, and end those that are finished.

        Args:
            requests: n active requests.
            logits: their logits, (n, vocab_size).
        """
        groups: dict[tuple[Sampling, torch.Generator | None], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault((request.sampling, request.generator), []).append(i)
        for group in groups.values():
            failure: Exception | None = None
            try:
                self.loop.sample(
                    [requests[i] for i in group], torch.stack([logits[i] for i in group])
                )
            except Exception as error:  # fails these requests alone
                failure = error
            for i in group:
                reason = failure or self._emit_token(requests[i], logits[i])
                if reason is not None:
                    self._end(requests[i], reason)

    def _emit_token(self, request: GenerationRequest, logits: Tensor) -> str | Exception | None:
        """Emit a request's newest token, and return why the text ends with it, if it does."""
        try:
            token = Token(request.new_tokens[-1])
            if request.logprobs is not None:
                token = with_logprobs([token.token], logits[None], request.logprobs)[0]
            if request.finish_reason != "stop" or request.logprobs is not None:
                request.emit(token)
        except Exception as error:  # fails this request alone
            return error
        return request.finish_reason

    def _end(self, request: GenerationRequest, reason: str | Exception) -> None:
        """Free a request's row, whose keys and values stay in the prefix cache."""
        row = self.active.index(request)
        self.decoder.cache_prefix(row)
        with self._work:
            self.loop.remove(row)
        self._seconds += 0.1 * (time.monotonic() - request.began - self._seconds)
        request.emit(reason)


def with_logprobs(tokens: Sequence[int], logits: Tensor, top: int) -> list[Token]:
    """Give tokens their log-probabilities.

    Args:
        tokens: T ids.
        logits: what each was sampled from, (T, vocab_size).
        top: number of most likely tokens that come with each.
    """
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    values, ids = logprobs.topk(top)
    rows = zip(tokens, own.tolist(), ids.tolist(), values.tolist(), strict=True)
    return [Token(token, p, list(zip(n, v, strict=True))) for token, p, n, v in rows]
