"""Many texts at a time on one model: rows join and leave between steps."""

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
    """There is no place for another text; `seconds` is a guess of when there will be."""

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
        top_logprobs: the likeliest tokens in its place, each with its log-probability.
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
            `logprobs`), and then with how the text ended: "stop" (the end token), "length" (the
            limit, the context or the deadline was reached), "cancelled", or an exception: QueueFull
            if it never began.
        seed: of the sampling; None for another text every time.
        logprobs: how many of the likeliest tokens come with each token, or None.
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
        """How it ends without another token, if it does."""
        if self.cancelled:
            return "cancelled"
        return "length" if now >= self.deadline else None


class Batcher:
    """Generates the texts of jobs, several at a time, each as if it were alone.

    Each round takes at most one part of one new prompt and then one step of all texts, so that no
    prompt delays the others for longer than one part takes. Jobs start in the order in which they
    came.

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
        self._seconds = 1.0  # that a job takes from its start, a running mean
        # Held to change any of the three above that hold jobs, and the two below.
        self._work = threading.Condition()
        self._closed = self._retired = False
        self._thread = threading.Thread(
            target=self._run, name=f"batcher of {chat_model.name}", daemon=True
        )
        self._thread.start()

    @property
    def active(self) -> list[GenerationRequest]:
        """The jobs whose texts are growing, each in its row of the decoder."""
        return self.loop.active

    @property
    def load(self) -> int:
        """Jobs that are not done."""
        return len(self.waiting) + len(self.active) + (self._starting is not None)

    def submit(self, jobs: Sequence[GenerationRequest]) -> None:
        """Take jobs, all or none.

        Raises:
            Closed: if the batcher has ended.
            QueueFull: if there are not so many places.
        """
        with self._work:
            if self._closed:
                raise Closed
            excess = self.load + len(jobs) - self.rows - self.queue
            if excess > 0:
                raise QueueFull(self._seconds * max(1, excess / self.rows))
            self.waiting.extend(jobs)
            self._work.notify()

    def close(self, only_if_idle: bool = False) -> bool:
        """End, and all jobs with it; or if told, only where there are none: whether it did."""
        with self._work:
            if only_if_idle and self.load:
                return False
            self._closed = True
            self._work.notify()
        self._thread.join()
        return True

    def retire(self) -> None:
        """End as soon as there are no jobs; until then further ones are taken."""
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

    def _end_all(self, how: Exception) -> None:
        with self._work:
            starting = [] if self._starting is None else [self._starting[0]]
            jobs = [*self.active, *starting, *self.waiting]
            self.waiting.clear()
            self.active.clear()
            self._starting = None
        self.decoder.release()
        self.decoder.prefix_cache.clear()
        for job in jobs:
            job.emit(how)

    @torch.no_grad()
    def _round(self) -> None:
        self._drop_ended()
        self._start_next()
        if self.active:
            self._sample(list(self.active), self.loop.step())

    def _drop_ended(self) -> None:
        """Let go of jobs that nobody waits for, and of those whose time is over."""
        now = time.monotonic()
        with self._work:
            ended = [(job, how) for job in self.waiting if (how := job.ended(now))]
            for job, _ in ended:
                self.waiting.remove(job)
            ended = [(j, QueueFull(self._seconds) if h == "length" else h) for j, h in ended]
            if self._starting is not None and (how := self._starting[0].ended(now)):
                ended.append((self._starting[0], how))
                self._starting = None
        for job, how in ended:
            job.emit(how)
        for job in list(self.active):
            if how := job.ended(now):
                self._end(job, how)

    def _start_next(self) -> None:
        """Take the next part of a prompt; when it is whole, the text joins the others."""
        with self._work:
            if self._starting is None:
                if not self.waiting or len(self.active) == self.rows:
                    return
                job = self.waiting.popleft()
                parts = self.decoder.prefill_in_chunks(self.rows, job.ids, job.prompt_logprobs)
                self._starting = job, parts
                job.began = time.monotonic()
            job, parts = self._starting
        try:
            logits = next(parts)
            if job.prompt_logprobs:
                self._score_prompt(job, logits)
                logits = logits[-1]
            if len(self.decoder.tokens[self.rows]) < len(job.ids):
                return
            if job.prompt_logprobs:
                job.emit(job.prompt_tokens)
            if job.max_new_tokens == 0:
                with self._work:
                    self._starting = None
                job.emit("length")
                return
            self._prepare(job)
            self.decoder.move(self.rows, len(self.active))
        except Exception as error:  # of this job alone: the others go on
            with self._work:
                self._starting = None
            self.decoder.tokens[self.rows] = []
            job.emit(error)
            return
        with self._work:
            self.active.append(job)
            self._starting = None
        self._sample([job], logits[None])

    def _score_prompt(self, job: GenerationRequest, logits: Tensor) -> None:
        """Note the log-probabilities that logits (T, vocab_size) give the prompt's next tokens."""
        if not job.prompt_tokens:
            job.prompt_tokens.append(Token(job.ids[0]))
        start = len(job.prompt_tokens)
        tokens = job.ids[start : start + len(logits)]  # after the last one there is none
        if tokens:
            job.prompt_tokens += with_logprobs(tokens, logits[: len(tokens)], job.logprobs)

    def _prepare(self, job: GenerationRequest) -> None:
        job.end_tokens = frozenset([self.chat_model.tokenizer.eos_token_id])
        if job.sampling.do_sample:
            job.generator = torch.Generator(self.decoder.device)
            if job.seed is None:
                job.generator.seed()
            else:
                job.generator.manual_seed(job.seed)

    def _sample(self, jobs: Sequence[GenerationRequest], logits: Tensor) -> None:
        """Sample and emit the next token of active jobs, and end those that are finished.

        Args:
            jobs: n of them.
            logits: theirs, (n, vocab_size).
        """
        groups: dict[tuple[Sampling, torch.Generator | None], list[int]] = {}
        for i, job in enumerate(jobs):
            groups.setdefault((job.sampling, job.generator), []).append(i)
        for group in groups.values():
            failure: Exception | None = None
            try:
                self.loop.sample([jobs[i] for i in group], logits[group])
            except Exception as error:  # of these jobs alone
                failure = error
            for i in group:
                how = failure or self._emit_token(jobs[i], logits[i])
                if how is not None:
                    self._end(jobs[i], how)

    def _emit_token(self, job: GenerationRequest, logits: Tensor) -> str | Exception | None:
        """Emit a job's newest token: how the text ended with it, if it did."""
        try:
            token = Token(job.new_tokens[-1])
            if job.logprobs is not None:
                token = with_logprobs([token.token], logits[None], job.logprobs)[0]
            if job.finish_reason != "stop" or job.logprobs is not None:
                job.emit(token)
        except Exception as error:  # of this job alone
            return error
        return job.finish_reason

    def _end(self, job: GenerationRequest, how: str | Exception) -> None:
        """Free a job's row, whose keys and values stay in the prefix cache."""
        row = self.active.index(job)
        self.decoder.cache_prefix(row)
        with self._work:
            self.loop.remove(row)
        self._seconds += 0.1 * (time.monotonic() - job.began - self._seconds)
        job.emit(how)


def with_logprobs(tokens: Sequence[int], logits: Tensor, top: int) -> list[Token]:
    """Give tokens their log-probabilities.

    Args:
        tokens: T ids.
        logits: what each was sampled from, (T, vocab_size).
        top: number of likeliest tokens that come with each.
    """
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    values, ids = logprobs.topk(top)
    rows = zip(tokens, own.tolist(), ids.tolist(), values.tolist(), strict=True)
    return [Token(token, p, list(zip(n, v, strict=True))) for token, p, n, v in rows]
