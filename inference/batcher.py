"""Many texts at a time on one model: rows join and leave between steps."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model import Sampling
from model.sampling import History, choose_tokens, penalise

from .talker import Talker

PARKED = 8  # rows of texts that ended, which a conversation's next turn goes on from


class QueueFull(Exception):
    """There is no place for another text; `seconds` is a guess of when there will be."""

    def __init__(self, seconds: float):
        super().__init__("the queue is full")
        self.seconds = seconds


@dataclass
class Token:
    """A new token.

    `logprob` and `likeliest`, pairs of token and log-probability in nats, are of the model's own
    distribution, and there where they were asked for.
    """

    token: int
    logprob: float | None = None
    likeliest: list[tuple[int, float]] = field(default_factory=list)


@dataclass(eq=False)
class Job:
    """A text to be written.

    Attributes:
        ids: of the prompt.
        max_new_tokens: upper limit.
        sampling: how tokens are chosen.
        seed: of the choice; None for another text every time.
        ends: tokens that end it.
        emit: called, on the batcher's thread, with every new Token, the one that ends it left out,
            and then with how it ended: "stop" (an end token), "length" (the limit, the context or
            the time was reached), "cancelled", or an exception.
        logprobs: how many of the likeliest tokens to tell with each, or None.
        deadline: `time.monotonic()` at which it ends, whatever it has written.
        cancelled: set it, and the text ends before the next step.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    seed: int | None
    ends: frozenset[int]
    emit: Callable[[Token | str | Exception], None]
    logprobs: int | None = None
    deadline: float = float("inf")
    cancelled: bool = False
    written: int = 0
    began: float = 0.0
    generator: torch.Generator | None = None
    history: History | None = None


class Batcher:
    """Writes the texts of jobs, several at a time, each as if it were alone.

    Each round takes at most one part of one new prompt and then one step of all texts, so that no
    prompt keeps the others waiting for longer than one part takes. Jobs start in the order in which
    they came.

    Args:
        talker: the model; its decoder needs `rows_for(rows)` rows.
        rows: how many texts are written at a time.
        queue: how many more may wait.
    """

    def __init__(self, talker: Talker, rows: int, queue: int):
        self.talker = talker
        self.decoder = talker.decoder
        self.rows = rows
        self.queue = queue
        self.waiting: deque[Job] = deque()
        self.active: list[Job] = []  # which job each row of the decoder is
        self.steps = 0
        self._newest = torch.zeros(0, dtype=torch.long)  # tokens that the decoder has not seen
        self._starting: tuple[Job, Iterator[Tensor]] | None = None
        self._parked = 0
        self._seconds = 1.0  # that a job takes from its start, a running mean
        self._work = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"batcher of {talker.name}")
        self._thread.daemon = True
        self._thread.start()

    @staticmethod
    def rows_for(rows: int) -> int:
        """Rows of a decoder for so many texts: also one where prompts begin, and parked ones."""
        return rows + 1 + PARKED

    @property
    def load(self) -> int:
        """Jobs that are not done."""
        return len(self.waiting) + len(self.active) + (self._starting is not None)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs, all or none.

        Raises:
            QueueFull: if there are not so many places.
        """
        with self._work:
            excess = self.load + len(jobs) - self.rows - self.queue
            if excess > 0 or self._closed:
                raise QueueFull(self._seconds * max(1, excess / self.rows))
            self.waiting.extend(jobs)
            self._work.notify()

    def close(self) -> None:
        """End all jobs and the thread."""
        with self._work:
            self._closed = True
            self._work.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._work:
                while not (self.load or self._closed):
                    self._work.wait()
            if self._closed:
                for job in self._all_jobs():
                    job.emit("cancelled")
                return
            try:
                self._round()
            except Exception as error:  # a bug, or memory ran out: the jobs end, the server goes on
                for job in self._all_jobs():
                    job.emit(error)
                self.waiting.clear()
                self.active, self._starting = [], None
                self._newest = self._newest[:0]
                self.decoder.tokens = [[] for _ in self.decoder.tokens]

    def _all_jobs(self) -> list[Job]:
        starting = [self._starting[0]] if self._starting is not None else []
        return [*self.active, *starting, *self.waiting]

    @torch.no_grad()
    def _round(self) -> None:
        self._drop_ended()
        self._start_next()
        if self.active:
            logits = self.decoder.step(self._newest.to(self.decoder.device))
            self.steps += 1
            self._choose(self.active, logits)

    def _drop_ended(self) -> None:
        """Let go of jobs that nobody waits for, and of those whose time is over."""
        now = time.monotonic()
        with self._work:
            ended = [j for j in self.waiting if j.cancelled or now >= j.deadline]
            self.waiting = deque(j for j in self.waiting if j not in ended)
        if self._starting is not None:
            job = self._starting[0]
            if job.cancelled or now >= job.deadline:
                ended.append(job)
                self._starting = None
        for job in ended:
            job.emit("cancelled" if job.cancelled else "length")
        for row in reversed(range(len(self.active))):
            job = self.active[row]
            if job.cancelled or now >= job.deadline:
                self._end(row, "cancelled" if job.cancelled else "length")

    def _start_next(self) -> None:
        """Take the next part of a prompt; when it is whole, the text joins the others."""
        if self._starting is None:
            with self._work:
                if not self.waiting or len(self.active) == self.rows:
                    return
                job = self.waiting.popleft()
                parts = self.decoder.prefill_in_chunks(self.rows, job.ids)
                self._starting = (job, parts)
            job.began = time.monotonic()
            job.generator = torch.Generator(self.decoder.device)
            if job.seed is None:
                job.generator.seed()
            else:
                job.generator.manual_seed(job.seed)
        job, parts = self._starting
        logits = next(parts)
        if len(self.decoder.tokens[self.rows]) < len(job.ids):
            return
        if job.sampling.penalises:
            prompt = torch.tensor(list(job.ids), device=logits.device)
            job.history = History([prompt], logits.shape[-1], logits.device)
        self.decoder.move(self.rows, len(self.active))
        with self._work:
            self.active.append(job)
            self._starting = None
        self._newest = torch.cat((self._newest, torch.zeros(1, dtype=torch.long)))
        self._choose([job], logits[None], first=len(self.active) - 1)

    def _choose(self, jobs: list[Job], logits: Tensor, first: int = 0) -> None:
        """Choose a token for jobs in rows from `first` on, tell them, and end those that end."""
        likeliest = logits.argmax(-1).tolist()
        ended: list[tuple[int, str]] = []
        for i, job in enumerate(jobs):
            row = logits[i : i + 1]
            token = likeliest[i]
            if job.history is not None:
                row = penalise(row, job.sampling, job.history.seen, job.history.written)
            if job.history is not None or job.sampling.do_sample:
                token = int(choose_tokens(row, job.sampling, job.generator))
            if token in job.ends:
                ended.append((first + i, "stop"))
                continue
            if job.history is not None:
                chosen = torch.tensor([token], device=row.device)
                job.history.add(torch.zeros_like(chosen), chosen)
            self._newest[first + i] = token
            job.written += 1
            job.emit(self._told(job, token, logits[i]))
            length = len(job.ids) + job.written
            if job.written >= job.max_new_tokens or length >= self.decoder.max_seq_len:
                ended.append((first + i, "length"))
        for row, how in reversed(ended):
            self._end(row, how)

    def _told(self, job: Job, token: int, logits: Tensor) -> Token:
        if job.logprobs is None:
            return Token(token)
        logprobs = logits.float().log_softmax(-1)
        values, tokens = logprobs.topk(job.logprobs)
        pairs = list(zip(tokens.tolist(), values.tolist(), strict=True))
        return Token(token, float(logprobs[token]), pairs)

    def _end(self, row: int, how: str) -> None:
        """Free a row: what it holds is parked, and the last row takes its place."""
        last = len(self.active) - 1
        self._parked = (self._parked + 1) % PARKED
        self.decoder.move(row, self.rows + 1 + self._parked)
        self.decoder.move(last, row)
        self._newest[row] = self._newest[last]
        self._newest = self._newest[:last]
        with self._work:
            job, self.active[row] = self.active[row], self.active[last]
            self.active.pop()
        self._seconds += 0.1 * (time.monotonic() - job.began - self._seconds)
        job.emit(how)
