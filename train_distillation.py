"""Distillation: a student learns from the data's answers and from a larger model's distribution.

    python train_distillation.py --teacher_weight out/full_sft_768.pth
    python train_distillation.py --teacher_weight out/full_sft_640_moe.pth --cache_teacher 32
    torchrun --nproc_per_node 4 train_distillation.py --teacher_weight out/full_sft_768.pth

The student, of the shape that --dim and the other flags give, starts from out/pretrain_512.pth (the
number is --dim; a mixture of experts ends in _moe) and becomes out/distill_512.pth. The teacher has
the same tokenizer and any shape, which the .json file beside its weights holds.
"""

import common.interrupt  # for Ctrl-C during the imports below

import argparse
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import training
from dataset import PackedRows, PaddedRows, TeacherTopK, collate_with_teacher, make_loader
from model import (
    MiniMindLM,
    find_targets,
    load_model,
    resolve_weights,
    target_logits,
    weights_hash,
)
from sample_world import SAMPLE, ensure_sample

# By optimizer (parameters up to, lowest, usual, highest): the usual learning rate is taken without
# --learning_rate, one outside makes a warning.
RATES = ((1e7, 1e-5, 4e-4, 3e-3), (6e7, 1e-5, 2e-4, 5e-4), (math.inf, 5e-6, 5e-5, 1e-4))
LEARNING_RATES = dict.fromkeys(("adamw", "muon"), RATES)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = training.make_stage_parser(
        "Distill a MiniMind into a smaller one, on conversations.",
        data_path=SAMPLE / "sft.jsonl",
        from_weight="pretrain",
        optimizer="adamw",
        weight_decay=0.01,
        epochs=1,
        batch_size=32,
        grad_clip=1.0,
        max_seq_len=512,
    )
    add = parser.add_argument_group("teacher").add_argument
    name = "a stage's name, or its .pth file with a .json beside it"
    add("--teacher_weight", type=common.name_or_path, required=True, help=name)
    weight = "weight of the cross-entropy with the data; the rest is that of the KL divergence"
    add("--alpha", type=common.unit_interval, default=0.5, help=weight)
    divisor = "divides the logits of both models in the KL divergence"
    add("--temperature", type=common.positive_float, default=2.0, help=divisor)
    cached = "run the teacher once, and cache its TOP most probable tokens of each target"
    add("--cache_teacher", type=common.positive_int, metavar="TOP", help=cached)
    training.add_chat_arguments(parser)
    return training.parse_stage_arguments(parser)


def divergence(
    student: Tensor, teacher: Tensor | tuple[Tensor, Tensor], temperature: float
) -> Tensor:
    """KL(teacher ‖ student) of the distributions softmax(logits / temperature), in nats: (N,).

    `student` and `teacher` are (N, vocab) logits. Or `teacher` is ids and log-probabilities, at
    this temperature, of its most probable tokens, (N, top) each; then all others count as one.
    """
    student = F.log_softmax(student / temperature, dim=-1)
    if isinstance(teacher, Tensor):
        teacher = F.log_softmax(teacher / temperature, dim=-1)
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    ids, teacher = teacher
    student = student.gather(-1, ids)
    named = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    others, others_of_student = ((1 - x.exp().sum(-1)).clamp(min=1e-7) for x in (teacher, student))
    return named + others * (others.log() - others_of_student.log())


def student_losses(
    model: nn.Module, teacher: nn.Module | None, batch: dict[str, Tensor], args: argparse.Namespace
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor | None]:
    """alpha · cross-entropy + (1 − alpha) · T² · KL(teacher ‖ student) of every target, weighted.

    T² makes up for the gradient of the softened divergence, which shrinks by as much (Hinton,
    Vinyals and Dean, https://arxiv.org/abs/1503.02531). Without `teacher`, the batch holds its
    tokens.

    Returns the losses, (N,) fp32; the sums of both parts, `cross_entropy` and `kl`, weighted alike;
    the auxiliary loss and the load of each expert.
    """
    where, ids, weights = find_targets(batch)
    ours, aux_loss, load = target_logits(model, batch, where)
    if teacher is not None:
        with torch.no_grad():
            theirs, *_ = target_logits(teacher, batch, where)
    elif len(where):
        theirs = (batch["teacher_ids"], batch["teacher_logps"])
    else:
        theirs = ours  # of no targets
    cross_entropy = F.cross_entropy(ours, ids, reduction="none") * weights
    kl = divergence(ours, theirs, args.temperature) * weights
    losses = args.alpha * cross_entropy + (1 - args.alpha) * args.temperature**2 * kl
    sums = {"cross_entropy": cross_entropy.detach().sum(), "kl": kl.detach().sum()}
    return losses, sums, aux_loss, load


def open_teacher(setup: training.Setup) -> MiniMindLM:
    """The teacher on the CPU, in eval mode; without a .json file it has the student's shape."""
    args, shape = setup.args, setup.raw_model.config
    path = resolve_weights("--teacher_weight", args.teacher_weight, args.out_dir, {})
    teacher = load_model(path, shape, setup.tokenizer_hash)
    training.check_context(args.max_seq_len, teacher.config)
    return teacher.eval()


@torch.no_grad()
def score_rows(
    teacher: nn.Module,
    rows: PackedRows | PaddedRows,
    args: argparse.Namespace,
    world: training.Distributed,
    dtype: torch.dtype,
) -> Iterator[tuple[np.ndarray, np.ndarray, list[int]]]:
    """The teacher's most probable tokens for every target, as `TeacherTopK` takes them."""
    started, device = time.perf_counter(), world.device
    teacher.to(device)
    on_cuda = device.type == "cuda"
    loader = make_loader(
        rows, args.batch_size, seed=args.seed, num_workers=args.num_workers, on_cuda=on_cuda
    )
    for batch in loader:
        counts = (batch["loss_mask"] > 0).sum(1).tolist()
        batch = world.to_device(batch)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, *_ = target_logits(teacher, batch, find_targets(batch)[0])
        top = F.log_softmax(logits / args.temperature, dim=-1).topk(args.cache_teacher)
        yield top.indices.cpu().numpy(), top.values.cpu().numpy(), counts
    seconds = time.perf_counter() - started
    scored = common.Text(
        "teacher: scored {rows:,} rows in {seconds:.1f} s", rows=len(rows), seconds=seconds
    )
    world.log(scored)


def train_epoch(
    run: training.Run,
    model: nn.Module,
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Take the steps that are left of the epoch, or until the run ends.

    The loss of a step is the mean over the target tokens, weighted by the loss mask, of all its
    micro-batches and processes, so these are counted first. The auxiliary loss is one over rows.
    """
    world = run.world
    model.train()
    for batches in run.accumulations(model):
        weights, tokens, rows = training.count_targets(batches, world)
        lr = training.get_lr(*run.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr / run.args.learning_rate

        totals = training.StepTotals(world)
        for i, batch in enumerate(batches):
            # DDP averages gradients over processes, once for all micro-batches of a step.
            sync_gradients = not world.is_distributed or i == len(batches) - 1
            with nullcontext() if sync_gradients else model.no_sync():
                with run.autocast:
                    losses, figures, aux_loss, expert_load = student_losses(
                        model, teacher, batch, run.args
                    )
                aux_loss = aux_loss * training.rows_with_text(batch) / rows
                loss = losses.sum() / weights + aux_loss
                scaler.scale(loss * world.world_size).backward()
            totals.add(losses, aux_loss, expert_load, **figures)

        sums = totals.add_up()
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), run.args.grad_clip).item()
        if math.isfinite(sums["loss"] + sums["aux_loss"] + grad_norm):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        run.add_step(batches, totals, targets=weights, tokens=tokens, lr=lr, grad_norm=grad_norm)


def train(
    setup: training.Setup,
    teacher: MiniMindLM | None,
    data: training.Splits,
    stop: training.StopSignal,
) -> int:
    """Go through the epochs, test, save and report; the exit status."""
    args, world = setup.args, setup.world
    training.choose_settings(setup, data)
    raw_model = setup.raw_model.to(world.device)
    if teacher is not None:
        teacher.to(world.device)
    optimizer = training.make_optimizer(raw_model, args, setup.dtype)
    scaler = torch.amp.GradScaler(world.device.type, enabled=setup.dtype == torch.float16)
    run = training.start_run(setup, data, stop, optimizer, scaler, training.score_tokens)
    if run is None:
        return 0
    model = torch.compile(raw_model) if args.compile else raw_model
    if args.compile and teacher is not None:
        teacher = torch.compile(teacher)
    if world.is_distributed:
        model = DistributedDataParallel(model, world.device_ids)
    run.validate_if_due(model)  # first of the starting weights
    while run.going_on:
        train_epoch(run, model, teacher, optimizer, scaler)
    return run.finish()


def main() -> int:
    """Check the flags, open the data, train; the exit status."""
    args = parse_args()
    identity = ("alpha", "temperature", "cache_teacher", *training.CHAT_IDENTITY)
    setup = training.prepare(
        args, training.Stage("distill", LEARNING_RATES, identity, collate_with_teacher)
    )
    teacher = open_teacher(setup)
    setup.frozen["--teacher_weight"] = weights_hash(teacher)
    size = sum(p.numel() for p in teacher.parameters())
    note = common.Text(
        "teacher {name}: {size:.2f} M parameters", name=args.teacher_weight, size=size / 1e6
    )
    if args.cache_teacher and args.cache_teacher > len(setup.tokenizer):
        raise common.UserError(
            f"--cache_teacher {args.cache_teacher}: there are {len(setup.tokenizer)} tokens"
        )
    if not args.cache_teacher:
        note = common.Text(
            "{teacher}; {memory:.2f} GB, and its logits, come on top of the memory below",
            teacher=note,
            memory=4 * size / 1e9,
        )
    setup.notes.append(note)
    with training.lock_run(setup.path, setup.world, args.dry_run):
        training.find_resume(setup)
        training.load_first_weights(setup)
        data = training.open_chat_splits(setup, ensure_sample)
        if args.cache_teacher and not args.dry_run:
            # Before the processes connect: the others wait for a file, which no time-out ends.
            key = f"{setup.frozen['--teacher_weight'][:16]}_{args.temperature:g}_{setup.dtype}"
            key = key.replace("torch.", "")

            def add_teacher(rows: training.Rows) -> TeacherTopK:
                score = partial(score_rows, teacher, rows, args, setup.world, setup.dtype)
                return TeacherTopK(rows, key, args.cache_teacher, score)

            data, teacher = replace(data, train=training.map_sources(data.train, add_teacher)), None
        with training.open_process_group(setup.world), training.StopSignal(setup.world) as stop:
            return train(setup, teacher, data, stop)


if __name__ == "__main__":
    with common.report_user_errors(), training.explain_out_of_memory():
        sys.exit(main())
