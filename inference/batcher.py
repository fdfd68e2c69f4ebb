"""Many texts at a time on one model: rows join and leave between steps."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model import Sampling
from model.sampling import History, penalise, sample

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

    `logprob` and `likeliest`, pairs of token and log-probability in nats, are of the model's own
    distribution, and there where they were asked for; a text's first token has neither.
    """

    token: int
    logprob: float | None = None
    likeliest: list[tuple[int, float]] = field(default_factory=list)


Event = list[Token] | Token | str | Exception


@dataclass(eq=False)
class GenerationRequest:
    """A text to be written.

    Attributes:
        ids: of the prompt.
        max_new_tokens: upper limit.
        sampling: how tokens are chosen.
        seed: of the choice; None for another text every time.
        emit: called, on the batcher's thread, with the list of the prompt's Tokens where
            `prompt_logprobs` asks for it, with every new Token (of the end token only where there
            are `logprobs`), and then with how it ended: "stop" (the end token), "length" (the
            limit, the context or the time was reached), "cancelled", or an exception: QueueFull if
            it never began.
        logprobs: how many of the likeliest tokens to tell with each, or None.
        prompt_logprobs: whether to tell them of the prompt's tokens too.
        deadline: `time.monotonic()` at which it ends, whatever it has written.
        cancelled: set it, and the text ends before the next step.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    seed: int | None
    emit: Callable[[Event], None]
    logprobs: int | None = None
    prompt_logprobs: bool = False
    deadline: float = float("inf")
    cancelled: bool = False
    # What the batcher notes:
    began: float = 0.0
    newest: int = -1  # the token that the decoder has not seen
    written: int = 0
    prompt_tokens: list[Token] = field(default_factory=list)  # as far as they have logprobs
    generator: torch.Generator | None = None
    history: History | None = None

    def ended(self, now: float) -> str | None:
        """How it ends without another token, if it does."""
        if self.cancelled:
            return "cancelled"
        return "length" if now >= self.deadline else None


class Batcher:
    """Writes the texts of jobs, several at a time, each as if it were alone.

    Each round takes at most one part of one new prompt and then one step of all texts, so that no
    prompt keeps the others waiting for longer than one part takes. Jobs start in the order in which
    they came.

    Args:
        chat_model: the model; its decoder needs one row more than `rows`, where prompts begin.
        rows: how many texts are written at a time.
        queue: how many more may wait.
    """

    def __init__(self, chat_model: ChatModel, rows: int, queue: int):
        self.chat_model = chat_model
        self.decoder = chat_model.decoder
        self.rows = rows
        self.queue = queue
        self.waiting: deque[GenerationRequest] = deque()
        self.active: list[GenerationRequest] = []  # which job each row of the decoder is
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
            self.active, self._starting = [], None
        self.decoder.release()
        self.decoder.kept.clear()
        for job in jobs:
            job.emit(how)

    @torch.no_grad()
    def _round(self) -> None:
        self._drop_ended()
        self._start_next()
        if self.active:
            logits = self.decoder.step([job.newest for job in self.active])
            self._choose(range(len(self.active)), logits)

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
        for row in reversed(range(len(self.active))):
            if how := self.active[row].ended(now):
                self._end(row, how)

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
            self._prepare(job, logits)
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
        self._choose([len(self.active) - 1], logits[None])

    def _score_prompt(self, job: GenerationRequest, logits: Tensor) -> None:
        """Note the log-probabilities that logits (T, vocab_size) give the prompt's next tokens."""
        if not job.prompt_tokens:
            job.prompt_tokens.append(Token(job.ids[0]))
        start = len(job.prompt_tokens)
        tokens = job.ids[start : start + len(logits)]  # after the last one there is none
        if tokens:
            job.prompt_tokens += with_logprobs(tokens, logits[: len(tokens)], job.logprobs)

    def _prepare(self, job: GenerationRequest, logits: Tensor) -> None:
        job.generator = torch.Generator(logits.device)
        if job.seed is None:
            job.generator.seed()
        else:
            job.generator.manual_seed(job.seed)
        if job.sampling.penalises:
            prompt = torch.tensor(job.ids, device=logits.device)
            job.history = History([prompt], logits.shape[-1], logits.device)

    def _choose(self, rows: Sequence[int], logits: Tensor) -> None:
        """Choose the next token of some rows, tell it, and end the texts that end."""
        likeliest = logits.argmax(-1).tolist()
        ended: list[tuple[int, str | Exception]] = []
        for row, own, token in zip(rows, logits, likeliest, strict=True):
            job = self.active[row]
            try:
                how = self._take(job, own, token)
            except Exception as error:  # of this job alone
                how = error
            if how is not None:
                ended.append((row, how))
        for row, how in reversed(ended):
            self._end(row, how)

    def _take(self, job: GenerationRequest, logits: Tensor, likeliest: int) -> str | None:
        """Choose and tell a job's next token: how the text ended with it, if it did."""
        token, history = likeliest, job.history
        if history is not None or job.sampling.do_sample:
            own = logits[None]
            if history is not None:
                own = penalise(own, job.sampling, history.seen, history.written)
            chosen = sample(own, job.sampling, job.generator)
            if history is not None:
                history.add(torch.zeros_like(chosen), chosen)
            token = int(chosen)
        told = Token(token)
        if job.logprobs is not None:
            told = with_logprobs([token], logits[None], job.logprobs)[0]
        if token == self.chat_model.tokenizer.eos_token_id:
            if job.logprobs is not None:
                job.emit(told)
            return "stop"
        job.newest = token
        job.written += 1
        job.emit(told)
        full = len(job.ids) + job.written >= self.decoder.max_seq_len
        return "length" if full or job.written >= job.max_new_tokens else None

    def _end(self, row: int, how: str | Exception) -> None:
        """Free a row: what it holds is kept, and the last row takes its place."""
        last = len(self.active) - 1
        self.decoder.keep(row)
        self.decoder.move(last, row)
        with self._work:
            job, self.active[row] = self.active[row], self.active[last]
            self.active.pop()
        self._seconds += 0.1 * (time.monotonic() - job.began - self._seconds)
        job.emit(how)


def with_logprobs(tokens: Sequence[int], logits: Tensor, likeliest: int) -> list[Token]:
    """Tokens with their log-probabilities.

    Args:
        tokens: T ids.
        logits: that each was chosen by, (T, vocab_size).
        likeliest: how many of the likeliest ones to tell with each.
    """
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    values, ids = logprobs.topk(likeliest)
    rows = zip(tokens, own.tolist(), ids.tolist(), values.tolist(), strict=True)
    return [Token(token, p, list(zip(n, v, strict=True))) for token, p, n, v in rows]
