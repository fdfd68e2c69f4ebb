"""How long a run is: the limits that its flags set, of which the first to be reached ends it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from diagnosis.compute import count_parameters

from .resume import TrainState
from .setup import Setup, Splits

FIRST_PACE = 1e-3  # seconds of a step, before one was measured
FORWARD_SHARE = 1 / 3  # of the time that a row takes in training


@dataclass
class Budget:
    """The limits of a run; None where there is no such limit."""

    n_rows: int  # of an epoch
    n_tokens: int  # target tokens of an epoch
    rows_per_step: int  # now, of all processes
    epochs: float | None
    max_steps: int | None
    max_tokens: float | None  # target tokens
    max_seconds: float | None
    # What a run with `max_seconds` keeps for its end: the rows to validate and to test on, the
    # saves, the times that it writes samples, the report, and what they take as far as measured.
    rows_at_end: int = 0
    saves_at_end: int = 1
    samplings_at_end: int = 1
    seconds_per_row: float | None = None
    seconds_per_save: float | None = None
    seconds_per_sampling: float = 0.0
    seconds_per_report: float = 0.0

    @property
    def has_limits(self) -> bool:
        """Whether anything limits the run."""
        limits = (self.epochs, self.max_steps, self.max_tokens, self.max_seconds)
        return any(limit is not None for limit in limits)

    def epochs_after(self, state: TrainState, steps: int) -> float:
        """How often the data have been read after that many more steps."""
        per_epoch = math.ceil(self.n_rows / self.rows_per_step)
        return state.epoch + (state.row / self.rows_per_step + steps) / per_epoch

    def _places(self, state: TrainState, rows_per_step: int) -> Iterator[tuple[float, float]]:
        """For each limit, where the run is and where the limit is, in steps of that many rows."""
        per_epoch = math.ceil(self.n_rows / rows_per_step)
        if self.epochs is not None:
            epochs, rows = divmod(max(1, round(self.epochs * self.n_rows)), self.n_rows)
            end = epochs * per_epoch + math.ceil(rows / rows_per_step)
            yield state.epoch * per_epoch + state.row / rows_per_step, end
        if self.max_steps is not None:
            yield state.step, self.max_steps
        if self.max_tokens is not None:
            tokens_per_step = self.n_tokens / per_epoch
            yield state.tokens / tokens_per_step, self.max_tokens / tokens_per_step
        if self.max_seconds is not None:
            # The end of the step that is nearest to the limit, before or after it.
            yield state.step, state.step + self.seconds_left(state) / _pace(state) - 0.5

    def place(self, state: TrainState) -> tuple[float, float]:
        """Where the schedule is and where it ends, in steps of the size that the run began with.

        It follows what the limit that will be reached first counts: rows, steps, tokens or time.
        """
        return min(self._places(state, state.rows_per_step), key=lambda place: place[1] - place[0])

    def steps_left(self, state: TrainState) -> int:
        """Optimizer steps to the end; an estimate where tokens or time limit the run."""
        return max(0, math.ceil(min(b - a for a, b in self._places(state, self.rows_per_step))))

    def total_tokens(self) -> float | None:
        """Target tokens of the whole run; None if time alone limits it."""
        per_step = self.rows_per_step * self.n_tokens / self.n_rows
        limits = [(self.epochs, self.n_tokens), (self.max_steps, per_step), (self.max_tokens, 1)]
        return min((n * tokens for n, tokens in limits if n is not None), default=None)

    def is_used_up(self, state: TrainState) -> bool:
        """Whether a limit has been reached."""
        places = self._places(state, state.rows_per_step)
        return self.steps_left(state) == 0 or any(here >= end for here, end in places)

    def is_out_of_time(self, state: TrainState) -> bool:
        """Whether `max_seconds` are nearer to now than to the end of the next step."""
        return self.seconds_left(state) <= 0.5 * _pace(state)

    def is_near_end(self, state: TrainState) -> bool:
        """Whether there is no time left for an evaluation before the one at the end."""
        return self.max_seconds is not None and self.seconds_left(state) < state.reserve

    def seconds_left(self, state: TrainState) -> float:
        """For steps, before `max_seconds` and what is kept for the end of the run."""
        return self.max_seconds - state.reserve - state.elapsed

    def seconds_at_end(self, state: TrainState) -> float:
        """What validation, test, saves, samples and report will take at the end, on this one."""
        per_row = self.seconds_per_row
        if per_row is None:
            per_row = FORWARD_SHARE * state.seconds / max(1, state.step * self.rows_per_step)
        seconds = (
            self.rows_at_end * per_row
            + self.saves_at_end * (self.seconds_per_save or 0.0)
            + self.samplings_at_end * self.seconds_per_sampling
            + self.seconds_per_report
        )
        # Until it is measured, what it was before the run was resumed.
        return max(seconds, state.reserve) if self.seconds_per_save is None else seconds


def _pace(state: TrainState) -> float:
    """Seconds of a step, as far as measured."""
    return state.seconds / state.step if state.step else FIRST_PACE


def make_budget(setup: Setup, data: Splits) -> Budget:
    """The budget that the flags give."""
    args = setup.args
    per_parameter = args.tokens_per_parameter and (
        args.tokens_per_parameter * count_parameters(setup.raw_model).active
    )
    tests = 0 if data.test is None else len(data.test)
    return Budget(
        n_rows=len(data.train),
        n_tokens=data.train.dataset.n_tokens,
        rows_per_step=setup.rows_per_step,
        epochs=args.epochs,
        max_steps=args.max_steps,
        max_tokens=min(filter(None, (args.max_tokens, per_parameter)), default=None),
        max_seconds=args.max_minutes and 60 * args.max_minutes,
        rows_at_end=sum(map(len, data.val.values())) + tests,
        saves_at_end=2 if tests else 1,
        samplings_at_end=2 if args.sample_prompts else 1,
    )
