"""Stage 1: learn to predict the next token of plain text, {"text"} lines.

    python train_pretrain.py
    python train_pretrain.py --data_path my.jsonl --val_data_path my_val.jsonl --batch_size 16
    torchrun --nproc_per_node 4 train_pretrain.py --data_path my.jsonl

The weights go to out/pretrain_512.pth (the number is --dim; a mixture of experts ends in _moe).
"""

import argparse
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

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
from training import (
    ROOT,
    Distributed,
    Reporter,
    UserError,
    add_stage_arguments,
    autocast_dtype,
    check_output,
    find_processes,
    get_lr,
    load_tokenizer,
    load_weights,
    make_optimizer,
    make_parser,
    open_process_group,
    report_user_errors,
    resolve_weights,
    save_weights,
    start_wandb,
    warmup_steps,
    weights_path,
)

STAGE = "pretrain"


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
    if args.min_lr is None:
        args.min_lr = args.learning_rate / 10
    if args.min_lr > args.learning_rate:
        raise UserError(f"--min_lr {args.min_lr:g} is above --learning_rate {args.learning_rate:g}")
    return args


def init_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> MiniMindLM:
    """Build the network, the same on every process, or load the weights to go on from.

    Raises:
        UserError: for an impossible shape, or weights that do not fit it.
    """
    torch.manual_seed(args.seed)
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
    if args.from_weight != "none":
        path = resolve_weights("--from_weight", args.from_weight, args.out_dir, config)
        load_weights(path, model, tokenizer_hash(tokenizer))
    if args.gradient_checkpointing:
        # Named so from transformers 5 on, where the older name is deprecated.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of every position, (B, T) fp32, 0 where nothing is to be learnt.

    Also the auxiliary loss of a mixture of experts (scalar; 0 if dense).
    """
    output = model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
    )
    logits = output.logits.flatten(0, 1).float()  # (B · T, vocab)
    losses = F.cross_entropy(logits, batch["targets"].flatten(), reduction="none")
    return losses.view_as(batch["loss_mask"]) * batch["loss_mask"], output.aux_loss


def make_loader(
    args: argparse.Namespace, rows: Dataset, world: Distributed, epoch: int, shuffle: bool
) -> DataLoader:
    """This process's micro-batches of one epoch."""
    batches = RowBatches(
        len(rows),
        args.batch_size,
        seed=args.seed,
        epoch=epoch,
        rank=world.rank,
        world_size=world.world_size,
        shuffle=shuffle,
    )
    on_cuda = world.device.type == "cuda"
    workers = args.num_workers
    if workers is None:
        workers = 2 if on_cuda else 0
    return DataLoader(
        rows, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=on_cuda
    )


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on the device; to a GPU it is copied from pinned memory while that computes."""
    background = device.type == "cuda"
    return {name: values.to(device, non_blocking=background) for name, values in batch.items()}


def text_rows(batch: dict[str, Tensor]) -> Tensor:
    """How many rows are not padding alone, scalar fp32."""
    return batch["attention_mask"].any(1).sum().float()


def sum_dtype(device: torch.device) -> torch.dtype:
    """What long sums are kept in: float64, which mps does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def train_epoch(
    epoch: int,
    step: int,
    total_steps: int,
    args: argparse.Namespace,
    world: Distributed,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: torch.autocast,
    loader: DataLoader,
    reporter: Reporter,
    checkpoint: Callable[[int], None],
) -> int:
    """Go through the loader once.

    The loss of a step is the mean over all target tokens of its window: of every micro-batch and
    every process. So the window is read first, its targets are counted everywhere, and each
    micro-batch adds its own share of the gradient. The auxiliary loss is a mean over rows alike.

    Args:
        epoch: number of the epoch, from 0.
        step: optimizer steps taken before.
        total_steps: optimizer steps of the run.
        model: what is called, DDP wrapper included.
        checkpoint: called with the step whenever weights are to be saved.

    Returns:
        Optimizer steps taken so far.
    """
    model.train()
    warmup = warmup_steps(args.warmup_iters, total_steps)
    seen = torch.zeros(3, dtype=sum_dtype(world.device), device=world.device)  # loss, aux, targets
    since, since_step = time.perf_counter(), step
    micro_batches = iter(loader)
    windows = math.ceil(len(loader) / args.accumulation_steps)
    for index in range(windows):
        window = list(islice(micro_batches, args.accumulation_steps))
        window = [to_device(batch, world.device) for batch in window]
        local = sum(torch.stack((b["loss_mask"].sum(), text_rows(b))) for b in window)
        targets, n_rows = world.sum(local.clone())
        lr = get_lr(step, total_steps, args.learning_rate, warmup, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        for i, batch in enumerate(window):
            # DDP averages over processes, and exchanges gradients with the window's last batch.
            exchange = world.world_size == 1 or i == len(window) - 1
            with nullcontext() if exchange else model.no_sync():
                with autocast:
                    losses, aux_loss = token_losses(model, batch)
                aux_loss = aux_loss * text_rows(batch) / n_rows
                loss = (losses.sum() / targets + aux_loss) * world.world_size
                scaler.scale(loss).backward()
            seen[0] += losses.detach().sum()
            seen[1] += aux_loss.detach()
        seen[2] += local[0]

        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        reporter.advance(step)

        save = step % args.save_interval == 0 or step == total_steps
        if save or step % args.log_interval == 0 or index == windows - 1:
            loss_sum, aux_sum, tokens = world.sum(seen).tolist()
            if not math.isfinite(loss_sum):
                raise UserError(
                    f"step {step}: the loss is {loss_sum}; try a smaller --learning_rate "
                    f"(it is {args.learning_rate:g}); the weights saved before are kept"
                )
            seconds = time.perf_counter() - since
            figures = {
                "loss": loss_sum / tokens,
                "lr": lr,
                "grad_norm": grad_norm.item(),
                "tokens_per_second": round(tokens / seconds),
                "epoch": epoch,
            }
            if aux_sum:
                figures["aux_loss"] = aux_sum / (step - since_step)
            reporter.log(step, round(tokens), **figures)
            seen.zero_()
            since, since_step = time.perf_counter(), step
        if save:
            paused = time.perf_counter()
            checkpoint(step)
            model.train()
            since += time.perf_counter() - paused
    return step


@torch.no_grad()
def evaluate(
    model: nn.Module,
    autocast: torch.autocast,
    world: Distributed,
    loader: DataLoader,
    text_bytes: int,
) -> dict[str, float]:
    """Score the model on a data set.

    Args:
        model: the bare model.
        loader: one pass over the data set.
        text_bytes: UTF-8 bytes of its text.

    Returns:
        Mean loss of a target token in nats, and bits per byte: the bits that the model needs for
        the whole text, `</s>` included, by its bytes. Unlike the loss, it can be compared between
        tokenizers.
    """
    model.eval()
    sums = torch.zeros(2, dtype=sum_dtype(world.device), device=world.device)
    for batch in loader:
        batch = to_device(batch, world.device)
        with autocast:
            losses, _ = token_losses(model, batch)
        sums += torch.stack((losses.sum(), batch["loss_mask"].sum()))
    nats, tokens = world.sum(sums).tolist()
    return {"val_loss": nats / tokens, "val_bits_per_byte": nats / math.log(2) / text_bytes}


def train(
    args: argparse.Namespace,
    world: Distributed,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    bare_model: MiniMindLM,
    path: Path,
    rows: PackedRows | PaddedRows,
    val_rows: PackedRows | PaddedRows | None,
) -> None:
    """Set up optimizer, precision and processes, go through the epochs, save to `path`."""
    bare_model.to(world.device)
    optimizer = make_optimizer(
        bare_model, args.learning_rate, args.weight_decay, (args.beta1, args.beta2)
    )
    model = torch.compile(bare_model) if args.compile else bare_model
    if world.world_size > 1:
        on_cuda = world.device.type == "cuda"
        model = DistributedDataParallel(model, [world.device.index] if on_cuda else None)
    torch.manual_seed(args.seed + world.rank)  # for dropout, which differs between processes
    autocast = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)

    micro_batches = len(make_loader(args, rows, world, epoch=0, shuffle=True))
    total_steps = args.epochs * math.ceil(micro_batches / args.accumulation_steps)
    world.log(
        f"{path.stem}: {sum(p.numel() for p in bare_model.parameters()) / 1e6:.2f} M parameters"
        f" on {world.world_size} × {world.device} in {str(dtype).removeprefix('torch.')}\n"
        f"{args.data_path}: {rows.dataset.n_documents:,} documents,"
        f" {rows.dataset.n_tokens:,} tokens in {len(rows):,} rows, {rows.fill:.1%} filled\n"
        f"{total_steps:,} steps of {args.batch_size} × {args.accumulation_steps}"
        f" × {world.world_size} rows"
    )
    reporter = Reporter(
        world,
        total_steps,
        args.out_dir / "logs" / path.stem / "metrics.jsonl",
        start_wandb(args, path.stem) if args.use_wandb and world.is_main else None,
    )

    def checkpoint(step: int) -> None:
        if val_rows is not None:
            loader = make_loader(args, val_rows, world, epoch=0, shuffle=False)
            scores = evaluate(bare_model, autocast, world, loader, val_rows.dataset.text_bytes)
            reporter.log_scores(step, **scores)
        if world.is_main:
            save_weights(
                path,
                bare_model,
                bare_model.config,
                STAGE,
                tokenizer_hash(tokenizer),
                getattr(torch, args.save_dtype),
            )

    step = 0
    for epoch in range(args.epochs):
        loader = make_loader(args, rows, world, epoch, shuffle=True)
        step = train_epoch(
            epoch,
            step,
            total_steps,
            args,
            world,
            model,
            optimizer,
            scaler,
            autocast,
            loader,
            reporter,
            checkpoint,
        )
    reporter.close()
    world.log(f"saved {path}")


def main() -> None:
    """Check what can be checked at once, then open the data, then train."""
    args = parse_args()
    world = find_processes(args.device, args.ddp)
    dtype = autocast_dtype(args.dtype, world)
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = init_model(args, tokenizer)
    path = weights_path(args.out_dir, STAGE, model.config)
    if world.is_main:
        check_output(path, model)

    def open_rows(data_path: Path) -> PackedRows | PaddedRows:
        dataset = PretrainDataset(
            data_path,
            tokenizer,
            args.max_seq_len + 1,  # so that X, one id shorter, can fill a row
            cache_dir=args.cache_dir,
            skip_bad_lines=args.skip_bad_lines,
        )
        if dataset.n_bad_lines:
            world.log(f"{data_path}: {dataset.n_bad_lines} bad lines left out")
        return PackedRows(dataset, args.max_seq_len) if args.packing else PaddedRows(dataset)

    val_rows = open_rows(args.val_data_path) if args.val_data_path else None
    rows = open_rows(args.data_path)
    with open_process_group(world):
        train(args, world, dtype, tokenizer, model, path, rows, val_rows)


if __name__ == "__main__":
    with report_user_errors(DataError):
        main()
