"""The plan of a run, made before its first step, with warnings of settings that hurt."""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common import LESS_MEMORY, format_number
from model import MiniMindLM

from .compute import count_parameters, flops_per_token, peak_flops
from .curves import draw_lr_curve
from .findings import FEW_STEPS
from .memory import device_memory, estimate_memory

SMALL_HEAD = 32  # docs/quickstart.md, run 6: 4 heads of 32 learnt what 8 of 16 did not

# Learning rates that suit models of up to so many parameters: (parameters, lowest, usual, highest),
# smallest models first, the last for any size (inf).
LearningRates = Sequence[tuple[float, float, float, float]]

# Flags that limit a run, beside --epochs.
BUDGETS = ("max_steps", "max_tokens", "max_minutes", "tokens_per_parameter")


def usual_rate(rates: LearningRates, n_parameters: int) -> float:
    """The usual learning rate for a model of that size."""
    return next(usual for most, _, usual, _ in rates if n_parameters <= most)


@dataclass(frozen=True)
class Plan:
    """What is known of a run before its first step."""

    args: argparse.Namespace  # the stage's flags, with their defaults filled in
    model: MiniMindLM
    device: torch.device
    dtype: torch.dtype  # of matrix products
    world_size: int
    tokens_per_epoch: int  # target tokens, of all processes
    epochs: float | None  # passes over the data; None, as `total_steps`, if the clock ends the run
    total_steps: int | None
    warmup: int  # optimizer steps
    learning_rates: LearningRates
    sequences: int = 1  # of a row, such as the two sides of a pair

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, of all processes."""
        return self.args.batch_size * self.args.accumulation_steps * self.world_size

    def describe(self, lr_at: Callable[[int], float], picture: Path | None) -> list[str]:
        """The plan and its warnings, as lines.

        The learning rate, which `lr_at` gives for a step, is drawn into `picture`, a PNG, if any.
        """
        lines = self.size()
        try:
            if picture is not None and self.total_steps is not None:
                draw_lr_curve(picture, lr_at, self.total_steps)
                lines.append(f"learning rate: drawn in {picture}")
        except ImportError:
            lines.append("learning rate: pip install -r scripts/plot_requirements.txt to draw it")
        except OSError as error:
            lines.append(f"learning rate: not drawn ({error})")
        available = device_memory(self.device)
        if available is not None and self.device.type != "cuda":
            available /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # a host's processes share RAM
        warnings = [*self.setting_warnings(), *memory_warnings(self.memory(), available)]
        return lines + [f"warning: {warning}" for warning in warnings]

    def size(self) -> list[str]:
        """Parameters, tokens, steps, compute and memory, a line each."""
        args, counts = self.args, count_parameters(self.model)
        memory = self.memory()
        needed = f"about {sum(memory.values()) / 1e9:.2f} GB"
        if self.device.type == "cuda":
            needed += f" of the GPU's {device_memory(self.device) / 1e9:.2f}"
        if self.world_size > 1:
            needed += " in each process"
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items())
        kind, active, trained, frozen = "parameter", "", "", ""
        if counts.active < counts.total:
            kind = "active parameter"
            active = f", {format_number(counts.active)} active for each token"
        if counts.trained < counts.total:
            trained = f", {format_number(counts.trained)} of them trained"
            frozen = ", 4 for frozen ones"
        each = (
            f"each of {self.rows_per_step:,} rows of {args.max_seq_len:,} (batch "
            f"{args.batch_size} × accumulation {args.accumulation_steps} × processes "
            f"{self.world_size})"
        )
        lines = [f"parameters: {format_number(counts.total)}{active}{trained}", *self.budget()]
        if self.total_steps is None:
            lines.append(f"tokens: {format_number(self.tokens_per_epoch)} in the data")
            lines.append(f"steps: as many as there is time for, {each}")
        else:
            tokens = self.epochs * self.tokens_per_epoch
            epochs = f"{self.epochs:.3g} × {format_number(self.tokens_per_epoch)} = "
            # https://arxiv.org/abs/2203.15556 (20 tokens), https://arxiv.org/abs/2001.08361 (6ND)
            lines += [
                f"tokens: {epochs if self.epochs != 1 else ''}{format_number(tokens)}, or "
                f"{format_number(tokens / counts.active)} per {kind}; "
                "compute-optimal is about 20 (Chinchilla)",
                f"steps: {self.total_steps:,}, {each}",
                f"compute: {counts.flops * tokens:.3g} FLOPs (6 × {kind}s × tokens{frozen})",
            ]
        return [*lines, f"memory: {needed} ({parts})"]

    def budget(self) -> Iterator[str]:
        """What ends the run, if not the default number of epochs, and what follows from it."""
        args = vars(self.args)
        if not any(args[name] for name in BUDGETS):
            return
        given = [f"--{name} {args[name]:,.10g}" for name in ("epochs", *BUDGETS) if args[name]]
        first = ", whichever comes first" if len(given) > 1 else ""
        repeated = "the data are repeated for as long as there is time"
        if self.epochs is not None:
            repeated = f"the data are read {self.epochs:.3g} times"
        yield f"budget: {' '.join(given)}{first}; {repeated}"
        if args["max_minutes"]:
            yield (
                "budget: with --max_minutes the learning rate follows the clock, so that a resumed "
                "run does not repeat bit for bit what it would have been"
            )

    def memory(self) -> dict[str, float]:
        """Bytes of this process's training step, as `estimate_memory`."""
        return estimate_memory(
            self.model,
            rows=self.args.batch_size * self.sequences,
            row_length=self.args.max_seq_len,
            dtype=self.dtype,
            gradient_checkpointing=self.args.gradient_checkpointing,
            device=self.device,
            optimizer=self.args.optimizer,
        )

    def peak_tokens_per_second(self) -> float | None:
        """The speed of all processes at an MFU of 100 %; None where the GPU's peak is not known."""
        peak = peak_flops(self.device, self.dtype)
        if peak is None:
            return None
        return self.world_size * peak / flops_per_token(self.model, self.args.max_seq_len)

    def setting_warnings(self) -> Iterator[str]:
        """A line for each setting that is known to hurt: which one, why, what to do."""
        args, steps, warmup = self.args, self.total_steps, self.warmup
        size = count_parameters(self.model).total
        low, high = next((low, high) for most, low, _, high in self.learning_rates if size <= most)
        if not low <= args.learning_rate <= high:
            what = "high" if args.learning_rate > high else "low"
            yield (
                f"--learning_rate {args.learning_rate:g} is {what} for {format_number(size)} "
                f"parameters: try {low:g} to {high:g}"
            )
        if steps is not None and warmup > steps / 2:
            share = "all" if warmup >= steps else "more than half"
            yield (
                f"a warm-up of {warmup:,} steps takes {share} of the run's {steps:,}: "
                "lower --warmup_iters or --warmup_ratio (3 % is usual)"
            )
        for name in ("warmup_iters", "warmup_ratio"):
            if getattr(args, name) == 0:
                yield (
                    f"--{name} 0: the first updates, the least reliable, take the whole "
                    "--learning_rate: leave it out (3 % is usual)"
                )
        if steps is not None and steps < FEW_STEPS:
            yield (
                f"fewer than {FEW_STEPS} steps ({steps:,}) change little: lower --batch_size or "
                "--accumulation_steps, or train longer, or on more data"
            )
        head = args.dim // args.n_heads
        if head < SMALL_HEAD:
            yield (
                f"heads of {head} dimensions (--dim {args.dim} / --n_heads {args.n_heads}) are too "
                f"narrow, {SMALL_HEAD} to 128 are usual: fewer --n_heads, or a larger --dim"
            )
        if self.rows_per_step == 1:
            yield "--batch_size 1: one row's gradient is noise; raise it, or --accumulation_steps"
        tokens = self.rows_per_step * args.max_seq_len
        if tokens > 1e6:
            yield (
                f"{format_number(tokens)} tokens for each update ({self.rows_per_step:,} rows) "
                "make few updates: lower --batch_size or --accumulation_steps"
            )
        if args.weight_decay > 0.1:
            yield f"--weight_decay {args.weight_decay:g} makes models underfit: try 0.1"
        if args.dropout > 0.3:
            yield f"--dropout {args.dropout:g} drops too much: try 0.1, or 0 for a single epoch"
        if args.beta2 > 0.999:
            span = 1 / (1 - args.beta2)
            yield f"--beta2 {args.beta2:g} averages over {span:,.0f} steps, which is slow: try 0.95"
        if args.grad_clip > 10:
            yield f"--grad_clip {args.grad_clip:g} hardly limits the update of a bad batch: try 1"
        patience = args.early_stopping_patience
        if self.epochs is not None and self.epochs > 10 and not patience:
            yield f"{self.epochs:.3g} epochs memorise the text: try --early_stopping_patience 3"
        if patience == 1:
            yield "--early_stopping_patience 1 stops at one bad evaluation by chance: try 3"
        # The first evaluation is always progress, and the one at the end has nothing left to stop.
        elif patience and steps is not None and (steps - 1) // args.eval_interval <= patience:
            yield (
                f"--early_stopping_patience {patience} cannot stop a run of {steps:,} steps with "
                f"--eval_interval {args.eval_interval}: lower that one"
            )


def memory_warnings(memory: dict[str, float], available: float | None) -> list[str]:
    """A line if a training step takes more bytes than are known to be available to this process."""
    needed = sum(memory.values())
    if available is None or needed <= available:
        return []
    remedies = LESS_MEMORY
    if needed - memory["activations"] - memory["logits"] > available:
        remedies = "no batch is small enough: a smaller --dim or fewer --n_layers"
    return [
        f"about {needed / 1e9:.2f} GB are needed and {available / 1e9:.2f} GB are there, so that "
        f"memory may run out; {remedies}"
    ]
