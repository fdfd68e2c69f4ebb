"""Stage 3: prefer one of two replies to a prompt, from {"chosen", "rejected"} lines.

    python train_dpo.py
    python train_dpo.py --data_path my.jsonl --val_ratio 0.1 --loss_type sigmoid --beta 0.1
    torchrun --nproc_per_node 4 train_dpo.py --data_path my.jsonl

It starts from out/full_sft_512.pth (the number is --dim; a mixture of experts ends in _moe), which
is also the frozen reference that the model is compared with, and writes out/dpo_512.pth. The
reference's log-probabilities are computed once and cached beside the data, so that training holds
one model in memory.
"""

import common.interrupt  # for Ctrl-C during the imports below

import argparse
import copy
import math
import sys
import time
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import training
from dataset import DPODataset, PairRows, collate_pairs
from model import find_targets, target_logits, weights_hash
from sample_world import SAMPLE, ensure_sample

# By optimizer (parameters up to, lowest, usual, highest): the usual learning rate is taken without
# --learning_rate, one outside makes a warning.
RATES = ((1e7, 1e-6, 5e-5, 5e-4), (6e7, 5e-7, 5e-6, 1e-4), (math.inf, 1e-7, 5e-6, 2e-5))
LEARNING_RATES = dict.fromkeys(("adamw", "muon"), RATES)
TIE = 1e-6  # of the log-probabilities: what fp32 makes of the same reply in another batch
BETA = {"sigmoid_norm": 0.5, "sigmoid": 0.1, "ipo": 0.1}  # by --loss_type


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = training.make_stage_parser(
        "Tune MiniMind on pairs of a preferred and a rejected reply (DPO).",
        data_path=SAMPLE / "dpo.jsonl",
        from_weight="full_sft",
        optimizer="adamw",
        weight_decay=0.0,
        epochs=1,
        batch_size=8,
        grad_clip=0.5,
        max_seq_len=1024,
        packing=False,  # a pair is compared as a whole; batches are of like length instead
        log_interval=1,  # runs are short, and the report reads the course of the margin
    )
    group = parser.add_argument_group("preference")
    add = group.add_argument
    compared = "sigmoid compares sums of log-probabilities, the others means per token"
    add("--loss_type", choices=tuple(BETA), default="sigmoid_norm", help=compared)
    betas = ", ".join(f"{beta:g} for {name}" for name, beta in BETA.items())
    strength = f"strength of the KL penalty; default: {betas}"
    add("--beta", type=common.positive_float, help=strength)
    swapped = "assumed share of pairs whose labels are swapped (cDPO); not for ipo"
    add("--label_smoothing", type=common.half_open_unit_interval, default=0.0, help=swapped)
    prompt = "most tokens of a prompt; default: half of a row"
    add("--max_prompt_length", type=common.positive_int, help=prompt)
    reply = "most tokens of a reply; default: the rest of the row"
    add("--max_completion_length", type=common.positive_int, help=reply)
    apart = "leave out pairs whose scores differ by less, chosen minus rejected"
    add("--min_margin", type=float, help=apart)
    common.add_parse_think(group)
    args = training.parse_stage_arguments(parser)
    if args.from_weight == "none":
        raise common.UserError("--from_weight none: a preference needs a model to compare with")
    if args.beta is None:
        args.beta = BETA[args.loss_type]
    if args.label_smoothing >= 0.5:
        raise common.UserError(f"--label_smoothing {args.label_smoothing:g}: must be below 0.5")
    if args.label_smoothing and args.loss_type == "ipo":
        raise common.UserError("--label_smoothing: ipo has none")
    set_lengths(args)
    return args


def set_lengths(args: argparse.Namespace) -> None:
    """Divide the row between prompt and reply, as far as the flags do not; or UserError."""
    row, prompt, reply = args.max_seq_len, args.max_prompt_length, args.max_completion_length
    if prompt is None:
        prompt = row // 2 if reply is None else row - reply
    if reply is None:
        reply = row - prompt
    if min(prompt, reply) < 1 or prompt + reply > row:
        raise common.UserError(
            f"--max_prompt_length {prompt} and --max_completion_length {reply} do not share a row "
            f"of --max_seq_len {row}"
        )
    args.max_prompt_length, args.max_completion_length = prompt, reply


def reply_logps(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probability of every reply in nats, summed over its tokens: (2B,) fp32.

    Also the auxiliary loss and the load of each expert, as `token_losses` returns them.
    """
    where, ids, _ = find_targets(batch)  # the replies' tokens: no prompt is scored
    logits, aux_loss, expert_load = target_logits(model, batch, where)
    losses = F.cross_entropy(logits, ids, reduction="none")
    mask = batch["loss_mask"]  # (2B, T)
    logps = -torch.zeros_like(mask).flatten().index_copy(0, where, losses).view_as(mask).sum(1)
    return logps, aux_loss, expert_load  # not the logits, which would stay in memory


def preference_losses(
    logps: Tensor,
    reference: Tensor,
    lengths: Tensor,
    loss_type: str,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair, of log-probabilities beyond those of the reference.

    With s the log-probability of a reply minus the reference's, and d the chosen one's s minus the
    rejected one's: −log σ(beta · d) (DPO, https://arxiv.org/abs/2305.18290), or with
    `label_smoothing` e, −(1 − e) log σ(beta · d) − e log σ(−beta · d) (cDPO); for ipo
    (d − 1 / (2 · beta))² (https://arxiv.org/abs/2310.12036). But for sigmoid all log-probabilities
    are divided by the number of the reply's tokens, so that length alone gains nothing.

    Args:
        logps: (2B,) summed log-probabilities, of the chosen replies, then of the rejected ones.
        reference: (2B,) the same from the reference.
        lengths: (2B,) tokens of each reply.
        loss_type, beta, label_smoothing: the flags of these names.

    Returns the losses, (B,), and what to watch, (B,) each, without gradients: among them rewards,
    beta · s, the `margin` between them, and `accuracy`, 1 where d is above 0, a half where it is 0
    but for fp32's rounding.
    """
    if loss_type != "sigmoid":
        logps, reference = logps / lengths.clamp(min=1), reference / lengths.clamp(min=1)
    chosen, rejected = (logps - reference).chunk(2)
    gain = chosen - rejected
    noise = TIE * sum((logps.abs() + reference.abs()).detach().chunk(2))
    if loss_type == "ipo":
        losses = (gain - 1 / (2 * beta)) ** 2
    else:
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * gain)
        losses = losses - label_smoothing * F.logsigmoid(-beta * gain)
    chosen_logp, rejected_logp = logps.detach().chunk(2)
    figures = {
        "chosen_reward": beta * chosen,
        "rejected_reward": beta * rejected,
        "margin": beta * gain,
        "log_odds": chosen_logp - rejected_logp,
        "accuracy": ((gain > noise).float() + (gain >= -noise).float()) / 2,
        "chosen_logp": chosen_logp,
        "rejected_logp": rejected_logp,
    }
    return losses, {name: values.detach() for name, values in figures.items()}


def pair_losses(
    model: nn.Module, batch: dict[str, Tensor], args: argparse.Namespace
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor | None]:
    """Loss and figures of every pair, (B,) fp32 each, 0 for padding; the rest as `reply_logps`."""
    logps, aux_loss, expert_load = reply_logps(model, batch)
    lengths = batch["loss_mask"].sum(1)
    losses, figures = preference_losses(
        logps, batch["reference"], lengths, args.loss_type, args.beta, args.label_smoothing
    )
    real = is_real(batch)
    figures = {name: values * real for name, values in figures.items()}
    return losses * real, figures, aux_loss, expert_load


def is_real(batch: dict[str, Tensor]) -> Tensor:
    """Which pairs of a batch are not padding: (B,) bool."""
    return batch["sample"] >= 0


def train_epoch(
    run: training.Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Take the steps that are left of the epoch, or until the run ends.

    Loss and auxiliary loss of a step are means over the pairs of all its micro-batches and
    processes, so these are counted first.
    """
    world = run.world
    model.train()
    for batches in run.accumulations(model):
        counts = [torch.stack((is_real(b).sum(), b["loss_mask"].sum())) for b in batches]
        pairs, tokens = world.all_reduce_sum(sum(counts)).tolist()
        lr = training.get_lr(*run.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr / run.args.learning_rate

        totals = training.StepTotals(world)
        for i, batch in enumerate(batches):
            # DDP averages gradients over processes, once for all micro-batches of a step.
            sync_gradients = not world.is_distributed or i == len(batches) - 1
            with nullcontext() if sync_gradients else model.no_sync():
                with run.autocast:
                    losses, figures, aux_loss, expert_load = pair_losses(model, batch, run.args)
                aux_loss = aux_loss * is_real(batch).sum() / pairs
                loss = losses.sum() / pairs + aux_loss
                scaler.scale(loss * world.world_size).backward()
            totals.add(losses, aux_loss, expert_load, **figures)

        sums = totals.add_up()
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), run.args.grad_clip).item()
        if math.isfinite(sums["loss"] + sums["aux_loss"] + grad_norm):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        run.add_step(batches, totals, targets=pairs, tokens=tokens, lr=lr, grad_norm=grad_norm)


@torch.no_grad()
def score_reference(run: training.Run, reference: nn.Module, key: str, rows: PairRows) -> None:
    """Cache the reference's log-probability of every reply as `key`, unless a signal comes."""
    world, started = run.world, time.perf_counter()
    reference.eval()
    scores = torch.zeros(len(rows), 2, dtype=world.sum_dtype, device=world.device)
    for batch in run.loader(rows):
        if run.check_signal():
            return
        batch = world.to_device(batch)
        with run.autocast:
            logps, *_ = reply_logps(reference, batch)
        real = is_real(batch)
        scores[batch["sample"][real]] = logps.view(2, -1).T[real].to(scores.dtype)
    rows.keep_reference(key, world.all_reduce_sum(scores).cpu().numpy())
    seconds = time.perf_counter() - started
    scored = common.Text(
        "reference on {path}: {pairs:,} pairs in {seconds:.1f} s ({rate:.0f} pairs/s), cached "
        "beside the data",
        path=rows.dataset.store.path,
        pairs=len(rows),
        seconds=seconds,
        rate=len(rows) / seconds,
    )
    run.record.print(scored)


def train(setup: training.Setup, data: training.Splits, stop: training.StopSignal) -> int:
    """Go through the epochs, test, save and report; the exit status."""
    args, world = setup.args, setup.world
    training.choose_settings(setup, data)
    setup.frozen = world.broadcast(setup.frozen)
    key = f"{setup.frozen['--from_weight'][:16]}_{setup.dtype}".replace("torch.", "")

    def is_unscored(rows: PairRows) -> bool:  # on any process: all score together
        return bool(world.all_reduce_max(int(not rows.use_reference(key))))

    unscored = [rows for rows in data.sources() if is_unscored(rows)]
    reference = None
    if unscored:
        # Before a resume file takes its place, and for no longer than there is something to score.
        reference = copy.deepcopy(setup.raw_model)
        reference.load_state_dict(world.broadcast(reference.state_dict()))
        reference.to(world.device)
    raw_model = setup.raw_model.to(world.device)
    optimizer = training.make_optimizer(raw_model, args, setup.dtype)
    scaler = torch.amp.GradScaler(world.device.type, enabled=setup.dtype == torch.float16)

    def score(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        losses, figures, *_ = pair_losses(model, batch, args)
        return {"loss": losses, **figures, "targets": is_real(batch)}

    run = training.start_run(setup, data, stop, optimizer, scaler, score)
    if run is None:
        return 0
    for rows in unscored:
        if is_unscored(rows):  # asked again: two parts may be of one file
            score_reference(run, reference, key, rows)
    del reference
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
    lengths = ("max_prompt_length", "max_completion_length")
    identity = (*lengths, "loss_type", "beta", "label_smoothing")
    stage = training.Stage(
        "dpo", LEARNING_RATES, identity, collate_pairs, sequences_per_row=2, scores_text=False
    )
    setup = training.prepare(args, stage)
    with training.lock_run(setup.path, setup.world, args.dry_run):
        training.load_first_weights(setup)
        setup.frozen["--from_weight"] = weights_hash(setup.raw_model)
        training.find_resume(setup)
        dataset = partial(
            DPODataset,
            tokenizer=setup.tokenizer,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
        )
        data = training.open_splits(setup, ensure_sample, dataset, make_rows=PairRows)
        with training.open_process_group(setup.world), training.StopSignal(setup.world) as stop:
            return train(setup, data, stop)


if __name__ == "__main__":
    with common.report_user_errors(), training.explain_out_of_memory():
        sys.exit(main())
