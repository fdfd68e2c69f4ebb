"""Distillation: a student learns to answer as the data do, and as a larger model would.

    python train_distillation.py --teacher_weight out/full_sft_768.pth
    python train_distillation.py --teacher_weight out/full_sft_640_moe.pth --cache_teacher 32
    torchrun --nproc_per_node 4 train_distillation.py --teacher_weight out/full_sft_768.pth

The student, of the shape that --dim and the other flags give, starts from out/pretrain_512.pth (the
number is --dim; a mixture of experts ends in _moe) and becomes out/distill_512.pth. The teacher has
the same tokenizer and any shape; the .json beside its weights tells it.
"""

import common.interrupt  # noqa: F401  for Ctrl-C during the imports below

import argparse
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from common import (
    UserError,
    make_parser,
    name_or_path,
    positive_float,
    positive_int,
    report_user_errors,
    unit_interval,
)
from dataset import (
    PackedRows,
    PaddedRows,
    SFTDataset,
    TeacherTopK,
    collate_with_teacher,
    make_loader,
)
from model import (
    LMConfig,
    MiniMindLM,
    load_model,
    load_tokenizer,
    resolve_weights,
    tokenizer_hash,
    weights_hash,
    weights_path,
)
from sample_world import SAMPLE, ensure_sample
from training import (
    Distributed,
    Run,
    StopSignal,
    add_chat_arguments,
    add_stage_arguments,
    autocast_dtype,
    check_context,
    check_identity,
    check_stage_arguments,
    explain_out_of_memory,
    find_processes,
    find_resume,
    find_sample,
    get_random_states,
    init_model,
    lock_run,
    make_optimizer,
    open_process_group,
    run_identity,
    set_random_states,
    start_run,
    summarise,
)
from training.weights import check_output, load_first_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAGE = "distill"
# (parameters up to, lowest, highest): learning rates outside make a warning.
LEARNING_RATES = ((1e7, 1e-5, 3e-3), (6e7, 1e-5, 5e-4), (math.inf, 5e-6, 1e-4))

Rows = PackedRows | PaddedRows | TeacherTopK


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser("Teach a MiniMind what another one knows, on conversations.")
    add_stage_arguments(
        parser,
        data_path=SAMPLE / "sft.jsonl",
        from_weight="pretrain",
        learning_rate=5e-5,
        weight_decay=0.01,
        epochs=1,
        batch_size=32,
        grad_clip=1.0,
        max_seq_len=512,
    )
    teaching = parser.add_argument_group("teacher")
    teaching.add_argument(
        "--teacher_weight",
        type=name_or_path,
        required=True,
        help="a stage's name, or its .pth file with a .json beside it",
    )
    teaching.add_argument(
        "--alpha",
        type=unit_interval,
        default=0.5,
        help="share of the loss that the data's own answers have",
    )
    teaching.add_argument(
        "--temperature", type=positive_float, default=2.0, help="softens both models' distributions"
    )
    teaching.add_argument(
        "--cache_teacher",
        type=positive_int,
        metavar="TOP",
        help="ask the teacher once, and keep its likeliest tokens for each target beside the data",
    )
    add_chat_arguments(parser)
    args = parser.parse_args()
    check_stage_arguments(args)
    return args


def open_rows(
    args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Rows, dict[str, Rows], Rows | None]:
    """The rows to train on, to validate on (by name) and to test on.

    Scores are means over tokens, whatever --loss_weighting says, so that they can be compared.

    Raises:
        UserError: naming what is wrong with a file.
    """

    def open_chats(path: Path, loss_weighting: str) -> SFTDataset:
        return SFTDataset(
            ensure_sample(path),
            tokenizer,
            args.max_seq_len + 1,  # so that X, one id shorter, can fill a row
            cache_dir=args.cache_dir,
            skip_bad_lines=args.skip_bad_lines,
            max_turns=args.max_turns,
            loss_weighting=loss_weighting,
        )

    def rows(dataset: SFTDataset) -> Rows:
        return PackedRows(dataset, args.max_seq_len) if args.packing else PaddedRows(dataset)

    # The smaller files first: what is wrong with them shows sooner.
    test = rows(open_chats(args.test_data_path, "token")) if args.test_data_path else None
    val = {name: rows(open_chats(path, "token")) for name, path in args.val_data_path}
    dataset = open_chats(args.data_path, args.loss_weighting)
    if args.val_ratio is not None:
        _, held_out = open_chats(args.data_path, "token").split(args.val_ratio)
        dataset, _ = dataset.split(args.val_ratio)
        val = {"held out": rows(held_out)}
    return rows(dataset), val, test


def target_logits(
    model: nn.Module, batch: dict[str, Tensor], where: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a model predicts at the N positions `where` of a flattened batch: (N, vocab) fp32.

    Also the auxiliary loss (0 for dense models) and (layers, experts) the load of each expert.
    """
    output = model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
    )
    return output.logits.flatten(0, 1)[where].float(), output.aux_loss, output.expert_load


def find_targets(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What is learnt of a flattened batch: positions, ids (N,) int64, and weights (N,) fp32."""
    where = batch["loss_mask"].flatten().nonzero().squeeze(1)
    return where, batch["targets"].flatten()[where], batch["loss_mask"].flatten()[where]


def divergence(
    student: Tensor, teacher: Tensor | tuple[Tensor, Tensor], temperature: float
) -> Tensor:
    """KL(teacher ‖ student) of the distributions softmax(logits / temperature), in nats: (N,).

    Args:
        student: (N, vocab) logits.
        teacher: the same of the teacher; or the ids of its likeliest tokens and their
            log-probabilities at this temperature, (N, top) each. Then all other tokens count as
            one, which makes the divergence smaller, or at top = vocab the same.
        temperature: above 0.
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
    Vinyals and Dean, https://arxiv.org/abs/1503.02531).

    Args:
        model: the student.
        teacher: in eval mode; None if the batch holds what it says.
        batch: as `dataset.packing.collate`, or `collate_with_teacher`.
        args: the flags.

    Returns:
        (N,) fp32 the losses; the sums of both parts, `cross_entropy` and `kl`, weighted alike; the
        auxiliary loss and the load of each expert.
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


def open_teacher(
    args: argparse.Namespace, shape: LMConfig, tokenizer: "PreTrainedTokenizerBase"
) -> MiniMindLM:
    """The teacher on the CPU, in eval mode; `shape` is its own where no .json tells it.

    Raises:
        UserError: if the file cannot be used, or rows are longer than the teacher's context.
    """
    path = resolve_weights("--teacher_weight", args.teacher_weight, args.out_dir, shape)
    teacher = load_model(path, shape, tokenizer_hash(tokenizer))
    check_context(args.max_seq_len, teacher.config)
    return teacher.eval()


@torch.no_grad()
def ask_teacher(
    teacher: nn.Module,
    rows: Rows,
    args: argparse.Namespace,
    world: Distributed,
    dtype: torch.dtype,
) -> Iterator[tuple[np.ndarray, np.ndarray, list[int]]]:
    """The teacher's likeliest tokens for the targets of all rows, as `TeacherTopK` keeps them."""
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
    world.log(f"teacher: asked about {len(rows):,} rows in {time.perf_counter() - started:.1f} s")


def batches(run: Run, rows: Rows, **order: Any) -> DataLoader:
    """This process's micro-batches; `order` says which, as for `RowBatches`."""
    args, world = run.args, run.world
    return make_loader(
        rows,
        args.batch_size,
        seed=args.seed,
        rank=world.rank,
        world_size=world.world_size,
        collate_fn=collate_with_teacher,
        num_workers=args.num_workers,
        on_cuda=world.device.type == "cuda",
        **order,
    )


def train_epoch(
    run: Run, model: nn.Module, teacher: nn.Module | None, rows: Rows, val: dict[str, Rows]
) -> None:
    """Go through what is left of the epoch, or until the run ends.

    The loss of a step is the mean over all target tokens of its window, of every micro-batch and
    every process, weighted by the loss mask. So the window is read first, its targets are counted
    everywhere, and each micro-batch adds its own share of the gradient. The auxiliary loss is a
    mean over rows alike.

    Args:
        run: the run.
        model: what is called, DDP wrapper included.
        teacher: in eval mode; None if the rows hold what it says.
        rows: what to train on.
        val: what to evaluate on, by name.
    """
    args, world, state = run.args, run.world, run.state
    optimizer, scaler = run.optimizer, run.scaler
    epoch, several = state.epoch, world.world_size > 1
    micro_batches = iter(batches(run, rows, epoch=epoch, start=state.row, shuffle=True))
    model.train()
    started = time.perf_counter()
    while window := [world.to_device(b) for b in islice(micro_batches, args.accumulation_steps)]:
        random_states = get_random_states(world.device) if several else None
        masks = [b["loss_mask"] for b in window]
        text_rows = [b["attention_mask"].any(1).sum() for b in window]  # the others are padding
        counts = (sum(m.sum() for m in masks), sum((m > 0).sum() for m in masks), sum(text_rows))
        targets, tokens, n_rows = world.all_reduce_sum(torch.stack(counts)).tolist()
        lr = run.learning_rate()
        for group in optimizer.param_groups:
            group["lr"] = lr

        losses, aux_losses, loads, parts = [], [], [], []  # of each micro-batch
        for i, batch in enumerate(window):
            # The processes agree before each batch: a long window must not keep them.
            if several and run.check_signal():
                optimizer.zero_grad(set_to_none=True)  # the open window is dropped
                set_random_states(random_states, world.device)
                return
            # DDP averages over processes, and exchanges gradients with the window's last batch.
            exchange = not several or i == len(window) - 1
            with nullcontext() if exchange else model.no_sync():
                with run.autocast:
                    token_loss, watched, aux_loss, load = student_losses(
                        model, teacher, batch, args
                    )
                aux_loss = aux_loss * text_rows[i] / n_rows
                loss = (token_loss.sum() / targets + aux_loss) * world.world_size
                scaler.scale(loss).backward()
            losses.append(token_loss.detach().sum())
            aux_losses.append(aux_loss.detach())
            loads.append(load)
            parts.append(torch.stack(list(watched.values())))

        sums = torch.stack((sum(losses), sum(aux_losses), *sum(parts))).to(world.sum_dtype)
        loss_sum, aux_sum, *part_sums = world.all_reduce_sum(sums).tolist()
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip).item()
        if math.isfinite(loss_sum + aux_sum + grad_norm):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        run.add_step(
            tokens=tokens,
            targets=targets,
            loss=loss_sum,
            aux_loss=aux_sum,
            grad_norm=grad_norm,
            expert_load=world.all_reduce_sum(sum(loads)).tolist()
            if run.network.config.use_moe
            else [],
            seconds=time.perf_counter() - started,
            find_sample=partial(find_sample, world, rows.dataset, window, torch.stack(losses)),
            **dict(zip(watched, part_sums, strict=True)),
        )
        run.log_if_due(epoch, lr)
        validate_if_due(run, model, val)
        if not run.going_on or run.check_signal():
            return
        run.save_if_due()
        model.train()
        started = time.perf_counter()


@torch.no_grad()
def evaluate(
    run: Run, model: nn.Module, sets: dict[str, Rows], prefix: str
) -> dict[str, float] | None:
    """Score the model on data sets, each on its own if there are several, and on all together.

    Without the teacher: by the data's own answers, as every other stage.

    Args:
        run: the run.
        model: what is called.
        sets: the data sets by name.
        prefix: "val" or "test", which the names of the scores begin with.

    Returns:
        As `summarise`; None if a signal to stop came.
    """
    world = run.world
    model.eval()
    sums = {}
    for name, rows in sets.items():
        total = torch.zeros(2, dtype=world.sum_dtype, device=world.device)
        for batch in batches(run, rows):
            if run.check_signal():
                return None
            batch = world.to_device(batch)
            with run.autocast:
                where, ids, weights = find_targets(batch)
                logits, *_ = target_logits(model, batch, where)
                losses = F.cross_entropy(logits, ids, reduction="none") * weights
            total += torch.stack([x.sum(dtype=total.dtype) for x in (losses, weights)])
        sums[name] = (*world.all_reduce_sum(total).tolist(), rows.dataset.text_bytes)
    return summarise(sums, prefix)


def validate_if_due(run: Run, model: nn.Module, val: dict[str, Rows]) -> None:
    """Evaluate after the steps that ask for it, each once, and draw the consequences."""
    if val and run.due(run.args.eval_interval) and run.state.evaluated_at != run.state.step:
        run.note_validation(evaluate(run, model, val, "val"))


def train(
    args: argparse.Namespace,
    world: Distributed,
    dtype: torch.dtype,
    tokenizer: "PreTrainedTokenizerBase",
    network: MiniMindLM,
    teacher: MiniMindLM | None,
    data: tuple[Rows, dict[str, Rows], Rows | None],
    resume: dict[str, Any] | None,
    notes: list[str],
    frozen: dict[str, str],
) -> Run | None:
    """Set up what a run needs, go through the epochs, test, save, report.

    Args:
        args: the flags.
        world: this process.
        dtype: of matrix products.
        tokenizer: of the data.
        network: the student, bare and on the CPU.
        teacher: in eval mode; None if the rows hold what it says.
        data: the rows to train on, to validate on (by name) and to test on.
        resume: the content of a resume file, or None for a new run; the main process's counts.
        notes: what to tell the user first.
        frozen: what identifies the teacher, by its flag.

    Returns:
        The run as it ended; None if there was nothing to do.
    """
    rows, val, test = data
    network.to(world.device)
    if teacher is not None:
        teacher.to(world.device)
    optimizer = make_optimizer(
        network, args.learning_rate, args.weight_decay, (args.beta1, args.beta2)
    )
    with StopSignal() as stop:
        run = start_run(
            args,
            world,
            dtype,
            stage=STAGE,
            network=network,
            tokenizer_hash=tokenizer_hash(tokenizer),
            optimizer=optimizer,
            stop=stop,
            rows=rows,
            val=val,
            test=test,
            resume=resume,
            notes=notes,
            learning_rates=LEARNING_RATES,
            frozen=frozen,
        )
        if run is None:
            return None
        model = torch.compile(network) if args.compile else network
        if args.compile and teacher is not None:
            teacher = torch.compile(teacher)
        if world.world_size > 1:
            on_cuda = world.device.type == "cuda"
            model = DistributedDataParallel(model, [world.device.index] if on_cuda else None)

        validate_if_due(run, model, val)  # first of the starting weights
        while run.going_on:
            train_epoch(run, model, teacher, rows, val)
        if test is not None and run.test_due:
            run.save()  # the test may take its time
            run.note_test(evaluate(run, run.best_network(), {"": test}, "test"))
        run.save()
        run.report()
    return run


def main() -> int:
    """Check what can be checked at once, then open the data, then train.

    Returns:
        The exit status: 130 or 143 if a signal stopped the run, else 0.

    Raises:
        UserError: for what the user can mend, a last save that failed included.
    """
    args = parse_args()
    world = find_processes(args.device, args.ddp)
    dtype = autocast_dtype(args.dtype, world)
    tokenizer = load_tokenizer(args.tokenizer_path)
    network = init_model(args, tokenizer)
    teacher = open_teacher(args, network.config, tokenizer)
    frozen = {"--teacher_weight": weights_hash(teacher)}
    size = sum(p.numel() for p in teacher.parameters())
    told = f"teacher {args.teacher_weight}: {size / 1e6:.2f} M parameters"
    if args.cache_teacher and args.cache_teacher > len(tokenizer):
        raise UserError(f"--cache_teacher {args.cache_teacher}: there are {len(tokenizer)} tokens")
    if not args.cache_teacher:
        told += (
            f"; {4 * size / 1e9:.2f} GB of them, and its logits, come on top of the memory below"
        )
    path = weights_path(args.out_dir, STAGE, network.config, args.run_name)
    with lock_run(path, world, args.dry_run):
        resume, notes = None, []
        if world.is_main:  # it gives the others their weights
            resume, notes = find_resume(path, STAGE, args)
            if resume is None:
                check_output(path, network)
                load_first_weights(args, network, tokenizer_hash(tokenizer))
        data = open_rows(args, tokenizer)
        if resume is not None:
            check_identity(
                path, resume, run_identity(args, data[0], tokenizer_hash(tokenizer), frozen)
            )
            check_output(path, network)
        if args.cache_teacher and not args.dry_run:
            # Before the processes connect: the others wait for a file, which no time-out ends.
            asked = f"{frozen['--teacher_weight'][:16]}_{args.temperature:g}_{dtype}"
            rows, *others = data
            ask = partial(ask_teacher, teacher, rows, args, world, dtype)
            rows = TeacherTopK(rows, asked.replace("torch.", ""), args.cache_teacher, ask)
            data, teacher, ask = (rows, *others), None, None
        notes = [told, *notes]
        with open_process_group(world):
            run = train(
                args, world, dtype, tokenizer, network, teacher, data, resume, notes, frozen
            )
        return run.end() if run is not None else 0


if __name__ == "__main__":
    with report_user_errors(UserError), explain_out_of_memory():
        sys.exit(main())
