"""Stage 1: next-token prediction on plain text, {"text"} lines.

    python train_pretrain.py
    python train_pretrain.py --data_path my.jsonl --val_ratio 0.01 --batch_size 16
    python train_pretrain.py --data_path my.jsonl --val_ratio 0.01 --batch_size 16 --resume
    torchrun --nproc_per_node 4 train_pretrain.py --data_path my.jsonl

The weights go to out/pretrain_512.pth (the number is --dim; a mixture of experts ends in _moe).
"""

import common.interrupt  # for Ctrl-C during the imports below

import argparse
import math
import sys
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import training
from dataset import PretrainDataset, shorten_rows
from model import token_losses
from sample_world import SAMPLE, ensure_sample

# By optimizer (parameters up to, lowest, usual, highest): the usual learning rate is taken without
# --learning_rate, one outside makes a warning.
LEARNING_RATES = {
    "adamw": ((1e7, 1e-4, 1e-3, 5e-3), (6e7, 1e-4, 1e-3, 2e-3), (math.inf, 5e-5, 3e-4, 1e-3)),
    "muon": ((1e7, 1e-3, 8e-3, 3e-2), (6e7, 5e-4, 4e-3, 2e-2), (math.inf, 3e-4, 2e-3, 1e-2)),
}
# Of the embedding's learning rate over that of Muon's matrices (docs/results.md#optimizers).
EMBEDDING_SCALE = 3.0


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = training.make_stage_parser(
        "Pretrain MiniMind on a JSONL file of {'text'} lines.",
        data_path=SAMPLE / "pretrain.jsonl",
        from_weight="none",
        optimizer="muon",
        weight_decay=0.1,
        grad_clip=1.0,
        max_seq_len=512,
    )
    shorter = "begin with rows of so many positions, doubled up to --max_seq_len in half the run"
    parser.add_argument("--length_schedule", type=common.number(int, 2), help=shorter)
    common.add_text_columns(parser.add_argument_group("texts"))
    return training.parse_stage_arguments(parser)


def train_epoch(
    run: training.Run,
    model: nn.Module,
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
        batches = [shorten_rows(batch, run.row_length) for batch in batches]
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
                    losses, aux_loss, expert_load = token_losses(model, batch)
                aux_loss = aux_loss * training.rows_with_text(batch) / rows
                loss = losses.sum() / weights + aux_loss
                scaler.scale(loss * world.world_size).backward()
            totals.add(losses, aux_loss, expert_load)

        sums = totals.add_up()
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), run.args.grad_clip).item()
        if math.isfinite(sums["loss"] + sums["aux_loss"] + grad_norm):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        run.add_step(batches, totals, targets=weights, tokens=tokens, lr=lr, grad_norm=grad_norm)


def train(setup: training.Setup, data: training.Splits, stop: training.StopSignal) -> int:
    """Go through the epochs, test, save and report; the exit status."""
    args, world = setup.args, setup.world
    training.choose_settings(setup, data)
    raw_model = setup.raw_model.to(world.device)
    optimizer = training.make_optimizer(raw_model, args, setup.dtype, EMBEDDING_SCALE)
    scaler = torch.amp.GradScaler(world.device.type, enabled=setup.dtype == torch.float16)
    run = training.start_run(setup, data, stop, optimizer, scaler, training.score_tokens)
    if run is None:
        return 0
    model = torch.compile(raw_model) if args.compile else raw_model
    if world.is_distributed:
        model = DistributedDataParallel(model, world.device_ids)
    if run.state.step > 0:  # what a run that was stopped left undone
        run.validate_if_due(model)
    while run.going_on:
        train_epoch(run, model, optimizer, scaler)
    return run.finish()


def main() -> int:
    """Check the flags, open the data, train; the exit status."""
    args = parse_args()
    setup = training.prepare(args, training.Stage("pretrain", LEARNING_RATES, chats=False))
    with training.lock_run(setup.path, setup.world, args.dry_run):
        training.find_resume(setup)
        training.load_first_weights(setup)
        dataset = partial(
            PretrainDataset,
            tokenizer=setup.tokenizer,
            max_length=args.max_seq_len + 1,  # so that X, one id shorter, can fill a row
        )
        data = training.open_splits(setup, ensure_sample, dataset)
        with training.open_process_group(setup.world), training.StopSignal(setup.world) as stop:
            return train(setup, data, stop)


if __name__ == "__main__":
    with common.report_user_errors(), training.explain_out_of_memory():
        sys.exit(main())
