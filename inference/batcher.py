"""Continuous batching: requests join and leave a model's sampling loop between its steps."""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model import Continuation, SamplingLoop

from .chat_model import ChatModel

MIN_LOGPROB = -9999.0  # OpenAI's for what cannot be


class QueueFull(Exception):
    """There is no room for another request; `seconds` is an estimate of when there will be."""

    def __init__(self, seconds: float):
        super().__init__("the queue is full")
        self.seconds = seconds


@dataclass
class Token:
    """A token of a text, with log-probabilities in nats where they were asked for."""

    token: int
    logprob: float | None = None  # by the model's own distribution; a text's first token has none
    top_logprobs: list[tuple[int, float]] = field(default_factory=list)  # the most likely ones


Event = list[Token] | Token | str | Exception


@dataclass(eq=False, kw_only=True)
class GenerationRequest(Continuation):
    """A continuation for which somebody waits.

    `emit` is called, on the batcher's thread, with the list of the prompt's Tokens where
    `prompt_logprobs` asks for it, with every new Token (the end token only with `logprobs`), and
    then with the reason of its end: "stop" (the end token), "length" (the limit, the context or the
    deadline was reached), "cancelled", or an exception: QueueFull if the deadline came before its
    first token.
    """

    emit: Callable[[Event], None]
    seed: int | None = None  # None for a new one each time
    logprobs: int | None = None  # how many of the most likely tokens come with each token
    prompt_logprobs: bool = False  # whether the prompt's tokens come with theirs too
    deadline: float = float("inf")  # `time.monotonic()` at which the text ends
    cancelled: bool = False  # once set, the text ends before the next step
    began: float = 0.0  # `time.monotonic()` at which the batcher took it up
    prompt_tokens: list[Token] = field(default_factory=list)  # those scored so far


class Batcher:
    """Generates `rows` texts at a time, each as if it were alone; `queue` more may wait.

    Each round takes at most one chunk of one new prompt and then one step of all texts, so that no
    prompt delays the others for longer than one chunk takes. Requests start in the order of their
    arrival. The decoder needs one row more than `rows`, where prompts begin.
    """

    def __init__(self, chat_model: ChatModel, rows: int, queue: int):
        self.chat_model = chat_model
        self.decoder = chat_model.decoder
        self.rows = rows
        self.queue = queue
        self.loop = SamplingLoop(self.decoder)
        self.active: list[GenerationRequest] = self.loop.active  # one for each row, in their order
        self.waiting: deque[GenerationRequest] = deque()
        self._chunks: Iterator[Tensor] | None = None  # logits of the first one's prompt, once begun
        self._seconds = 1.0  # that a request takes from its start, a running mean
        self._lock = threading.Condition()  # held to add requests, and to find that there are none
        self._retired = False
        self._thread: threading.Thread | None = None

    @property
    def load(self) -> int:
        """Number of requests that are not done."""
        return len(self.waiting) + len(self.active)

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Take requests, all or none. Raises QueueFull if there is not enough room."""
        with self._lock:
            excess = self.load + len(requests) - self.rows - self.queue
            if excess > 0:
                raise QueueFull(self._seconds * max(1, excess / self.rows))
            self.waiting.extend(requests)
            if self._thread is None:
                name = f"batcher of {self.chat_model.name}"
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()
            self._lock.notify()

    def retire(self) -> None:
        """End the thread as soon as there are no requests; those that still come are served."""
        with self._lock:
            self._retired = True
            self._lock.notify()

    def close(self) -> None:
        """Cancel all requests, and wait until they and the thread have ended."""
        with self._lock:
            thread = self._thread
            for request in (*self.active, *self.waiting):
                request.cancelled = True
        self.retire()
        if thread:
            thread.join()

    def _run(self) -> None:
        # The thread outlasts its work: PyTorch's CPU threads belong to it, and with a new one for
        # each burst of requests a step took 3 times as long (26 M, 2 cores).
        while True:
            with self._lock:
                if not self.load:
                    self.decoder.release()
                    self._lock.wait_for(lambda: self.load or self._retired)
                if not self.load:
                    self._thread = None
                    return
            try:
                self._drop_ended()
                self._start_next()
                if self.active:
                    self._sample(list(self.active), self.loop.step())
            except Exception as error:  # a bug, or no memory: the texts end, the server goes on
                self._end_all(error)

    def _end_all(self, reason: Exception) -> None:
        with self._lock:
            requests = [*self.active, *self.waiting]
            self.waiting.clear()
            self.active.clear()
            self._chunks = None
        self.decoder.release()
        self.decoder.prefix_cache.clear()
        for request in requests:
            request.emit(reason)

    def _drop_ended(self) -> None:
        """End requests that are cancelled or past their deadline."""
        now = time.monotonic()
        with self._lock:
            requests = [*self.active, *self.waiting]
            ended = [r for r in requests if r.cancelled or now >= r.deadline]
            if self.waiting and self.waiting[0] in ended:
                self._chunks = None
            self.waiting = deque(request for request in self.waiting if request not in ended)
        for request in ended:
            if request in self.active:
                self._end(request, "cancelled" if request.cancelled else "length")
            else:
                request.emit("cancelled" if request.cancelled else QueueFull(self._seconds))

    def _start_next(self) -> None:
        """Compute a chunk of the first prompt; after the last one, the text joins the others."""
        if not self.waiting or len(self.active) == self.rows:
            return
        request = self.waiting[0]
        if self._chunks is None:
            request.began = time.monotonic()
            self._chunks = self.decoder.prefill_in_chunks(
                self.rows, request.ids, request.prompt_logprobs
            )
        try:
            logits = next(self._chunks)
            if request.prompt_logprobs:
                self._score_prompt(request, logits)
                logits = logits[-1]
            if len(self.decoder.tokens[self.rows]) < len(request.ids):
                return
            if request.prompt_logprobs:
                request.emit(request.prompt_tokens)
            request.end_tokens = frozenset([self.chat_model.tokenizer.eos_token_id])
            if request.sampling.do_sample:
                seed = secrets.randbits(63) if request.seed is None else request.seed
                request.generator = torch.Generator(self.decoder.device).manual_seed(seed)
            ended = None if request.max_new_tokens > 0 else "length"
            if ended is None:
                self.decoder.move(self.rows, len(self.active))
        except Exception as error:  # fails this request alone: the others go on
            ended = error
        self._chunks = None
        self.waiting.popleft()
        if ended is not None:
            request.emit(ended)
            return
        self.active.append(request)
        self._sample([request], logits[None])

    def _score_prompt(self, request: GenerationRequest, logits: Tensor) -> None:
        """Compute the prompt's next Tokens from the logits (T, vocab_size) before them."""
        if not request.prompt_tokens:
            request.prompt_tokens.append(Token(request.ids[0]))
        start = len(request.prompt_tokens)
        tokens = request.ids[start : start + len(logits)]  # none after the last one
        if tokens:
            request.prompt_tokens += with_logprobs(tokens, logits[: len(tokens)], request.logprobs)

    def _sample(self, requests: Sequence[GenerationRequest], logits: Tensor) -> None:
        """Sample and emit the next token of n active requests from their logits (n, vocab_size).

        Those that are finished end, and those whose sampling fails; a constraint may fail alone.
        """
        groups: dict[tuple[object, ...], list[int]] = {}
        for i, request in enumerate(requests):
            key = request.sampling, request.generator, request.constraint
            groups.setdefault(key, []).append(i)
        for group in groups.values():
            rows = [requests[i] for i in group]
            try:
                self.loop.sample(rows, logits[group])
            except Exception as error:
                for request in rows:
                    self._end(request, error)
                continue
            for i, request in zip(group, rows, strict=True):
                token, reason = request.new_tokens[-1], request.finish_reason
                if request.logprobs is not None:
                    request.emit(*with_logprobs([token], logits[i, None], request.logprobs))
                elif reason != "stop":
                    request.emit(Token(token))
                if reason is not None:
                    self._end(request, reason)

    def _end(self, request: GenerationRequest, reason: str | Exception) -> None:
        """Free a request's row, whose keys and values stay in the prefix cache."""
        row = self.active.index(request)
        self.decoder.cache_prefix(row)
        self.loop.remove(row)
        self._seconds += 0.1 * (time.monotonic() - request.began - self._seconds)
        request.emit(reason)


def with_logprobs(tokens: Sequence[int], logits: Tensor, top: int) -> list[Token]:
    """Give tokens log-probabilities and the `top` most likely ones, from logits (T, vocab_size)."""
    logprobs = logits.float().log_softmax(-1).clamp(min=MIN_LOGPROB)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    values, ids = logprobs.topk(top)
    rows = zip(tokens, own.tolist(), ids.tolist(), values.tolist(), strict=True)
    return [Token(token, p, list(zip(n, v, strict=True))) for token, p, n, v in rows]
