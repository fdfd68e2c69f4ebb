"""A run in progress: its loops over steps, and what happens around them."""

import argparse
import copy
import math
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common import Text, UserError
from dataset import Mixture, make_loader
from diagnosis.memory import peak_memory
from diagnosis.report import write_report
from model import load_trained_state, mean_scores

from .budget import Budget
from .distributed import Distributed
from .guards import find_sample
from .record import Record, add_ending
from .resume import Tally, TrainState
from .samples import last_samples, write_samples
from .saving import Saver
from .schedule import warmup_steps
from .setup import Rows, Setup, Splits
from .signals import StopSignal
from .step import Batch, Score, StepTotals


@dataclass
class Run:
    """What a stage's loop calls by name."""

    setup: Setup
    data: Splits
    state: TrainState
    budget: Budget
    saver: Saver
    record: Record
    stop: StopSignal
    score: Score
    prompts: list[Tensor]  # ids of --sample_prompts
    peak_tokens_per_second: float | None = None  # of all processes, at an MFU of 100 %, if known
    ending: Text | None = None  # why the run stops before its last step
    exit_status: int = 0

    def __post_init__(self) -> None:
        self._elapsed_before = self.state.elapsed
        self._read_clock()
        self._check_patience()  # which may have run out before

    @property
    def args(self) -> argparse.Namespace:
        """The flags."""
        return self.setup.args

    @property
    def world(self) -> Distributed:
        """This process."""
        return self.setup.world

    @property
    def autocast(self) -> torch.autocast:
        """The context in which the model computes."""
        dtype = self.setup.dtype
        return torch.autocast(self.world.device.type, dtype, enabled=dtype != torch.float32)

    @property
    def complete(self) -> bool:
        """Whether the budget is used up."""
        return self.budget.is_used_up(self.state)

    @property
    def going_on(self) -> bool:
        """Whether there is another step to take."""
        return not self.complete and self.ending is None

    @property
    def schedule(self) -> tuple[float, float, float, float, float, str]:
        """The next step as `get_lr` takes it: its place, the run's steps, and the flags.

        The place follows what the budget counts. With epochs it is the rows seen, in steps of the
        size that the run began with: so the rate stays on one curve when the batch or the number of
        processes changes on the way. With minutes the run's steps are those that fit into the time
        that is left, as fast as those so far.
        """
        args = self.args
        step, total = self.budget.place(self.state)
        warmup = warmup_steps(args.warmup_iters, args.warmup_ratio, total)
        return step, total, args.learning_rate, warmup, args.min_lr, args.lr_decay

    def due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps, and at the end, happens now."""
        return self.state.step % interval == 0 or self.complete

    def loader(self, rows: Rows, **order: Any) -> DataLoader:
        """This process's micro-batches of rows; `order`: epoch, start, shuffle of `RowBatches`."""
        if isinstance(rows, Mixture) and order.get("shuffle"):
            order["order"] = rows.order(order["epoch"])
        return make_loader(
            rows,
            self.args.batch_size,
            seed=self.args.seed,
            rank=self.world.rank,
            world_size=self.world.world_size,
            lengths=getattr(rows, "lengths", None),  # pairs of like length share a batch
            collate_fn=self.setup.stage.collate,
            num_workers=self.args.num_workers,
            on_cuda=self.world.device.type == "cuda",
            **order,
        )

    def accumulations(self, model: nn.Module) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step that is left of the epoch, on the device.

        After each step what is due happens: a line of figures, validation of `model`, saving. A
        signal to stop lets the step finish.
        """
        args, state = self.args, self.state
        loader = self.loader(self.data.train, epoch=state.epoch, start=state.row, shuffle=True)
        micro_batches, started = map(self.world.to_device, loader), time.perf_counter()
        while batches := list(islice(micro_batches, args.accumulation_steps)):
            yield batches
            seconds = time.perf_counter() - started
            state.seconds += seconds
            state.tally.seconds += seconds
            self._read_clock()
            self._show_progress()
            self.log_if_due()
            self._rehearse_end_if_new()
            self.validate_if_due(model)
            if not self.going_on or self.check_signal():
                return
            if self.due(args.save_interval) or (args.keep_every and self.due(args.keep_every)):
                self.save()
            started = time.perf_counter()

    def _read_clock(self) -> None:
        """Count the time; with --max_minutes the main process's, so that all end at one step."""
        state, budget = self.state, self.budget
        state.elapsed = self._elapsed_before + time.perf_counter() - self.setup.started
        if budget.max_seconds is None:
            return
        own = (state.seconds, state.elapsed, budget.seconds_at_end(state))
        state.seconds, state.elapsed, state.reserve = self.world.broadcast(own)
        if budget.is_out_of_time(state):  # for good: what is kept for the end counts as spent
            state.elapsed = max(state.elapsed, budget.max_seconds)

    def _show_progress(self) -> None:
        left = self.budget.steps_left(self.state)
        note = Text("")
        if self.budget.max_seconds is not None:
            note = Text(
                "; about {steps:,} steps, {epochs:.3g} epochs in all",
                steps=self.state.step + left,
                epochs=self.budget.epochs_after(self.state, left),
            )
        self.record.advance(self.state.step, left, self.args.gpu_price, note)

    def add_step(
        self,
        batches: Sequence[Batch],
        totals: StepTotals,
        *,
        targets: float,
        tokens: float,
        lr: float,
        grad_norm: float,
    ) -> None:
        """Count a finished step, one whose update was skipped if a figure is not finite.

        `batches` are this process's; the other figures are of all processes: the loss is a mean
        over `targets`, weights of target tokens or pairs; `grad_norm` is that before clipping.
        """
        state, tally, sums = self.state, self.state.tally, totals.sums
        state.row += self.setup.rows_per_step
        if state.row >= len(self.data.train):
            state.epoch, state.row = state.epoch + 1, 0
        state.step += 1
        tally.steps += 1
        tally.lr = lr
        drawn = self._drawn(batches)
        load = totals.expert_load
        if load is not None:
            load = self.world.all_reduce_sum(load).tolist()

        def sample() -> str:
            losses = torch.stack([figures["loss"] for figures in totals.figures])
            return find_sample(self.world, self.data.train.dataset, batches, losses)

        if not math.isfinite(sums["loss"] + sums["aux_loss"] + grad_norm):
            self._skip(sums["loss"] + sums["aux_loss"], grad_norm, sample())
            return
        state.bad_in_row = 0
        state.tokens += round(tokens)
        state.tested = False
        tally.add(sums, targets, tokens, grad_norm, load or [])
        for name, number in drawn.items():
            tally.drawn[name] = tally.drawn.get(name, 0) + number
            state.drawn[name] = state.drawn.get(name, 0) + number
        mean, loss = state.spike_watch.mean, sums["loss"] / targets
        if state.spike_watch.is_spike(loss):
            state.spikes += 1
            spike = Text(
                "step {step}: loss spike: {loss:.3f}, running mean {mean:.3f}, first sample "
                "{where}",
                step=state.step,
                loss=loss,
                mean=mean,
                where=sample(),
            )
            self.record.print(spike)

    def _drawn(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Target tokens of a step from each source of a mixture, of all processes."""
        rows = self.data.train
        if not isinstance(rows, Mixture):
            return {}
        counts = np.zeros(len(rows.parts))
        for batch in batches:
            samples = batch["sample"].cpu().numpy()
            # Of a pair all chosen rows come first; parts of a row that is cut are neighbours.
            targets = (batch["loss_mask"] > 0).sum(1)
            targets = targets.view(self.setup.stage.sequences_per_row, len(samples), -1)
            targets = targets.sum((0, 2)).cpu().numpy()
            sources = rows.sources(samples)
            counts += np.bincount(sources[samples >= 0], targets[samples >= 0], len(counts))
        counts = torch.from_numpy(counts).to(self.world.device, self.world.sum_dtype)
        return dict(zip(rows.parts, self.world.all_reduce_sum(counts).tolist(), strict=True))

    @property
    def row_length(self) -> int:
        """Positions of the rows of the next step, with --length_schedule.

        They double in equal parts of the first half of the run, up to --max_seq_len.
        """
        shortest, longest = self.args.length_schedule, self.args.max_seq_len
        if shortest is None or shortest >= longest:
            return longest
        step, total = self.budget.place(self.state)
        doublings = math.ceil(math.log2(longest / shortest))
        return min(longest, shortest << int(2 * doublings * step / total))

    def _skip(self, loss: float, grad_norm: float, where: str) -> None:
        state, scaler = self.state, self.saver.scaler
        state.skipped += 1
        state.bad_in_row += 1
        if not math.isfinite(loss):
            what = Text("the loss is {loss}", loss=loss)
        elif scaler.is_enabled():
            what = Text(
                "gradient norm {norm} at loss scale {scale:g}, which float16 lowers by itself",
                norm=grad_norm,
                scale=scaler.get_scale(),
            )
        else:
            what = Text("gradient norm {norm}", norm=grad_norm)
        skipped = Text(
            "step {step}: {what}; update skipped; {where}", step=state.step, what=what, where=where
        )
        self.record.print(skipped)
        if state.bad_in_row >= self.args.max_bad_steps:
            self.ending = Text(
                "stopped: {count} steps in a row (--max_bad_steps) whose loss or gradient was not "
                "finite, the last with {where}; try a smaller --learning_rate (it is {rate:g})",
                count=state.bad_in_row,
                where=where,
                rate=self.args.learning_rate,
            )
            self.exit_status = 2
            state.bad_in_row = 0

    def log_if_due(self) -> None:
        """Report the steps since the last report."""
        state = self.state
        if not self.due(self.args.log_interval) and self.ending is None:
            return
        figures = state.tally.means()
        figures["skipped"], figures["spikes"] = state.skipped, state.spikes
        if self.peak_tokens_per_second:
            figures["mfu"] = round(figures["tokens_per_second"] / self.peak_tokens_per_second, 4)
        memory = peak_memory(self.world.device)
        if memory is not None:
            figures["memory_gb"] = round(memory / 1e9, 3)
        self.record.log(state, figures)
        state.tally = Tally()

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, sets: dict[str, Rows], prefix: str
    ) -> dict[str, float] | None:
        """Score a model on data sets by name; as `mean_scores`, None if a signal to stop came."""
        world, was_training, started = self.world, model.training, time.perf_counter()
        model.eval()
        sums = {}
        for name, rows in sets.items():
            totals: dict[str, Tensor] = {}
            for batch in self.loader(rows):
                if self.check_signal():
                    return None
                with self.autocast:
                    scores = self.score(model, world.to_device(batch))
                for figure, values in scores.items():
                    totals[figure] = totals.get(figure, 0) + values.sum(dtype=world.sum_dtype)
            values = world.all_reduce_sum(torch.stack(list(totals.values()))).tolist()
            sums[name] = dict(zip(totals, values, strict=True))
            if self.setup.stage.scores_text:
                sums[name]["text_bytes"] = rows.dataset.text_bytes
        model.train(was_training)
        seconds = time.perf_counter() - started
        self.budget.seconds_per_row = seconds / sum(map(len, sets.values()))
        return mean_scores(sums, prefix)

    def validate_if_due(self, model: nn.Module) -> None:
        """Evaluate once after each step that is due; save the best weights, or stop early."""
        val, state = self.data.val, self.state
        if not val or not self.due(self.args.eval_interval) or state.evaluated_at == state.step:
            return
        if not self.complete and self.budget.is_near_end(state):
            return  # the evaluation at the end would come too late
        scores = self.evaluate(model, val, "val")
        if scores is None:
            return
        args = self.args
        self.record.log_scores(state, scores)
        if args.sample_prompts and self.world.is_main:
            started = time.perf_counter()
            texts = write_samples(self.setup, self.prompts)
            self.record.log_samples(state, list(zip(args.sample_prompts, texts, strict=True)))
            self.budget.seconds_per_sampling = time.perf_counter() - started
        state.evaluated_at = state.step
        min_delta = args.early_stopping_min_delta if args.early_stopping_patience else 0.0
        if scores["val_loss"] < state.best_loss - min_delta:
            state.best_loss, state.best_step = scores["val_loss"], state.step
            state.evaluations_since_best = 0
            if args.save_best or args.early_stopping_patience or args.test_data_path:
                state.best_saved = self.saver.save_best(state)
        else:
            state.evaluations_since_best += 1
        self._check_patience()

    def _check_patience(self) -> None:
        patience, state = self.args.early_stopping_patience, self.state
        if patience and state.evaluations_since_best >= patience and not self.complete:
            self.ending = Text(
                "stopped early: {count} evaluations (--early_stopping_patience) without progress "
                "since step {step}",
                count=state.evaluations_since_best,
                step=state.best_step,
            )

    def check_signal(self) -> bool:
        """End the run if any process got a signal to stop; whether it ends."""
        number = self.world.all_reduce_max(self.stop.number)
        if number:
            name = signal.Signals(number).name
            self.ending = Text(
                "stopped by {name} at step {step}; --resume goes on",
                name=name,
                step=self.state.step,
            )
            self.exit_status = 128 + number
        return bool(number)

    def save(self) -> None:
        """Write the weights, numbered ones where they are due, and the resume file."""
        started = time.perf_counter()
        self.state.metrics_bytes = self.record.sync()
        self.state.budget_used = self.complete
        self.saver.save(self.state, self.due(self.args.save_interval))
        self.budget.seconds_per_save = time.perf_counter() - started

    def _rehearse_end_if_new(self) -> None:
        """With --max_minutes, do after the first step what ends a run, to know how long it takes.

        Validation is not part of it, which the time of a step tells well enough.
        """
        budget = self.budget
        if budget.max_seconds is None or budget.seconds_per_save is not None or not self.going_on:
            return
        self.save()
        if self.world.is_main:
            started = time.perf_counter()
            last_samples(self.setup, self.data)
            sampled = time.perf_counter()
            self._write_report(None)
            budget.seconds_per_sampling = sampled - started
            budget.seconds_per_report = time.perf_counter() - sampled

    def _write_report(self, ending: Text | None) -> Text:
        """Write how the run ended, if it has, and its report; a line for the user."""
        try:
            if ending is not None:
                add_ending(self.record.folder / "config.json", ending)
            return write_report(self.record.folder, self.world.language)
        except Exception as error:  # the run itself is done and saved
            return Text("no report: {error}", error=error)

    def finish(self) -> int:
        """Score the test data, save, write the report, and print how the run ended.

        Returns 130 or 143 if a signal stopped the run, else 0. UserError if the last save failed,
        or the run could not go on.
        """
        if self.data.test is not None and self.exit_status == 0 and not self.state.tested:
            self.save()  # the test may take its time
            self._test(self.data.test)
        self.save()
        if self.ending is not None:
            self.record.print(self.ending)
        if drawn := self.state.drawn:
            parts = [f"{name} {n / sum(drawn.values()):.2%}" for name, n in drawn.items()]
            self.record.print(Text("target tokens by source: {parts}", parts=parts))
        if self.exit_status == 0 and self.world.is_main:
            for prompt, text in last_samples(self.setup, self.data):
                self.record.print(Text("sample {prompt!r} → {text!r}", prompt=prompt, text=text))
        if self.world.is_main:
            self.record.print(self._write_report(self.ending or Text("finished")))
        self.record.close()
        if self.saver.errors:
            raise UserError(f"the last save failed: {next(iter(self.saver.errors.values()))}")
        if self.exit_status == 2:
            raise UserError(self.ending)
        self.world.log(Text("saved {path}", path=self.setup.path))
        if self.exit_status == 0:
            for command in next_commands(self.setup):
                self.world.log(Text("next: {command}", command=command))
        return self.exit_status

    def _test(self, rows: Rows) -> None:
        """Score the best weights, or where nothing was validated the last ones."""
        model = self.setup.raw_model
        if self.state.best_saved:
            model = copy.deepcopy(model)
            load_trained_state(model, self.saver.best_state())
        scores = self.evaluate(model, {"": rows}, "test")
        if scores is not None:
            self.record.log_scores(self.state, scores)
            self.state.tested = True


def next_commands(setup: Setup) -> list[str]:
    """The commands that use what a run has made, as they are typed into a shell."""
    weights = setup.path.as_posix()
    if setup.path.parent.name == "lora":
        flags = ["--out_dir", setup.args.out_dir.as_posix(), "--lora_name", weights]
        return [shlex.join(["python", "eval_model.py", *flags])]
    commands = [shlex.join(["python", "eval_model.py", "--weight", weights])]
    if not setup.stage.chats:
        tune = ["python", "train_full_sft.py", "--from_weight", weights]
        command = f"{shlex.join(tune)} --data_path chats.jsonl"
        commands.append(Text("{command}  # your conversations", command=command))
    return commands
