"""Stage 1: learn to predict the next token of plain text, {"text"} lines.

    python train_pretrain.py
    python train_pretrain.py --data_path my.jsonl --val_ratio 0.01 --batch_size 16
    python train_pretrain.py --data_path my.jsonl --val_ratio 0.01 --batch_size 16 --resume
    torchrun --nproc_per_node 4 train_pretrain.py --data_path my.jsonl

The weights go to out/pretrain_512.pth (the number is --dim; a mixture of experts ends in _moe).
"""

import common.interrupt  # noqa: F401  for Ctrl-C during the imports below

import argparse
import math
import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from common import UserError, make_parser, report_user_errors
from dataset import PackedRows, PaddedRows, PretrainDataset, make_loader
from model import MiniMindLM, load_tokenizer, tokenizer_hash, weights_path
from sample_world import SAMPLE, ensure_sample
from training import (
    Distributed,
    Run,
    StopSignal,
    add_stage_arguments,
    autocast_dtype,
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

STAGE = "pretrain"
# (parameters up to, lowest, highest): learning rates outside make a warning.
LEARNING_RATES = ((1e7, 1e-4, 5e-3), (6e7, 1e-4, 2e-3), (math.inf, 5e-5, 1e-3))

Rows = PackedRows | PaddedRows


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser("Pretrain MiniMind on a JSONL file of {'text'} lines.")
    add_stage_arguments(
        parser,
        data_path=SAMPLE / "pretrain.jsonl",
        from_weight="none",
        learning_rate=5e-4,
        weight_decay=0.1,
        epochs=1,
        batch_size=32,
        grad_clip=1.0,
        max_seq_len=512,
    )
    args = parser.parse_args()
    check_stage_arguments(args)
    return args


def open_rows(
    args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Rows, dict[str, Rows], Rows | None]:
    """The rows to train on, to validate on (by name) and to test on.

    Raises:
        UserError: naming what is wrong with a file.
    """

    def open_text(path: Path) -> PretrainDataset:
        return PretrainDataset(
            ensure_sample(path),
            tokenizer,
            args.max_seq_len + 1,  # so that X, one id shorter, can fill a row
            cache_dir=args.cache_dir,
            skip_bad_lines=args.skip_bad_lines,
        )

    def rows(dataset: PretrainDataset) -> Rows:
        return PackedRows(dataset, args.max_seq_len) if args.packing else PaddedRows(dataset)

    # The smaller files first: what is wrong with them shows sooner.
    test = rows(open_text(args.test_data_path)) if args.test_data_path else None
    val = {name: rows(open_text(path)) for name, path in args.val_data_path}
    dataset = open_text(args.data_path)
    if args.val_ratio is not None:
        dataset, held_out = dataset.split(args.val_ratio)
        val = {"held out": rows(held_out)}
    return rows(dataset), val, test


def token_losses(
    model: nn.Module, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cross-entropy in nats of every position, (B, T) fp32, weighted by the loss mask.

    Also the auxiliary loss (0 for dense models) and (layers, experts) the load of each expert.
    """
    output = model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
    )
    logits = output.logits.flatten(0, 1).float()  # (B · T, vocab)
    losses = F.cross_entropy(logits, batch["targets"].flatten(), reduction="none")
    losses = losses.view_as(batch["loss_mask"]) * batch["loss_mask"]
    return losses, output.aux_loss, output.expert_load  # not the logits, which would stay in memory


def batches(run: Run, rows: Rows, **order: Any) -> DataLoader:
    """This process's micro-batches; `order` says which, as for `RowBatches`."""
    args, world = run.args, run.world
    return make_loader(
        rows,
        args.batch_size,
        seed=args.seed,
        rank=world.rank,
        world_size=world.world_size,
        num_workers=args.num_workers,
        on_cuda=world.device.type == "cuda",
        **order,
    )


def train_epoch(run: Run, model: nn.Module, rows: Rows, val: dict[str, Rows]) -> None:
    """Go through what is left of the epoch, or until the run ends.

    The loss of a step is the mean over all target tokens of its window, of every micro-batch and
    every process, weighted by the loss mask. So the window is read first, its targets are counted
    everywhere, and each micro-batch adds its own share of the gradient. The auxiliary loss is a
    mean over rows alike.

    Args:
        run: the run.
        model: what is called, DDP wrapper included.
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

        losses, aux_losses, loads = [], [], []  # of each micro-batch
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
                    token_loss, aux_loss, load = token_losses(model, batch)
                aux_loss = aux_loss * text_rows[i] / n_rows
                loss = (token_loss.sum() / targets + aux_loss) * world.world_size
                scaler.scale(loss).backward()
            losses.append(token_loss.detach().sum())
            aux_losses.append(aux_loss.detach())
            loads.append(load)

        sums = torch.stack((sum(losses), sum(aux_losses))).to(world.sum_dtype)
        loss_sum, aux_sum = world.all_reduce_sum(sums).tolist()
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
                losses, *_ = token_losses(model, batch)
            total += torch.stack([x.sum(dtype=total.dtype) for x in (losses, batch["loss_mask"])])
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
    data: tuple[Rows, dict[str, Rows], Rows | None],
    resume: dict[str, Any] | None,
    notes: list[str],
) -> Run | None:
    """Set up what a run needs, go through the epochs, test, save, report.

    Args:
        args: the flags.
        world: this process.
        dtype: of matrix products.
        tokenizer: of the data.
        network: the model, bare and on the CPU.
        data: the rows to train on, to validate on (by name) and to test on.
        resume: the content of a resume file, or None for a new run; the main process's counts.
        notes: what to tell the user first.

    Returns:
        The run as it ended; None if there was nothing to do.
    """
    rows, val, test = data
    network.to(world.device)
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
        )
        if run is None:
            return None
        model = torch.compile(network) if args.compile else network
        if world.world_size > 1:
            on_cuda = world.device.type == "cuda"
            model = DistributedDataParallel(model, [world.device.index] if on_cuda else None)

        if run.state.step > 0:  # a stopped run may have left this to do
            validate_if_due(run, model, val)
        while run.going_on:
            train_epoch(run, model, rows, val)
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
            check_identity(path, resume, run_identity(args, data[0], tokenizer_hash(tokenizer)))
            check_output(path, network)
        with open_process_group(world):
            run = train(args, world, dtype, tokenizer, network, data, resume, notes)
        return run.end() if run is not None else 0


if __name__ == "__main__":
    with report_user_errors(UserError), explain_out_of_memory():
        sys.exit(main())
