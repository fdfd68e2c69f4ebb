"""Stage 1: learn to predict the next token of plain text, {"text"} lines.

    python train_pretrain.py
    python train_pretrain.py --data_path my.jsonl --val_ratio 0.01 --batch_size 16
    python train_pretrain.py --data_path my.jsonl --val_ratio 0.01 --batch_size 16 --resume
    torchrun --nproc_per_node 4 train_pretrain.py --data_path my.jsonl

The weights go to out/pretrain_512.pth (the number is --dim; a mixture of experts ends in _moe).
"""

import argparse
import math
import sys
import time
import uuid
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from dataset import (
    DataError,
    PackedRows,
    PaddedRows,
    PretrainDataset,
    RowBatches,
    collate,
    tokenizer_hash,
)
from model import LMConfig, MiniMindLM
from model.model import MiniMindOutput
from training import (
    ROOT,
    Distributed,
    Reporter,
    Run,
    StopSignal,
    TrainState,
    UserError,
    add_stage_arguments,
    autocast_dtype,
    changed_arguments,
    check_identity,
    check_output,
    check_stage_arguments,
    explain_out_of_memory,
    find_processes,
    find_resume,
    get_random_states,
    is_finished,
    json_arguments,
    load_tokenizer,
    load_weights,
    make_optimizer,
    make_parser,
    open_process_group,
    plan_run,
    read_state,
    report_user_errors,
    resolve_weights,
    seed_everything,
    set_random_states,
    start_wandb,
    steps_left,
    weights_path,
    write_config,
)

STAGE = "pretrain"
# (parameters up to, lowest, highest): learning rates outside make a warning.
LEARNING_RATES = ((1e7, 1e-4, 5e-3), (5e7, 1e-4, 3e-3), (math.inf, 5e-5, 1e-3))

Rows = PackedRows | PaddedRows


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser("Pretrain MiniMind on a JSONL file of {'text'} lines.")
    add_stage_arguments(
        parser,
        data_path=ROOT / "dataset" / "sample" / "pretrain.jsonl",
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


def init_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> MiniMindLM:
    """Build the network, the same on every process.

    Raises:
        UserError: for an impossible shape.
    """
    seed_everything(args.seed)
    try:
        config = LMConfig(
            dim=args.dim,
            n_layers=args.n_layers,
            vocab_size=len(tokenizer),
            dropout=args.dropout,
            flash_attn=args.flash_attn,
            use_moe=args.use_moe,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    except ValueError as error:
        raise UserError(f"--dim {args.dim} --n_layers {args.n_layers}: {error}") from None
    if args.max_seq_len > config.max_seq_len:
        raise UserError(
            f"--max_seq_len {args.max_seq_len} is above the model's context of {config.max_seq_len}"
        )
    model = MiniMindLM(config)
    if args.gradient_checkpointing:
        # Named so from transformers 5 on, where the older name is deprecated.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def open_rows(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> tuple[Rows, dict[str, Rows], Rows | None]:
    """The rows to train on, to validate on (by name) and to test on.

    Raises:
        DataError: naming what is wrong with a file.
    """

    def open_text(path: Path) -> PretrainDataset:
        return PretrainDataset(
            path,
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


def describe_data(path: Path, rows: Rows) -> str:
    """What there is to train on, in one line."""
    dataset = rows.dataset
    bad = f", {dataset.n_bad_lines:,} bad lines left out" if dataset.n_bad_lines else ""
    return (
        f"{path}: {dataset.n_documents:,} documents, {dataset.n_tokens:,} tokens in {len(rows):,}"
        f" rows, {rows.fill:.1%} filled{bad}"
    )


def make_loader(
    args: argparse.Namespace,
    rows: Dataset,
    world: Distributed,
    *,
    epoch: int = 0,
    start: int = 0,
    shuffle: bool = False,
) -> DataLoader:
    """This process's micro-batches of one epoch, from row `start` of its order on."""
    batches = RowBatches(
        len(rows),
        args.batch_size,
        seed=args.seed,
        epoch=epoch,
        rank=world.rank,
        world_size=world.world_size,
        start=start,
        shuffle=shuffle,
    )
    on_cuda = world.device.type == "cuda"
    workers = args.num_workers
    if workers is None:
        workers = 2 if on_cuda else 0
    return DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=on_cuda,
        generator=torch.Generator(),  # its own: a resumed run makes more loaders
    )


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on the device; to a GPU it is copied from pinned memory while that computes."""
    background = device.type == "cuda"
    return {name: values.to(device, non_blocking=background) for name, values in batch.items()}


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, MiniMindOutput]:
    """Cross-entropy in nats of every position, (B, T) fp32, weighted by the loss mask.

    Also the model's whole output.
    """
    output = model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
    )
    logits = output.logits.flatten(0, 1).float()  # (B · T, vocab)
    losses = F.cross_entropy(logits, batch["targets"].flatten(), reduction="none")
    return losses.view_as(batch["loss_mask"]) * batch["loss_mask"], output


def text_rows(batch: dict[str, Tensor]) -> Tensor:
    """How many rows are not padding alone, scalar fp32."""
    return batch["attention_mask"].any(1).sum().float()


def sum_dtype(device: torch.device) -> torch.dtype:
    """What long sums are kept in: float64, which mps does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def find_sample(run: Run, rows: Rows, window: list[dict[str, Tensor]], losses: Tensor) -> str:
    """`file:line` of the first sample of the first batch whose loss is not finite.

    The first batch of all stands for it where every loss is finite.

    Args:
        run: the run.
        rows: what the batches were made of.
        window: this process's batches.
        losses: (len(window),) the loss of each.
    """
    world = run.world
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    own = torch.zeros(2, world.world_size, dtype=torch.int64, device=world.device)
    own[0, world.rank] = len(bad)
    own[1, world.rank] = window[bad[0] if bad else 0]["sample"][0]
    counts, samples = world.sum(own).tolist()
    rank = next((rank for rank, count in enumerate(counts) if count), 0)
    return f"{rows.dataset.store.path}:{rows.dataset.line_number(samples[rank])}"


def train_epoch(
    run: Run, model: nn.Module, autocast: torch.autocast, rows: Rows, val: dict[str, Rows]
) -> None:
    """Go through what is left of the epoch, or until the run ends.

    The loss of a step is the mean over all target tokens of its window: of every micro-batch and
    every process. So the window is read first, its targets are counted everywhere, and each
    micro-batch adds its own share of the gradient. The auxiliary loss is a mean over rows alike.

    Args:
        run: the run.
        model: what is called, DDP wrapper included.
        autocast: the precision of matrix products.
        rows: what to train on.
        val: what to evaluate on, by name.
    """
    args, world, state, optimizer, scaler = (
        run.args, run.world, run.state, run.optimizer, run.scaler,
    )  # fmt: skip
    epoch, several = state.epoch, world.world_size > 1
    loader = make_loader(args, rows, world, epoch=epoch, start=state.row, shuffle=True)
    micro_batches = iter(loader)
    model.train()
    started = time.perf_counter()
    while window := list(islice(micro_batches, args.accumulation_steps)):
        random_states = get_random_states(world.device) if several else None
        window = [to_device(batch, world.device) for batch in window]
        counts = sum(torch.stack((b["loss_mask"].sum(), text_rows(b))) for b in window)
        targets, n_rows = world.sum(counts).tolist()
        lr = run.learning_rate()
        for group in optimizer.param_groups:
            group["lr"] = lr

        batch_losses, aux_losses, loads = [], [], []
        for i, batch in enumerate(window):
            # The processes agree before each batch: a long window must not delay them.
            if several and run.check_signal():
                optimizer.zero_grad(set_to_none=True)  # the open window is dropped
                set_random_states(random_states, world.device)
                return
            # DDP averages over processes, and exchanges gradients with the window's last batch.
            exchange = not several or i == len(window) - 1
            with nullcontext() if exchange else model.no_sync():
                with autocast:
                    losses, output = token_losses(model, batch)
                aux_loss = output.aux_loss * text_rows(batch) / n_rows
                loss = (losses.sum() / targets + aux_loss) * world.world_size
                scaler.scale(loss).backward()
            batch_losses.append(losses.detach().sum())
            aux_losses.append(aux_loss.detach())
            if output.expert_load is not None:
                loads.append(output.expert_load)

        sums = [torch.stack(batch_losses).sum(), torch.stack(aux_losses).sum()]
        sums = torch.stack(sums).to(sum_dtype(world.device))
        if loads:
            sums = torch.cat((sums, sum(loads).flatten()))
        loss_sum, aux_sum, *load = world.sum(sums).tolist()
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip).item()
        if math.isfinite(loss_sum + aux_sum + grad_norm):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        n_experts = len(load) // args.n_layers
        finished = time.perf_counter()
        run.add_step(
            targets=targets,
            loss=loss_sum,
            aux_loss=aux_sum,
            grad_norm=grad_norm,
            expert_load=[load[i : i + n_experts] for i in range(0, len(load), n_experts or 1)],
            seconds=finished - started,
            find_sample=partial(find_sample, run, rows, window, torch.stack(batch_losses)),
        )
        run.log_if_due(epoch, lr)
        evaluate_if_due(run, model, autocast, val)
        if not run.going_on or run.check_signal():
            return
        run.save_if_due()
        started = time.perf_counter()


@torch.no_grad()
def evaluate(
    run: Run, model: nn.Module, autocast: torch.autocast, sets: dict[str, Rows], prefix: str
) -> dict[str, float] | None:
    """Score the model on data sets, each on its own if there are several, and on all together.

    Args:
        run: the run.
        model: what is called.
        autocast: the precision of matrix products.
        sets: the data sets by name.
        prefix: "val" or "test", which the names of the scores begin with.

    Returns:
        Mean loss of a target token in nats, perplexity, and bits per byte: the bits that the model
        needs for the whole text, `</s>` included, by its bytes. Unlike the other two, that can be
        compared between tokenizers. None if a signal to stop came.
    """
    model.eval()
    sums = {}
    for name, rows in sets.items():
        total = torch.zeros(2, dtype=sum_dtype(run.world.device), device=run.world.device)
        for batch in make_loader(run.args, rows, run.world):
            if run.check_signal():
                return None
            batch = to_device(batch, run.world.device)
            with autocast:
                losses, _ = token_losses(model, batch)
            total += torch.stack([x.sum(dtype=total.dtype) for x in (losses, batch["loss_mask"])])
        sums[name] = (*run.world.sum(total).tolist(), rows.dataset.text_bytes)

    def scores(nats: float, tokens: float, text_bytes: int, name: str) -> dict[str, float]:
        loss = nats / tokens
        return {
            f"{prefix}_loss{name}": loss,
            f"{prefix}_perplexity{name}": math.exp(loss) if loss < 700 else math.inf,
            f"{prefix}_bits_per_byte{name}": nats / math.log(2) / text_bytes,
        }

    together = scores(*map(sum, zip(*sums.values(), strict=True)), "")
    for name, values in sums.items() if len(sums) > 1 else ():
        together |= scores(*values, f"/{name}")
    return together


def evaluate_if_due(
    run: Run, model: nn.Module, autocast: torch.autocast, val: dict[str, Rows]
) -> None:
    """Evaluate after the steps that ask for it, once."""
    state = run.state
    if not val or not run.due(run.args.eval_interval) or state.evaluated_at == state.step:
        return
    scores = evaluate(run, model, autocast, val, "val")
    if scores is not None:
        run.note_validation(scores)
    model.train()


def test_best(run: Run, autocast: torch.autocast, test: Rows) -> None:
    """Score the best weights, or the last ones where none were best, on the test data."""
    world, network = run.world, MiniMindLM(run.network.config)
    best = read_state(run.best_path) if world.is_main and run.state.best_step else None
    best = world.share(best) or run.network.state_dict()
    network.load_state_dict(best)
    scores = evaluate(run, network.to(world.device), autocast, {"": test}, "test")
    if scores is not None:
        run.log_scores(scores)
        run.state.tested = True


def train(
    args: argparse.Namespace,
    world: Distributed,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    network: MiniMindLM,
    path: Path,
    data: tuple[Rows, dict[str, Rows], Rows | None],
    resume: dict[str, Any] | None,
    identity: dict[str, Any],
    notes: list[str],
) -> Run | None:
    """Set up what a run needs, go through the epochs, test, save, report.

    Args:
        args: the flags.
        world: this process.
        dtype: of matrix products.
        tokenizer: of the data.
        network: the model, bare and on the CPU.
        path: of the weights.
        data: the rows to train on, to validate on (by name) and to test on.
        resume: the content of a resume file, or None for a new run; the main process's counts.
        identity: what may not change when the run is resumed.
        notes: what to tell the user first.

    Returns:
        The run as it ended; None if there was nothing to do.
    """
    rows, val, test = data
    notes = [*notes, describe_data(args.data_path, rows)]
    network.to(world.device)
    optimizer = make_optimizer(
        network, args.learning_rate, args.weight_decay, (args.beta1, args.beta2)
    )
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)
    seed_everything(args.seed + world.rank)  # for dropout, which differs between processes
    rows_per_step = args.batch_size * args.accumulation_steps * world.world_size
    state = TrainState(run_id=uuid.uuid4().hex, rows_per_step=rows_per_step)
    resume = world.share(resume)
    if resume is not None:
        state = resume["state"]
        network.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        scaler.load_state_dict(resume["scaler"])
        if world.rank < len(resume["random"]):
            set_random_states(resume["random"][world.rank], world.device)
        notes += changed_arguments(resume["arguments"], json_arguments(args))
    state.use_validation(" ".join(val_rows.dataset.fingerprint for val_rows in val.values()))
    model = torch.compile(network) if args.compile else network
    if world.world_size > 1:
        on_cuda = world.device.type == "cuda"
        model = DistributedDataParallel(model, [world.device.index] if on_cuda else None)

    total_steps = state.step + steps_left(state, len(rows), rows_per_step, args.epochs)
    folder = args.out_dir / "logs" / path.stem
    if resume is not None and is_finished(args, state, bool(val), test is not None):
        world.log(f"{path}: this run is finished, at step {state.step}; nothing to do")
        return None
    notes += plan_run(
        args,
        network,
        world,
        tokens_per_epoch=rows.dataset.n_tokens,
        total_steps=total_steps,
        dtype=dtype,
        learning_rates=LEARNING_RATES,
        folder=folder,
    )
    if args.dry_run:
        world.log("\n".join(notes))
        return None

    reporter = Reporter(
        world, folder, total_steps, state.step, None if resume is None else state.metrics_bytes
    )
    if world.is_main:
        write_config(folder / "config.json", args, state.run_id)
        if args.use_wandb:
            reporter.wandb_run = start_wandb(args, path.stem, state.wandb_id)
            state.wandb_id = reporter.wandb_run.id
    for note in notes:
        reporter.say(note)
    with StopSignal() as stop:
        run = Run(
            args=args,
            world=world,
            stage=STAGE,
            path=path,
            network=network,
            tokenizer_hash=tokenizer_hash(tokenizer),
            optimizer=optimizer,
            scaler=scaler,
            state=state,
            reporter=reporter,
            stop=stop,
            n_rows=len(rows),
            identity=identity,
            saved=resume is not None,
            dtype=dtype,
        )
        evaluate_if_due(run, model, autocast, val)  # a stopped run may have left this to do
        while run.going_on:
            train_epoch(run, model, autocast, rows, val)
        if test is not None and not run.exit_status and not state.tested:
            test_best(run, autocast, test)
        run.save()
        run.report(from_scratch=args.from_weight == "none")
    reporter.close()
    return run


def main() -> int:
    """Check what can be checked at once, then open the data, then train.

    Returns:
        The exit status: 130 or 143 if a signal stopped the run, else 0.

    Raises:
        UserError: for what the user can mend, the last save included if it failed.
    """
    args = parse_args()
    world = find_processes(args.device, args.ddp)
    dtype = autocast_dtype(args.dtype, world)
    tokenizer = load_tokenizer(args.tokenizer_path)
    network = init_model(args, tokenizer)
    path = weights_path(args.out_dir, STAGE, network.config)
    resume, notes = None, []
    if world.is_main:
        resume, notes = find_resume(path, STAGE, args.resume)
        if resume is None:
            check_output(path, network)
            if args.from_weight != "none":
                weights = resolve_weights(
                    "--from_weight", args.from_weight, args.out_dir, network.config
                )
                load_weights(weights, network, tokenizer_hash(tokenizer))
    data = open_rows(args, tokenizer)
    identity = {
        "--dim": args.dim,
        "--n_layers": args.n_layers,
        "--use_moe": args.use_moe,
        "--tokenizer_path": tokenizer_hash(tokenizer),
        "--data_path": data[0].dataset.fingerprint,
        "--val_ratio": args.val_ratio,
        "--max_seq_len": args.max_seq_len,
        "--packing": args.packing,
        "--seed": args.seed,
    }
    if resume is not None:
        check_identity(path, resume["identity"], identity)
    with open_process_group(world), explain_out_of_memory():
        run = train(args, world, dtype, tokenizer, network, path, data, resume, identity, notes)
    if run is None:
        return 0
    if run.save_error:
        raise UserError(f"the last save failed: {run.save_error}")
    if run.exit_status == 2:
        raise UserError(run.ending)
    world.log(run.ending or f"saved {path}")
    return run.exit_status


if __name__ == "__main__":
    with report_user_errors(DataError):
        sys.exit(main())
