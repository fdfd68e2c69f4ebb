"""An adapter: small matrices beside the frozen weights, trained on {"conversations"} lines.

    python train_lora.py
    python train_lora.py --lora_name style --lora_rank 16 --data_path my.jsonl --val_ratio 0.1
    torchrun --nproc_per_node 4 train_lora.py --lora_name style --data_path my.jsonl

It starts from out/full_sft_512.pth (the number is --dim; a mixture of experts ends in _moe), leaves
that file as it is and writes out/lora/identity_512.pth, of some 2 % its size, which
`eval_model.py --lora_name identity` puts on it.
"""

import common.interrupt  # for Ctrl-C during the imports below

import argparse
import math
import re
import sys
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import training
from model import apply_lora, token_losses, weights_hash
from model.model_lora import TARGETS
from sample_world import SAMPLE, ensure_sample

# By optimizer (parameters up to, lowest, usual, highest): the usual learning rate is taken without
# --learning_rate, one outside makes a warning.
RATES = ((1e7, 1e-4, 1e-3, 3e-2), (6e7, 1e-4, 5e-4, 5e-3), (math.inf, 5e-5, 1e-4, 1e-3))
LEARNING_RATES = dict.fromkeys(("adamw", "muon"), RATES)


def adapter_name(text: str) -> str:
    """An argparse type: a name that every file system takes, and no path."""
    if not re.fullmatch(r"[\w-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: letters, digits, - and _ only")
    return text


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = training.make_stage_parser(
        "Train a LoRA adapter of MiniMind on conversations.",
        data_path=SAMPLE / "lora.jsonl",
        from_weight="full_sft",
        optimizer="adamw",
        weight_decay=0.0,
        epochs=5,
        grad_clip=1.0,
        max_seq_len=512,
    )
    add = parser.add_argument_group("adapter").add_argument
    add("--lora_name", type=adapter_name, default="identity", help="file name")
    add("--lora_rank", type=common.positive_int, default=8, help="inner width")
    scale = "scale of the product: alpha / rank"
    add("--lora_alpha", type=common.positive_float, default=16.0, help=scale)
    dropped = "of the adapter's input"
    add("--lora_dropout", type=common.half_open_unit_interval, default=0.0, help=dropped)
    where = "projections that get one, in every layer and every expert"
    add("--lora_target", nargs="+", choices=TARGETS, default=TARGETS, help=where)
    training.add_chat_arguments(parser)
    args = training.parse_stage_arguments(parser)
    args.lora_target = [name for name in TARGETS if name in args.lora_target]
    if args.from_weight == "none":
        raise common.UserError("--from_weight none: an adapter needs weights to adapt")
    return args


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
    identity = ("lora_rank", "lora_alpha", "lora_target", *training.CHAT_IDENTITY)
    setup = training.prepare(
        args, training.Stage(f"lora/{args.lora_name}", LEARNING_RATES, identity)
    )
    with training.lock_run(setup.path, setup.world, args.dry_run):
        training.load_first_weights(setup)
        setup.frozen["--from_weight"] = weights_hash(setup.raw_model)
        apply_lora(
            setup.raw_model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_target
        )
        training.find_resume(setup)
        data = training.open_chat_splits(setup, ensure_sample)
        with training.open_process_group(setup.world), training.StopSignal(setup.world) as stop:
            return train(setup, data, stop)


if __name__ == "__main__":
    with common.report_user_errors(), training.explain_out_of_memory():
        sys.exit(main())
