"""The bookkeeping of a run: its position, its figures, its best score, its files."""

import argparse
import copy
import math
import platform
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from common import SaveError, UserError, report_save_errors
from diagnosis.findings import write_report
from diagnosis.plan import cost_line, count_parameters, flops_per_token
from model import (
    MiniMindLM,
    active_lora,
    load_trained_state,
    save_lora,
    save_weights,
    trained_state,
)
from model.weights import read_state

from .distributed import Distributed
from .reporting import Reporter
from .resume import Tally, TrainState, get_random_states, json_arguments, save_resume
from .schedule import get_lr, warmup_steps
from .signals import StopSignal

STEPS_BEFORE_ESTIMATE = 5


@dataclass
class Run:
    """What a stage's loop, its evaluations and its saves share.

    Attributes:
        args: the stage's flags.
        world: this process.
        stage: name in the weights' file.
        path: of the weights.
        network: the bare model, without wrappers.
        tokenizer_hash: of the tokenizer in use.
        optimizer, scaler, autocast: as the loop uses them.
        state: where the run stands.
        reporter: says so.
        stop: whether a signal came.
        n_rows: rows of an epoch.
        identity: what may not change when the run is resumed, by flag.
        saved_as: which file holds this run's last save, as for `save_resume`.
        peak_flops: of this process's GPU, or None.
        ending: why the run stops before its last step; None while it goes on.
        exit_status: what the process ends with, then.
        save_errors: why the last try to save something failed, by what it is.
    """

    args: argparse.Namespace
    world: Distributed
    stage: str
    path: Path
    network: MiniMindLM
    tokenizer_hash: str
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: torch.autocast
    state: TrainState
    reporter: Reporter
    stop: StopSignal
    n_rows: int
    identity: dict[str, Any]
    saved_as: Literal["newest", "previous"]
    peak_flops: float | None
    ending: str | None = None
    exit_status: int = 0
    save_errors: dict[str, str] = field(default_factory=dict)
    first_step: int = field(init=False)
    flops_per_token: float = field(init=False)

    def __post_init__(self) -> None:
        self.first_step = self.state.step
        self._check_patience()  # which may have run out before
        _, active = count_parameters(self.network)
        _, frozen = count_parameters(self.network, frozen_only=True)
        self.flops_per_token = flops_per_token(
            self.network.config, active, self.args.max_seq_len, frozen
        )

    @property
    def complete(self) -> bool:
        """Whether all epochs are done."""
        return self.state.epoch >= self.args.epochs

    @property
    def going_on(self) -> bool:
        """Whether there is another step to take."""
        return not self.complete and self.ending is None

    @property
    def rows_per_step(self) -> int:
        """Rows that all processes together take in a step."""
        return self.args.batch_size * self.args.accumulation_steps * self.world.world_size

    @property
    def keeps_best(self) -> bool:
        """Whether the best weights are kept, as …_best.pth."""
        args = self.args
        return bool(args.save_best or args.early_stopping_patience or args.test_data_path)

    @property
    def best_path(self) -> Path:
        """Where the best weights are."""
        return self.path.with_name(f"{self.path.stem}_best.pth")

    def learning_rate(self) -> float:
        """The rate of the next step.

        It follows the rows seen, counted in steps of the size that the run began with: so it stays
        on one curve when the batch or the number of processes changes on the way.
        """
        args, state = self.args, self.state
        per_epoch = math.ceil(self.n_rows / state.rows_per_step)
        total = args.epochs * per_epoch
        return get_lr(
            state.epoch * per_epoch + state.row / state.rows_per_step,
            total,
            args.learning_rate,
            warmup_steps(args.warmup_iters, args.warmup_ratio, total),
            args.min_lr,
            args.lr_decay,
        )

    def due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps, and at the end, happens now."""
        return self.state.step % interval == 0 or self.complete

    def add_step(
        self,
        tokens: float,
        targets: float,
        loss: float,
        aux_loss: float,
        grad_norm: float,
        expert_load: list[list[float]],
        seconds: float,
        find_sample: Callable[[], str],
        **figures: float,
    ) -> None:
        """Count a finished step, one whose update was skipped if a figure is not finite.

        Args:
            tokens: target tokens of all processes.
            targets: what the loss is a mean over: the sum of their weights in the loss mask, or
                the number of pairs.
            loss: summed over these.
            aux_loss: of the step.
            grad_norm: before clipping.
            expert_load: (layers, experts) choices of all tokens, or empty.
            seconds: that it took.
            find_sample: gives `file:line` of its first sample, or of the first that was not finite;
                called on every process or on none.
            figures: further ones of the stage, summed as the loss is.
        """
        state, tally = self.state, self.state.tally
        state.row += self.rows_per_step
        if state.row >= self.n_rows:
            state.epoch, state.row = state.epoch + 1, 0
        state.step += 1
        state.seconds += seconds
        tally.steps += 1
        tally.seconds += seconds
        self.reporter.advance(state.step)
        if state.step - self.first_step == STEPS_BEFORE_ESTIMATE and not self.complete:
            seconds_per_step = self.reporter.seconds_per_step(state.step)
            self.reporter.say(
                cost_line(
                    seconds_per_step,
                    self.reporter.total_steps - state.step,
                    self.args.gpu_price,
                    self.world.world_size,
                )
            )
        if not math.isfinite(loss + aux_loss + grad_norm):
            self._skip(loss + aux_loss, grad_norm, find_sample())
            return
        state.bad_in_row = 0
        state.tokens += round(tokens)
        state.tested = False
        tally.good += 1
        tally.tokens += tokens
        tally.targets += targets
        tally.loss += loss
        tally.aux_loss += aux_loss
        tally.grad_norm += grad_norm
        for name, value in figures.items():
            tally.figures[name] = tally.figures.get(name, 0.0) + value
        if expert_load:
            before = tally.expert_load or [[0.0] * len(layer) for layer in expert_load]
            tally.expert_load = [
                [x + y for x, y in zip(old, new, strict=True)]
                for old, new in zip(before, expert_load, strict=True)
            ]
        usual = state.spike_watch.mean
        if state.spike_watch.is_spike(loss / targets):
            state.spikes += 1
            self.reporter.say(
                f"step {state.step}: loss {loss / targets:.3f} leaps out of about {usual:.3f}, "
                f"first sample {find_sample()}"
            )

    def _skip(self, loss: float, grad_norm: float, where: str) -> None:
        state = self.state
        state.skipped += 1
        state.bad_in_row += 1
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"gradient norm {grad_norm}"
        if math.isfinite(loss) and self.scaler.is_enabled():
            what += f" at loss scale {self.scaler.get_scale():g}, which float16 lowers by itself"
        self.reporter.say(f"step {state.step}: {what}; update skipped; {where}")
        if state.bad_in_row >= self.args.max_bad_steps:
            self.ending = (
                f"stopped: {state.bad_in_row} steps in a row (--max_bad_steps) whose loss or "
                f"gradient was not finite, the last with {where}; try a smaller --learning_rate "
                f"(it is {self.args.learning_rate:g})"
            )
            self.exit_status = 2
            state.bad_in_row = 0

    def log_if_due(self, epoch: int, lr: float) -> None:
        """Report the steps since the last report.

        Args:
            epoch: of the step that is finished.
            lr: its learning rate.
        """
        state, tally = self.state, self.state.tally
        if not tally.steps or (not self.due(self.args.log_interval) and self.ending is None):
            return
        figures: dict[str, float] = {}
        if tally.good:
            figures["loss"] = tally.loss / tally.targets
            figures |= {name: value / tally.targets for name, value in tally.figures.items()}
        figures["lr"] = lr
        if tally.good:
            figures["grad_norm"] = tally.grad_norm / tally.good
        figures["tokens_per_second"] = round(tally.tokens / tally.seconds)
        figures["skipped"] = state.skipped
        figures["spikes"] = state.spikes
        if any(tally.expert_load):
            shares = [n / sum(layer) for layer in tally.expert_load for n in layer]
            figures["aux_loss"] = tally.aux_loss / tally.good
            figures["expert_load_min"] = round(min(shares), 4)
            figures["expert_load_max"] = round(max(shares), 4)
        if self.peak_flops:
            speed = tally.tokens / tally.seconds * self.flops_per_token
            figures["mfu"] = round(speed / self.peak_flops / self.world.world_size, 4)
        memory = peak_memory(self.world.device)
        if memory is not None:
            figures["memory_gb"] = round(memory / 1e9, 3)
        self.reporter.log(state.step, state.tokens, state.seconds, epoch, **figures)
        state.tally = Tally()

    def note_validation(self, scores: dict[str, float] | None) -> None:
        """Report an evaluation, keep the best weights, stop early if that was asked for.

        Args:
            scores: as `summarise` or `average`; None if a signal broke it off.
        """
        if scores is None:
            return
        state, args = self.state, self.args
        self._log_scores(scores)
        state.evaluated_at = state.step
        patience = args.early_stopping_patience
        min_delta = args.early_stopping_min_delta if patience else 0.0
        if scores["val_loss"] < state.best_loss - min_delta:
            state.best_loss, state.best_step = scores["val_loss"], state.step
            state.evaluations_since_best = 0
            if self.keeps_best:
                saved = self.world.is_main and self._try(
                    "best", lambda: self._save_weights(self.best_path)
                )
                state.best_saved = bool(self.world.all_reduce_max(int(saved)))
        else:
            state.evaluations_since_best += 1
        self._check_patience()

    def _check_patience(self) -> None:
        patience, state = self.args.early_stopping_patience, self.state
        if patience and state.evaluations_since_best >= patience and not self.complete:
            self.ending = (
                f"stopped early: {state.evaluations_since_best} evaluations "
                f"(--early_stopping_patience) without progress since step {state.best_step}"
            )

    @property
    def test_due(self) -> bool:
        """Whether the test data should be scored now."""
        return self.exit_status == 0 and not self.state.tested

    def best_network(self) -> MiniMindLM:
        """A model with the best weights, or the last ones where nothing was validated."""
        best = self.state.best_saved and self.world.is_main
        state = read_state(self.best_path) if best else None
        network = copy.deepcopy(self.network)
        load_trained_state(network, self.world.broadcast(state) or trained_state(self.network))
        return network

    def note_test(self, scores: dict[str, float] | None) -> None:
        """Report the scores of the test data.

        Args:
            scores: as `summarise` or `average`; None if a signal broke it off.
        """
        if scores is not None:
            self._log_scores(scores)
            self.state.tested = True

    def _log_scores(self, scores: dict[str, float]) -> None:
        state = self.state
        epoch = max(0, state.epoch - (state.row == 0))  # that of the step before
        self.reporter.log_scores(state.step, state.tokens, state.seconds, epoch, **scores)

    def check_signal(self) -> bool:
        """End the run if any process got a signal to stop; whether it ends."""
        number = self.world.all_reduce_max(self.stop.number)
        if number:
            self.ending = (
                f"stopped by {signal.Signals(number).name} at step {self.state.step}; "
                "--resume goes on"
            )
            self.exit_status = 128 + number
        return bool(number)

    def save_if_due(self) -> None:
        """Save at the intervals that were asked for."""
        keep_every = self.args.keep_every
        if self.due(self.args.save_interval) or (keep_every and self.due(keep_every)):
            self.save()

    def save(self) -> None:
        """Write the weights, numbered ones where they are due, and the resume file.

        What cannot be saved is said, and kept in `save_errors`; the run goes on.
        """
        self.state.metrics_bytes = self.reporter.sync()
        random_states = self.world.all_gather(get_random_states(self.world.device))
        if self.world.is_main:
            self._try("weights", lambda: self._save_weights(self.path))
            self._try("numbered", self._save_numbered)
            self._try("resume", lambda: self._save_resume(random_states))

    def report(self) -> None:
        """Write report.md and its curves, without which the run is no less finished; close up."""
        config = self.network.config
        if self.ending is not None:
            self.reporter.say(self.ending)
        if self.world.is_main:
            try:
                line = write_report(
                    self.path.parent / "logs" / self.path.stem,
                    ending=self.ending or "finished",
                    vocab_size=config.vocab_size,
                    from_scratch=self.args.from_weight == "none",
                    n_routed_experts=config.n_routed_experts if config.use_moe else 0,
                )
            except Exception as error:  # the run itself is done and saved
                line = f"no report: {error}"
            self.reporter.say(line)
        self.reporter.close()

    def end(self) -> int:
        """Say how the run ended; its exit status.

        Raises:
            UserError: if the last save failed, or the run could not go on.
        """
        if self.save_errors:
            raise UserError(f"the last save failed: {next(iter(self.save_errors.values()))}")
        if self.exit_status == 2:
            raise UserError(self.ending)
        self.world.log(f"saved {self.path}")
        return self.exit_status

    def _try(self, what: str, save: Callable[[], None]) -> bool:
        try:
            save()
        except SaveError as error:
            self.save_errors[what] = str(error)
            self.reporter.say(f"step {self.state.step}: {error}; going on")
            return False
        self.save_errors.pop(what, None)
        return True

    def _save_weights(self, path: Path) -> None:
        dtype = getattr(torch, self.args.save_dtype)
        if active_lora(self.network):
            save_lora(self.network, path, dtype, self.identity["--from_weight"])
            return
        save_weights(
            path, self.network, self.network.config, self.stage, self.tokenizer_hash, dtype
        )

    def _save_numbered(self) -> None:
        args, state = self.args, self.state
        for_good = args.keep_every is not None and state.step % args.keep_every == 0
        if not for_good and not (args.save_total_limit and self.due(args.save_interval)):
            return
        self._save_weights(self._numbered(state.step))
        if for_good or state.step in state.numbered:
            return
        state.numbered.append(state.step)
        while args.save_total_limit and len(state.numbered) > args.save_total_limit:
            path = self._numbered(state.numbered[0])
            with report_save_errors(path):
                path.unlink(missing_ok=True)
                path.with_suffix(".json").unlink(missing_ok=True)
            state.numbered.pop(0)

    def _numbered(self, step: int) -> Path:
        return self.path.with_name(f"{self.path.stem}_step{step}.pth")

    def _save_resume(self, random_states: list[dict[str, Any]]) -> None:
        save_resume(
            self.path,
            self.state,
            json_arguments(self.args),
            self.identity,
            trained_state(self.network),
            self.optimizer.state_dict(),
            self.scaler.state_dict(),
            random_states,
            saved_as=self.saved_as,
        )
        self.saved_as = "newest"


def peak_memory(device: torch.device) -> float | None:
    """The most bytes that this process has held: on a GPU, of its memory; else in RAM, if known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def average(sums: dict[str, dict[str, float]], count: str, prefix: str) -> dict[str, float]:
    """Means over a data set from its sums.

    Args:
        sums: by the name of the set: figures summed over its items, and how many these are.
        count: the figure that is their number.
        prefix: "val" or "test", which the names of the means begin with.

    Returns:
        The mean of each figure, of all sets together, and of each as `…/name` if there are several.
    """
    named = {f"/{name}": values for name, values in sums.items()} if len(sums) > 1 else {}
    figures = next(iter(sums.values()))
    together = {figure: sum(values[figure] for values in sums.values()) for figure in figures}
    return {
        f"{prefix}_{figure}{name}": value / values[count]
        for name, values in {"": together, **named}.items()
        for figure, value in values.items()
        if figure != count
    }
