"""Stage 2: full-parameter instruction tuning on {"conversations"} lines.

    python train_full_sft.py
    python train_full_sft.py --dim 768 --n_layers 16 --data_path my.jsonl --val_ratio 0.01
    torchrun --nproc_per_node 4 train_full_sft.py --data_path my.jsonl

Only the assistant's tokens are learnt. It starts from out/pretrain_512.pth (the number is --dim; a
mixture of experts ends in _moe) and writes out/full_sft_512.pth.
"""

import common.interrupt  # for Ctrl-C during the imports below

import argparse
import math
import sys
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import training
from model import token_losses
from sample_world import SAMPLE, ensure_sample

# By optimizer (parameters up to, lowest, usual, highest): the usual learning rate is taken without
# --learning_rate, one outside makes a warning.
LEARNING_RATES = {
    "adamw": ((1e7, 1e-5, 1e-3, 3e-3), (6e7, 1e-5, 2e-4, 1e-3), (math.inf, 5e-6, 5e-5, 2e-4)),
    "muon": ((1e7, 1e-4, 1e-3, 5e-3), (6e7, 5e-5, 5e-4, 2e-3), (math.inf, 2e-5, 2e-4, 1e-3)),
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = training.make_stage_parser(
        "Tune all weights of MiniMind on a JSONL file of conversations.",
        data_path=SAMPLE / "sft.jsonl",
        from_weight="pretrain",
        optimizer="muon",
        weight_decay=0.01,
        grad_clip=1.0,
        max_seq_len=512,
    )
    training.add_chat_arguments(parser)
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
    optimizer = training.make_optimizer(raw_model, args, setup.dtype)
    scaler = torch.amp.GradScaler(world.device.type, enabled=setup.dtype == torch.float16)
    run = training.start_run(setup, data, stop, optimizer, scaler, training.score_tokens)
    if run is None:
        return 0
    model = torch.compile(raw_model) if args.compile else raw_model
    if world.is_distributed:
        model = DistributedDataParallel(model, world.device_ids)
    run.validate_if_due(model)  # first of the starting weights
    while run.going_on:
        train_epoch(run, model, optimizer, scaler)
    return run.finish()


def main() -> int:
    """Check the flags, open the data, train; the exit status."""
    args = parse_args()
    setup = training.prepare(
        args, training.Stage("full_sft", LEARNING_RATES, identity=training.CHAT_IDENTITY)
    )
    with training.lock_run(setup.path, setup.world, args.dry_run):
        training.find_resume(setup)
        training.load_first_weights(setup)
        data = training.open_chat_splits(setup, ensure_sample)
        with training.open_process_group(setup.world), training.StopSignal(setup.world) as stop:
            return train(setup, data, stop)


if __name__ == "__main__":
    with common.report_user_errors(), training.explain_out_of_memory():
        sys.exit(main())
