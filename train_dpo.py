"""Stage 3: prefer one of two replies to a prompt, from {"chosen", "rejected"} lines.

    python train_dpo.py
    python train_dpo.py --data_path my.jsonl --val_ratio 0.1 --loss_type sigmoid --beta 0.1
    torchrun --nproc_per_node 4 train_dpo.py --data_path my.jsonl

It starts from out/full_sft_512.pth (the number is --dim; a mixture of experts ends in _moe), which
is also the frozen reference that the model is compared with, and writes out/dpo_512.pth. What the
reference gives every reply is computed once and kept beside the data: in training there is one
model in memory.
"""

import common.interrupt  # noqa: F401  for Ctrl-C during the imports below

import argparse
import copy
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

from common import (
    UserError,
    half_open_unit_interval,
    make_parser,
    positive_float,
    positive_int,
    report_user_errors,
)
from dataset import DPODataset, PairRows, collate_pairs, make_loader
from model import MiniMindLM, load_tokenizer, tokenizer_hash, weights_hash, weights_path
from sample_world import SAMPLE, ensure_sample
from training import (
    Distributed,
    Run,
    StopSignal,
    add_stage_arguments,
    autocast_dtype,
    average,
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
)
from training.weights import check_output, load_first_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAGE = "dpo"
# (parameters up to, lowest, highest): learning rates outside make a warning.
LEARNING_RATES = ((1e7, 1e-6, 5e-4), (6e7, 5e-7, 1e-4), (math.inf, 1e-7, 2e-5))
TIE = 1e-6  # of the log-probabilities: what fp32 makes of the same reply in another batch
BETA = {"sigmoid_norm": 0.5, "sigmoid": 0.1, "ipo": 0.1}  # by --loss_type


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser("Teach MiniMind which of two replies is preferred (DPO).")
    add_stage_arguments(
        parser,
        data_path=SAMPLE / "dpo.jsonl",
        from_weight="full_sft",
        learning_rate=5e-6,
        weight_decay=0.0,
        epochs=1,
        batch_size=8,
        grad_clip=0.5,
        max_seq_len=1024,
        packing=False,  # a pair is compared as a whole; batches are of like length instead
        log_interval=1,  # runs are short, and the report reads the course of the margin
    )
    pairs = parser.add_argument_group("preference")
    pairs.add_argument(
        "--loss_type",
        choices=tuple(BETA),
        default="sigmoid_norm",
        help="sigmoid compares sums of log-probabilities, the others means per token",
    )
    pairs.add_argument(
        "--beta",
        type=positive_float,
        help="how dear it is to leave the reference; default: "
        + ", ".join(f"{beta:g} for {name}" for name, beta in BETA.items()),
    )
    pairs.add_argument(
        "--label_smoothing",
        type=half_open_unit_interval,
        default=0.0,
        help="the share of pairs that may be the wrong way round (cDPO); not for ipo",
    )
    pairs.add_argument(
        "--max_prompt_length", type=positive_int, help="tokens of a prompt; default: half of a row"
    )
    pairs.add_argument(
        "--max_completion_length",
        type=positive_int,
        help="tokens of a reply; default: what is left",
    )
    args = parser.parse_args()
    check_stage_arguments(args)
    if args.from_weight == "none":
        raise UserError("--from_weight none: a preference needs a model to compare with")
    if args.beta is None:
        args.beta = BETA[args.loss_type]
    if args.label_smoothing >= 0.5:
        raise UserError(f"--label_smoothing {args.label_smoothing:g}: must be below 0.5")
    if args.label_smoothing and args.loss_type == "ipo":
        raise UserError("--label_smoothing: ipo has none")
    set_lengths(args)
    return args


def set_lengths(args: argparse.Namespace) -> None:
    """Divide the row between prompt and reply, as far as the flags do not.

    Raises:
        UserError: if the two do not fit.
    """
    row = args.max_seq_len
    for name, other in (("max_prompt_length", "reply"), ("max_completion_length", "prompt")):
        length = getattr(args, name)
        if length is not None and length >= row:
            raise UserError(
                f"--{name} {length} leaves no room for a {other} in a row of --max_seq_len {row}"
            )
    if args.max_prompt_length is None:
        reply = args.max_completion_length
        args.max_prompt_length = row // 2 if reply is None else row - reply
    if args.max_completion_length is None:
        args.max_completion_length = row - args.max_prompt_length
    prompt, reply = args.max_prompt_length, args.max_completion_length
    if min(prompt, reply) < 1 or prompt + reply > row:
        raise UserError(
            f"--max_prompt_length {prompt} and --max_completion_length {reply} do not share a row "
            f"of --max_seq_len {row}"
        )


def open_rows(
    args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[PairRows, dict[str, PairRows], PairRows | None]:
    """The pairs to train on, to validate on (by name) and to test on.

    Raises:
        UserError: naming what is wrong with a file.
    """

    def open_pairs(path: Path) -> DPODataset:
        return DPODataset(
            ensure_sample(path),
            tokenizer,
            args.max_prompt_length,
            args.max_completion_length,
            cache_dir=args.cache_dir,
            skip_bad_lines=args.skip_bad_lines,
        )

    # The smaller files first: what is wrong with them shows sooner.
    test = PairRows(open_pairs(args.test_data_path)) if args.test_data_path else None
    val = {name: PairRows(open_pairs(path)) for name, path in args.val_data_path}
    dataset = open_pairs(args.data_path)
    if args.val_ratio is not None:
        dataset, held_out = dataset.split(args.val_ratio)
        val = {"held out": PairRows(held_out)}
    return PairRows(dataset), val, test


def reply_logps(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probability of every reply in nats, summed over its tokens: (2B,) fp32.

    Also the auxiliary loss (0 for dense models) and (layers, experts) the load of each expert.
    """
    output = model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
    )
    mask = batch["loss_mask"]  # (2B, T)
    where = mask.flatten().nonzero().squeeze(1)  # (N,) the replies' tokens: no prompt is scored
    logits = output.logits.flatten(0, 1)[where].float()  # (N, vocab)
    losses = F.cross_entropy(logits, batch["targets"].flatten()[where], reduction="none")
    logps = -torch.zeros_like(mask).flatten().index_copy(0, where, losses).view_as(mask).sum(1)
    return logps, output.aux_loss, output.expert_load  # not the logits, which would stay in memory


def preference_losses(
    logps: Tensor,
    reference: Tensor,
    lengths: Tensor,
    loss_type: str,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """How far the model is from preferring each chosen reply, beyond what the reference does.

    With s the log-probability of a reply minus the reference's, and d the chosen one's s minus the
    rejected one's: −log σ(beta · d) (DPO, https://arxiv.org/abs/2305.18290), or with
    `label_smoothing` e, −(1 − e) log σ(beta · d) − e log σ(−beta · d) (cDPO); for ipo
    (d − 1 / (2 · beta))² (https://arxiv.org/abs/2310.12036). But for sigmoid all log-probabilities
    are divided by the number of the reply's tokens, so that length alone gains nothing.

    Args:
        logps: (2B,) summed log-probabilities, of the chosen replies, then of the rejected ones.
        reference: (2B,) the same from the reference.
        lengths: (2B,) tokens of each reply.
        loss_type, beta, label_smoothing: as the flags.

    Returns:
        (B,) the losses, and what to watch, (B,) each, without gradients: `chosen_reward` and
        `rejected_reward`, beta · s; `margin`, their difference; `log_odds`, of the chosen against
        the rejected reply; `accuracy`, 1 where d is above 0, a half where it is 0 but for fp32's
        rounding; `chosen_logp` and `rejected_logp`.
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
    """The loss of every pair, (B,) fp32, 0 for one that is padding, and sums of what to watch.

    Also the auxiliary loss and the load of each expert, as `reply_logps`.
    """
    logps, aux_loss, load = reply_logps(model, batch)
    lengths = batch["loss_mask"].sum(1)
    losses, figures = preference_losses(
        logps, batch["reference"], lengths, args.loss_type, args.beta, args.label_smoothing
    )
    real = batch["sample"] >= 0
    sums = {name: (values * real).sum() for name, values in figures.items()}
    return losses * real, sums, aux_loss, load


def batches(run: Run, rows: PairRows, **order: Any) -> DataLoader:
    """This process's micro-batches; `order` says which, as for `RowBatches`."""
    args, world = run.args, run.world
    return make_loader(
        rows,
        args.batch_size,
        seed=args.seed,
        rank=world.rank,
        world_size=world.world_size,
        lengths=rows.lengths,
        collate_fn=collate_pairs,
        num_workers=args.num_workers,
        on_cuda=world.device.type == "cuda",
        **order,
    )


def train_epoch(run: Run, model: nn.Module, rows: PairRows, val: dict[str, PairRows]) -> None:
    """Go through what is left of the epoch, or until the run ends.

    The loss of a step is the mean over all pairs of its window, of every micro-batch and every
    process. So the window is read first, its pairs are counted everywhere, and each micro-batch
    adds its own share of the gradient. The auxiliary loss is a mean over replies alike.

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
        real = [b["sample"] >= 0 for b in window]  # the others are padding
        counts = (sum(r.sum() for r in real), sum(b["loss_mask"].sum() for b in window))
        n_pairs, tokens = world.all_reduce_sum(torch.stack(counts)).tolist()
        lr = run.learning_rate()
        for group in optimizer.param_groups:
            group["lr"] = lr

        losses, aux_losses, loads, figures = [], [], [], []  # of each micro-batch
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
                    pair_loss, watched, aux_loss, load = pair_losses(model, batch, args)
                aux_loss = aux_loss * real[i].sum() / n_pairs
                loss = (pair_loss.sum() / n_pairs + aux_loss) * world.world_size
                scaler.scale(loss).backward()
            losses.append(pair_loss.detach().sum())
            aux_losses.append(aux_loss.detach())
            loads.append(load)
            figures.append(torch.stack(list(watched.values())))

        sums = torch.stack((sum(losses), sum(aux_losses), *sum(figures))).to(world.sum_dtype)
        loss_sum, aux_sum, *figure_sums = world.all_reduce_sum(sums).tolist()
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip).item()
        if math.isfinite(loss_sum + aux_sum + grad_norm):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        run.add_step(
            tokens=tokens,
            targets=n_pairs,
            loss=loss_sum,
            aux_loss=aux_sum,
            grad_norm=grad_norm,
            expert_load=world.all_reduce_sum(sum(loads)).tolist()
            if run.network.config.use_moe
            else [],
            seconds=time.perf_counter() - started,
            find_sample=partial(find_sample, world, rows.dataset, window, torch.stack(losses)),
            **dict(zip(watched, figure_sums, strict=True)),
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
    run: Run, model: nn.Module, sets: dict[str, PairRows], prefix: str
) -> dict[str, float] | None:
    """Score the model on data sets, each on its own if there are several, and on all together.

    Args:
        run: the run.
        model: what is called.
        sets: the data sets by name.
        prefix: "val" or "test", which the names of the scores begin with.

    Returns:
        The mean loss of a pair and those of `preference_losses`' figures; None if a signal to stop
        came.
    """
    world = run.world
    model.eval()
    sums = {}
    for name, rows in sets.items():
        total: dict[str, Tensor] = {}
        for batch in batches(run, rows):
            if run.check_signal():
                return None
            batch = world.to_device(batch)
            with run.autocast:
                losses, watched, *_ = pair_losses(model, batch, run.args)
            for figure, value in {"loss": losses.sum(), **watched}.items():
                total[figure] = total.get(figure, 0) + value.to(world.sum_dtype)
        values = world.all_reduce_sum(torch.stack(list(total.values()))).tolist()
        sums[name] = {**dict(zip(total, values, strict=True)), "pairs": len(rows)}
    return average(sums, "pairs", prefix)


@torch.no_grad()
def score_reference(run: Run, reference: nn.Module, key: str, rows: PairRows) -> bool:
    """Compute what the reference gives every reply, and keep it beside the data as `key`.

    Returns:
        Whether that is done; False if a signal to stop came.
    """
    world, started = run.world, time.perf_counter()
    reference.eval()
    scores = torch.zeros(len(rows), 2, dtype=world.sum_dtype, device=world.device)
    for batch in batches(run, rows):
        if run.check_signal():
            return False
        batch = world.to_device(batch)
        with run.autocast:
            logps, *_ = reply_logps(reference, batch)
        real = batch["sample"] >= 0
        scores[batch["sample"][real]] = logps.view(2, -1).T[real].to(scores.dtype)
    rows.keep_reference(key, world.all_reduce_sum(scores).cpu().numpy())
    seconds = time.perf_counter() - started
    run.reporter.say(
        f"reference on {rows.dataset.store.path}: {len(rows):,} pairs in {seconds:.1f} s "
        f"({len(rows) / seconds:.0f} pairs/s), kept beside the data"
    )
    return True


def validate_if_due(run: Run, model: nn.Module, val: dict[str, PairRows]) -> None:
    """Evaluate after the steps that ask for it, each once, and draw the consequences."""
    if val and run.due(run.args.eval_interval) and run.state.evaluated_at != run.state.step:
        run.note_validation(evaluate(run, model, val, "val"))


def train(
    args: argparse.Namespace,
    world: Distributed,
    dtype: torch.dtype,
    tokenizer: "PreTrainedTokenizerBase",
    network: MiniMindLM,
    data: tuple[PairRows, dict[str, PairRows], PairRows | None],
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
        network: the reference's weights, bare and on the CPU.
        data: the pairs to train on, to validate on (by name) and to test on.
        resume: the content of a resume file, or None for a new run; the main process's counts.
        notes: what to tell the user first.
        frozen: what identifies the reference, by its flag; the main process's counts.

    Returns:
        The run as it ended; None if there was nothing to do.
    """
    rows, val, test = data
    frozen = world.broadcast(frozen)
    key = f"{frozen['--from_weight'][:16]}_{dtype}".replace("torch.", "")

    def unscored(part: PairRows) -> bool:
        return bool(
            world.all_reduce_max(int(not part.use_reference(key)))
        )  # anywhere: all score together

    missing = [p for p in (rows, *val.values(), test) if p is not None and unscored(p)]
    reference = None
    if missing:
        # Before a resume file takes its place, and for no longer than there is something to score.
        reference = copy.deepcopy(network)
        reference.load_state_dict(world.broadcast(reference.state_dict()))
        reference.to(world.device)
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
            frozen=frozen,
            sequences=2,
        )
        if run is None:
            return None
        # Asked again: two parts may be of one file.
        scored = all(
            score_reference(run, reference, key, part) for part in missing if unscored(part)
        )
        del reference
        model = torch.compile(network) if args.compile else network
        if world.world_size > 1:
            on_cuda = world.device.type == "cuda"
            model = DistributedDataParallel(model, [world.device.index] if on_cuda else None)

        if scored:
            validate_if_due(run, model, val)  # first of the starting weights
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
        resume, notes, frozen = None, [], {}
        if world.is_main:  # it gives the others their weights
            load_first_weights(args, network, tokenizer_hash(tokenizer))
            frozen = {"--from_weight": weights_hash(network)}
            resume, notes = find_resume(path, STAGE, args)
            if resume is None:
                check_output(path, network)
        data = open_rows(args, tokenizer)
        if resume is not None:
            check_identity(
                path, resume, run_identity(args, data[0], tokenizer_hash(tokenizer), frozen)
            )
            check_output(path, network)
        with open_process_group(world):
            run = train(args, world, dtype, tokenizer, network, data, resume, notes, frozen)
        return run.end() if run is not None else 0


if __name__ == "__main__":
    with report_user_errors(UserError), explain_out_of_memory():
        sys.exit(main())
