"""What a run will do and cost, said before its first step."""

import argparse
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import write_atomically
from common.units import short_number
from model import LMConfig, MiniMindLM
from model.model import MOEFeedForward

from .memory import device_memory, estimate_memory

# Dense peaks in 10¹² FLOP/s from NVIDIA's data sheets and architecture white papers, GPU by name:
# fp16 and bf16 (tensor cores, sums in fp32), and fp32 as PyTorch computes it unless told otherwise,
# without TF32. Names that stand for several GPUs are left out.
PEAKS = {
    "A10": (125, 31.2),
    "A30": (165, 10.3),
    "A40": (149.7, 37.4),
    "A100": (312, 19.5),
    "A100 PCIE": (312, 19.5),
    "A100 SXM4": (312, 19.5),
    "H100": (989.4, 66.9),  # SXM
    "H100 PCIE": (756, 51),
    "H200": (989.4, 66.9),
    "L4": (121, 30.3),
    "L40": (181, 90.5),
    "L40S": (362, 91.6),
    "RTX 3070": (40.6, 20.3),
    "RTX 3090": (71, 35.6),
    "RTX 3090 TI": (80, 40),
    "RTX 4080": (97.5, 48.7),
    "RTX 4090": (165.2, 82.6),
    "RTX 5090": (209.5, 104.8),
    "RTX A6000": (154.8, 38.7),
    "T4": (65, 8.1),
    "V100 PCIE": (112, 14),
    "V100 SXM2": (125, 15.7),
}
WITHOUT_BFLOAT16 = ("T4", "V100 PCIE", "V100 SXM2")

CURVE_POINTS = 2000

FEW_STEPS = 200
SMALL_HEAD = 32  # docs/quickstart.md, run 6: 4 heads of 32 learnt what 8 of 16 did not

# Learning rates that suit models of up to so many parameters: (parameters, lowest, highest).
LearningRates = Sequence[tuple[float, float, float]]


def count_parameters(model: MiniMindLM, frozen_only: bool = False) -> tuple[int, int]:
    """All (or all frozen) parameters, and those that take part in the computation of one token.

    The two differ in a mixture of experts, where a token visits the best few.
    """

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if not (frozen_only and p.requires_grad))

    total, idle = count(model), 0
    for module in model.modules():
        if isinstance(module, MOEFeedForward):
            idle += (len(module.experts) - module.gate.top_k) * count(module.experts[0])
    return total, total - idle


def flops_per_token(
    config: LMConfig, active_parameters: int, row_length: int, frozen: int = 0
) -> int:
    """Floating-point operations of training, forward and backward, by PaLM's count.

    6 for each parameter, 12 · layers · dim · row_length for attention (https://arxiv.org/abs/2204.02311,
    appendix B): every query with every key of its row, as the convention has it, causal or not.
    What gradient checkpointing computes twice counts once. The `frozen` ones among the active
    parameters count 4 instead of 6, as no gradient of their own is computed.
    """
    return 6 * active_parameters - 2 * frozen + 12 * config.n_layers * config.dim * row_length


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The most FLOP/s that a GPU reaches in dense matrix products; None where it is not known.

    Args:
        device: a CUDA device, or another, of which nothing is known.
        dtype: float32, bfloat16 or float16.
    """
    if device.type != "cuda":
        return None
    # "NVIDIA A100-SXM4-80GB" → "A100 SXM4". A part of a GPU keeps its "MIG", and is not found.
    words = re.split(r"[\s-]+", torch.cuda.get_device_name(device).upper())
    left_out = r"NVIDIA|TESLA|GEFORCE|\d+GB|HBM3"
    name = " ".join(word for word in words if not re.fullmatch(left_out, word))
    if name not in PEAKS or (dtype == torch.bfloat16 and name in WITHOUT_BFLOAT16):
        return None
    half, single = PEAKS[name]
    return 1e12 * (single if dtype == torch.float32 else half)


def peak_tokens_per_second(
    model: MiniMindLM, row_length: int, device: torch.device, dtype: torch.dtype
) -> float | None:
    """Tokens a second of training at a GPU's peak; None where that is not known."""
    peak = peak_flops(device, dtype)
    if peak is None:
        return None
    _, active = count_parameters(model)
    _, frozen = count_parameters(model, frozen_only=True)
    return peak / flops_per_token(model.config, active, row_length, frozen)


def plan_run(
    args: argparse.Namespace,
    network: MiniMindLM,
    world: Any,
    *,
    tokens_per_epoch: int,
    total_steps: int,
    dtype: torch.dtype,
    learning_rates: LearningRates,
    folder: Path,
    sequences: int = 1,
) -> list[str]:
    """The plan of a run and warnings, as lines; draws the learning rate to `folder`/lr.png.

    Args:
        args, network, world, tokens_per_epoch, total_steps, dtype, sequences: as for `plan_lines`.
        learning_rates: as for `warnings_for`.
        folder: of the run's record.
    """
    lines = plan_lines(
        args,
        network,
        world,
        tokens_per_epoch=tokens_per_epoch,
        total_steps=total_steps,
        dtype=dtype,
        sequences=sequences,
    )
    from training.schedule import get_lr, warmup_steps

    warmup = warmup_steps(args.warmup_iters, args.warmup_ratio, total_steps)
    if world.is_main:
        # That of the run whose record this is stays as it is.
        picture = folder / ("lr.dry_run.png" if args.dry_run else "lr.png")

        def rate(step: int) -> float:
            return get_lr(step, total_steps, args.learning_rate, warmup, args.min_lr, args.lr_decay)

        try:
            draw_lr_curve(picture, rate, total_steps)
            lines.append(f"learning rate: drawn in {picture}")
        except ImportError:
            lines.append("learning rate: pip install -r scripts/requirements.txt to have it drawn")
        except OSError as error:
            lines.append(f"learning rate: not drawn ({error})")
    warnings = warnings_for(
        args,
        learning_rates=learning_rates,
        parameters=sum(p.numel() for p in network.parameters()),
        total_steps=total_steps,
        warmup=warmup,
        rows_per_step=args.batch_size * args.accumulation_steps * world.world_size,
    )
    available = device_memory(world.device)
    if available is not None:
        # Each process has a GPU of its own; those of a host share its RAM.
        sharing = 1 if world.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        memory = step_memory(args, network, world.device, dtype, sequences)
        warnings += memory_warnings(memory, available / sharing)
    return lines + [f"warning: {warning}" for warning in warnings]


def plan_lines(
    args: argparse.Namespace,
    network: MiniMindLM,
    world: Any,
    *,
    tokens_per_epoch: int,
    total_steps: int,
    dtype: torch.dtype,
    sequences: int = 1,
) -> list[str]:
    """What the run will do: parameters, tokens, steps, compute and memory, a line each.

    Args:
        args: the stage's flags.
        network: the bare model.
        world: this process.
        tokens_per_epoch: of all processes.
        total_steps: optimizer steps of the run.
        dtype: of matrix products.
        sequences: that a row stands for, as the two sides of a pair.
    """
    total, active = count_parameters(network)
    frozen, active_frozen = count_parameters(network, frozen_only=True)
    tokens = args.epochs * tokens_per_epoch
    rows = args.batch_size * args.accumulation_steps * world.world_size
    memory = step_memory(args, network, world.device, dtype, sequences)
    needed = f"about {sum(memory.values()) / 1e9:.2f} GB"
    if world.device.type == "cuda":
        there = torch.cuda.get_device_properties(world.device).total_memory
        needed += f" of the GPU's {there / 1e9:.2f}"
    if world.world_size > 1:
        needed += " in each process"
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items())
    kind = "parameter" if active == total else "active parameter"
    only_active = "" if active == total else f", {short_number(active)} active for each token"
    trained = f", {short_number(total - frozen)} of them trained" if frozen else ""
    less_if_frozen = ", 4 for frozen ones" if frozen else ""
    epochs = f"{args.epochs} × {short_number(tokens_per_epoch)} = " if args.epochs > 1 else ""
    # https://arxiv.org/abs/2203.15556 (20 tokens), https://arxiv.org/abs/2001.08361 (6ND)
    return [
        f"parameters: {short_number(total)}{only_active}{trained}",
        f"tokens: {epochs}{short_number(tokens)}, or {short_number(tokens / active)} per {kind} "
        "(compute-optimal is about 20: Chinchilla)",
        f"steps: {total_steps:,}, each of {rows:,} rows of {args.max_seq_len:,} (batch "
        f"{args.batch_size} × accumulation {args.accumulation_steps} × processes "
        f"{world.world_size})",
        f"compute: {(6 * active - 2 * active_frozen) * tokens:.3g} FLOPs "
        f"(6 × {kind}s × tokens{less_if_frozen})",
        f"memory: {needed} ({parts})",
    ]


def step_memory(
    args: argparse.Namespace,
    network: MiniMindLM,
    device: torch.device,
    dtype: torch.dtype,
    sequences: int = 1,
) -> dict[str, float]:
    """What a process's training step takes, as `estimate_memory`; arguments as for `plan_lines`."""
    total, _ = count_parameters(network)
    frozen, _ = count_parameters(network, frozen_only=True)
    return estimate_memory(
        network.config,
        total,
        trained=total - frozen,
        rows=args.batch_size * sequences,
        row_length=args.max_seq_len,
        dtype=dtype,
        gradient_checkpointing=args.gradient_checkpointing,
        device=device,
    )


def memory_warnings(memory: dict[str, float], available: float) -> list[str]:
    """A line if a training step takes more memory than there is, with what helps.

    Args:
        memory: bytes, as of `estimate_memory`.
        available: bytes for this process.
    """
    needed = sum(memory.values())
    if needed <= available:
        return []
    model = needed - memory["activations"] - memory["logits"]
    from training.guards import LESS_MEMORY

    remedies = LESS_MEMORY
    if model > available:
        remedies = "no batch is small enough: a smaller --dim or fewer --n_layers"
    return [
        f"about {needed / 1e9:.2f} GB are needed and {available / 1e9:.2f} GB are there, so that "
        f"memory may run out; {remedies}"
    ]


def warnings_for(
    args: argparse.Namespace,
    *,
    learning_rates: LearningRates,
    parameters: int,
    total_steps: int,
    warmup: int,
    rows_per_step: int,
) -> list[str]:
    """A line for each setting that is known to hurt: which one, why, what to do.

    Args:
        args: the stage's flags, with their defaults filled in.
        learning_rates: the stage's ranges, smallest models first, the last for any size (inf).
        parameters: of the model, all experts included.
        total_steps: optimizer steps of the run.
        warmup: those of the warm-up.
        rows_per_step: rows of an optimizer step, of all processes.
    """
    found = []
    low, high = next((low, high) for most, low, high in learning_rates if parameters <= most)
    lr, size, advice = args.learning_rate, short_number(parameters), f"try {low:g} to {high:g}"
    if lr > high:
        found.append(
            f"--learning_rate {lr:g} is high for {size} parameters, which may diverge: {advice}"
        )
    elif lr < low:
        found.append(
            f"--learning_rate {lr:g} is low for {size} parameters, which learn slowly so: {advice}"
        )
    if warmup > total_steps / 2:
        share = "all" if warmup >= total_steps else "more than half"
        found.append(
            f"a warm-up of {warmup:,} steps takes {share} of the run's {total_steps:,}: "
            "lower --warmup_iters or --warmup_ratio (3 % is usual)"
        )
    for name in ("warmup_iters", "warmup_ratio"):
        if getattr(args, name) == 0:
            found.append(
                f"--{name} 0: the first updates are the least certain and take the whole "
                "--learning_rate, which may spoil the weights: leave it out (3 % is usual)"
            )
    if total_steps < FEW_STEPS:
        found.append(
            f"fewer than {FEW_STEPS} steps ({total_steps:,}) teach little: a smaller --batch_size "
            "or --accumulation_steps, more --epochs or more data give more"
        )
    head = args.dim // args.n_heads
    if head < SMALL_HEAD:
        found.append(
            f"heads of {head} dimensions (--dim {args.dim} / --n_heads {args.n_heads}) see too "
            f"little each, {SMALL_HEAD} to 128 are usual: fewer --n_heads, or a larger --dim"
        )
    if rows_per_step == 1:
        found.append(
            "--batch_size 1: the gradient of a single row is mostly noise; raise it, or "
            "--accumulation_steps where memory is short"
        )
    tokens = rows_per_step * args.max_seq_len
    if tokens > 1e6:
        found.append(
            f"{short_number(tokens)} tokens for each update ({rows_per_step:,} rows) make few, "
            "hardly better ones: lower --batch_size or --accumulation_steps"
        )
    if args.weight_decay > 0.1:
        found.append(
            f"--weight_decay {args.weight_decay:g} pulls hard towards 0 and underfits: try 0.1"
        )
    if args.dropout > 0.3:
        found.append(
            f"--dropout {args.dropout:g} leaves too little of each vector to learn from: try 0.1, "
            "or 0 for a single epoch"
        )
    if args.beta2 > 0.999:
        found.append(
            f"--beta2 {args.beta2:g} averages over {1 / (1 - args.beta2):,.0f} steps and is slow "
            "to notice a rise of the gradients: try 0.95"
        )
    if args.grad_clip > 10:
        found.append(
            f"--grad_clip {args.grad_clip:g} lets a bad batch through that can undo the run: try 1"
        )
    patience = args.early_stopping_patience
    if args.epochs > 10 and not patience:
        found.append(
            f"--epochs {args.epochs}: text that is read more than a few times is learnt by heart; "
            "watch a validation set, with --early_stopping_patience 3"
        )
    if patience and patience < 2:
        found.append(
            f"--early_stopping_patience {patience} stops at the first evaluation that is no "
            "better, as one by chance may be: try 3"
        )
    # The first evaluation is always progress, and the one at the end has nothing left to stop.
    elif patience and (total_steps - 1) // args.eval_interval <= patience:
        found.append(
            f"--early_stopping_patience {patience} cannot stop a run of {total_steps:,} steps with "
            f"--eval_interval {args.eval_interval}: lower that one"
        )
    return found


def draw_lr_curve(path: Path, rate: Callable[[int], float], total_steps: int) -> None:
    """Draw the learning rate over the optimizer steps to a PNG file.

    Args:
        path: the file.
        rate: the learning rate of a step.
        total_steps: of the run.

    Raises:
        ImportError: without matplotlib.
        OSError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    steps = range(0, total_steps, math.ceil(total_steps / CURVE_POINTS) or 1)
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [rate(step) for step in steps])
    axes.set(xlabel="step", ylabel="learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 2))
    axes.grid(alpha=0.3)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))
