"""The plan of a run, made before its first step, with warnings of settings that hurt."""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common import LESS_MEMORY, Text, format_number
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

    def describe(self, lr_at: Callable[[int], float], picture: Path | None) -> list[Text]:
        """The plan and its warnings, as lines.

        The learning rate, which `lr_at` gives for a step, is drawn into `picture`, a PNG, if any.
        """
        lines = self.size()
        try:
            if picture is not None and self.total_steps is not None:
                draw_lr_curve(picture, lr_at, self.total_steps)
                lines.append(Text("learning rate: drawn in {picture}", picture=picture))
        except ImportError:
            command = "pip install -r scripts/plot_requirements.txt"
            lines.append(Text("learning rate: {command} to draw it", command=command))
        except OSError as error:
            lines.append(Text("learning rate: not drawn ({error})", error=error))
        available = device_memory(self.device)
        if available is not None and self.device.type != "cuda":
            available /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # a host's processes share RAM
        warnings = [*self.setting_warnings(), *memory_warnings(self.memory(), available)]
        return lines + [Text("warning: {warning}", warning=warning) for warning in warnings]

    def size(self) -> list[Text]:
        """Parameters, tokens, steps, compute and memory, a line each."""
        args, counts = self.args, count_parameters(self.model)
        memory = self.memory()
        of_gpu = in_each = active = trained = frozen = ""
        if self.device.type == "cuda":
            size = device_memory(self.device) / 1e9
            of_gpu = Text(" of the GPU's {size:.2f}", size=size)
        if self.world_size > 1:
            in_each = Text(" in each process")
        kind, kinds = Text("parameter"), Text("parameters")
        if counts.active < counts.total:
            kind, kinds = Text("active parameter"), Text("active parameters")
            active = Text(", {n} active for each token", n=format_number(counts.active))
        if counts.trained < counts.total:
            trained = Text(", {n} of them trained", n=format_number(counts.trained))
            frozen = Text(", 4 for frozen ones")
        each = Text(
            "each of {rows:,} rows of {length:,} (batch {batch} × accumulation {accumulation} × "
            "processes {processes})",
            rows=self.rows_per_step,
            length=args.max_seq_len,
            batch=args.batch_size,
            accumulation=args.accumulation_steps,
            processes=self.world_size,
        )
        total, in_data = format_number(counts.total), format_number(self.tokens_per_epoch)
        lines = [
            Text("parameters: {n}{active}{trained}", n=total, active=active, trained=trained),
            *self.budget(),
        ]
        if self.total_steps is None:
            lines.append(Text("tokens: {n} in the data", n=in_data))
            lines.append(Text("steps: as many as there is time for, {each}", each=each))
        else:
            tokens = self.epochs * self.tokens_per_epoch
            shown = format_number(tokens)
            if self.epochs != 1:
                shown = Text("{n:.3g} × {each} = {all}", n=self.epochs, each=in_data, all=shown)
            # https://arxiv.org/abs/2203.15556 (20 tokens), https://arxiv.org/abs/2001.08361 (6ND)
            lines += [
                Text(
                    "tokens: {n}, or {ratio} per {kind}; compute-optimal is about 20 (Chinchilla)",
                    n=shown,
                    ratio=format_number(tokens / counts.active),
                    kind=kind,
                ),
                Text("steps: {n:,}, {each}", n=self.total_steps, each=each),
                Text(
                    "compute: {n:.3g} FLOPs (6 × {kinds} × tokens{frozen})",
                    n=counts.flops * tokens,
                    kinds=kinds,
                    frozen=frozen,
                ),
            ]
        needed = Text(
            "memory: about {all:.2f} GB{of_gpu}{in_each} (weights {weights:.2f}, gradients "
            "{gradients:.2f}, optimizer {optimizer:.2f}, activations {activations:.2f}, logits "
            "{logits:.2f})",
            all=sum(memory.values()) / 1e9,
            of_gpu=of_gpu,
            in_each=in_each,
            **{name: n_bytes / 1e9 for name, n_bytes in memory.items()},
        )
        return [*lines, needed]

    def budget(self) -> Iterator[Text]:
        """What ends the run, if not the default number of epochs, and what follows from it."""
        args = vars(self.args)
        if not any(args[name] for name in BUDGETS):
            return
        given = [f"--{name} {args[name]:,.10g}" for name in ("epochs", *BUDGETS) if args[name]]
        repeated = Text("the data are repeated for as long as there is time")
        if self.epochs is not None:
            repeated = Text("the data are read {n:.3g} times", n=self.epochs)
        yield Text(
            "budget: {flags}{first}; {repeated}",
            flags=" ".join(given),
            first=Text(", whichever comes first") if len(given) > 1 else "",
            repeated=repeated,
        )
        if args["max_minutes"]:
            yield Text(
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

    def setting_warnings(self) -> Iterator[Text]:
        """A line for each setting that is known to hurt: which one, why, what to do."""
        args, steps, warmup = self.args, self.total_steps, self.warmup
        size = count_parameters(self.model).total
        low, high = next((low, high) for most, low, _, high in self.learning_rates if size <= most)
        if not low <= args.learning_rate <= high:
            yield Text(
                "--learning_rate {rate:g} is {what} for {n} parameters: try {low:g} to {high:g}",
                rate=args.learning_rate,
                what=Text("high") if args.learning_rate > high else Text("low"),
                n=format_number(size),
                low=low,
                high=high,
            )
        if steps is not None and warmup > steps / 2:
            yield Text(
                "a warm-up of {warmup:,} steps takes {share} of the run's {steps:,}: "
                "lower --warmup_iters or --warmup_ratio (3 % is usual)",
                warmup=warmup,
                share=Text("all") if warmup >= steps else Text("more than half"),
                steps=steps,
            )
        for name in ("warmup_iters", "warmup_ratio"):
            if getattr(args, name) == 0:
                yield Text(
                    "--{name} 0: the first updates, the least reliable, take the whole "
                    "--learning_rate: leave it out (3 % is usual)",
                    name=name,
                )
        if steps is not None and steps < FEW_STEPS:
            yield Text(
                "fewer than {few} steps ({steps:,}) change little: lower --batch_size or "
                "--accumulation_steps, or train longer, or on more data",
                few=FEW_STEPS,
                steps=steps,
            )
        head = args.dim // args.n_heads
        if head < SMALL_HEAD:
            yield Text(
                "heads of {head} dimensions (--dim {dim} / --n_heads {n_heads}) are too narrow, "
                "{usual} to 128 are usual: fewer --n_heads, or a larger --dim",
                head=head,
                dim=args.dim,
                n_heads=args.n_heads,
                usual=SMALL_HEAD,
            )
        if self.rows_per_step == 1:
            yield Text(
                "--batch_size 1: one row's gradient is noise; raise it, or --accumulation_steps"
            )
        tokens = self.rows_per_step * args.max_seq_len
        if tokens > 1e6:
            yield Text(
                "{tokens} tokens for each update ({rows:,} rows) make few updates: lower "
                "--batch_size or --accumulation_steps",
                tokens=format_number(tokens),
                rows=self.rows_per_step,
            )
        if args.weight_decay > 0.1:
            yield Text("--weight_decay {x:g} makes models underfit: try 0.1", x=args.weight_decay)
        if args.dropout > 0.3:
            yield Text(
                "--dropout {x:g} drops too much: try 0.1, or 0 for a single epoch", x=args.dropout
            )
        if args.beta2 > 0.999:
            yield Text(
                "--beta2 {x:g} averages over {span:,.0f} steps, which is slow: try 0.95",
                x=args.beta2,
                span=1 / (1 - args.beta2),
            )
        if args.grad_clip > 10:
            yield Text(
                "--grad_clip {x:g} hardly limits the update of a bad batch: try 1",
                x=args.grad_clip,
            )
        patience = args.early_stopping_patience
        if self.epochs is not None and self.epochs > 10 and not patience:
            yield Text(
                "{n:.3g} epochs memorise the text: try --early_stopping_patience 3", n=self.epochs
            )
        if patience == 1:
            yield Text("--early_stopping_patience 1 stops at one bad evaluation by chance: try 3")
        # The first evaluation is always progress, and the one at the end has nothing left to stop.
        elif patience and steps is not None and (steps - 1) // args.eval_interval <= patience:
            yield Text(
                "--early_stopping_patience {patience} cannot stop a run of {steps:,} steps with "
                "--eval_interval {interval}: lower that one",
                patience=patience,
                steps=steps,
                interval=args.eval_interval,
            )


def memory_warnings(memory: dict[str, float], available: float | None) -> list[Text]:
    """A line if a training step takes more bytes than are known to be available to this process."""
    needed = sum(memory.values())
    if available is None or needed <= available:
        return []
    remedies = LESS_MEMORY
    if needed - memory["activations"] - memory["logits"] > available:
        remedies = Text("no batch is small enough: a smaller --dim or fewer --n_layers")
    warning = Text(
        "about {needed:.2f} GB are needed and {available:.2f} GB are there, so that memory may run "
        "out; {remedies}",
        needed=needed / 1e9,
        available=available / 1e9,
        remedies=remedies,
    )
    return [warning]
