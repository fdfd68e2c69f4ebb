"""The beginning of a run: new or resumed, with its plan said and its record opened."""

import argparse
import math
import uuid
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from common import UserError
from diagnosis.plan import LearningRates, Plan
from model import MiniMindLM, load_trained_state, weights_path

from .distributed import Distributed
from .reporting import Reporter, start_wandb, write_config
from .resume import (
    TrainState,
    changed_arguments,
    json_arguments,
    seed_everything,
    set_random_states,
)
from .run import Run
from .run_files import check_lock, make_way
from .schedule import get_lr, warmup_steps
from .signals import StopSignal

NOTHING: Mapping[str, str] = MappingProxyType({})


def run_identity(
    args: argparse.Namespace, rows: Any, tokenizer_hash: str, frozen: Mapping[str, str] = NOTHING
) -> dict[str, Any]:
    """By flag, what may not change when a run is resumed.

    Args:
        args: the flags.
        rows: what the run trains on.
        tokenizer_hash: of the tokenizer in use.
        frozen: by flag, what identifies weights that the run needs and does not train.
    """
    flags = (
        *("dim", "n_layers", "n_heads", "n_kv_heads", "use_moe"),
        *(("n_routed_experts", "n_shared_experts", "num_experts_per_tok") if args.use_moe else ()),
        *("max_seq_len", "packing", "val_ratio", "seed"),
        # Those that not every stage has.
        *("max_turns", "loss_weighting"),
        *("lora_rank", "lora_alpha", "lora_target"),
        *("max_prompt_length", "max_completion_length", "loss_type", "beta", "label_smoothing"),
        *("alpha", "temperature", "cache_teacher"),
    )
    return {f"--{name}": getattr(args, name) for name in flags if name in args} | {
        "--tokenizer_path": tokenizer_hash,
        "--data_path": rows.dataset.store.content,  # what is used of it follows from the flags
        **frozen,
    }


def start_run(
    args: argparse.Namespace,
    world: Distributed,
    dtype: torch.dtype,
    *,
    stage: str,
    network: MiniMindLM,
    tokenizer_hash: str,
    optimizer: torch.optim.Optimizer,
    stop: StopSignal,
    rows: Any,
    val: dict[str, Any],
    test: Any,
    resume: dict[str, Any] | None,
    notes: list[str],
    learning_rates: LearningRates,
    frozen: Mapping[str, str] = NOTHING,
    sequences: int = 1,
) -> Run | None:
    """Put a run where it starts or goes on, say what it will do, and open its record.

    Args:
        args: the stage's flags.
        world: this process.
        dtype: of matrix products.
        stage: name in the weights' file.
        network: the bare model, on its device.
        tokenizer_hash: of the tokenizer in use.
        optimizer: of the network's parameters.
        stop: whether a signal came.
        rows, val, test: what to train on, to validate on (by name), and to test on or None.
        resume: the content of a resume file, or None for a new run; the main process's counts.
        notes: what to tell the user first.
        learning_rates: as for `Plan`.
        frozen: as for `run_identity`.
        sequences: that a row stands for.

    Returns:
        None if there is nothing to do: the run is finished, or --dry_run was given.
    """
    path = weights_path(args.out_dir, stage, network.config, args.run_name)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    seed_everything(args.seed + world.rank)  # for dropout, which differs between processes
    rows_per_step = args.batch_size * args.accumulation_steps * world.world_size
    resume = world.broadcast(resume)
    if resume is None:
        state = TrainState(run_id=uuid.uuid4().hex, rows_per_step=rows_per_step)
    else:
        state = resume["state"]
        load_trained_state(network, resume["model"])
        # The moments of before, the flags of now.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({**resume["optimizer"], "param_groups": groups})
        if resume["scaler"]:  # it is empty without float16
            scaler.load_state_dict(resume["scaler"])
        if world.rank < len(resume["random"]):
            set_random_states(resume["random"][world.rank], world.device)
        notes = notes + changed_arguments(resume["arguments"], json_arguments(args))
    state.use_validation(" ".join(data.dataset.fingerprint for data in val.values()))
    if resume is not None and is_finished(args, state, bool(val), test is not None):
        world.log(f"{path}: this run is finished, at step {state.step}; nothing to do")
        return None

    wandb_run = None
    if args.use_wandb and world.is_main and not args.dry_run:
        wandb_run = start_wandb(args, path.stem, state.wandb_id)
        state.wandb_id = wandb_run.id
    if world.is_main and not args.dry_run:
        check_lock(path)
        if resume is None:
            notes = notes + make_way(path, args.out_dir, args.overwrite)
    folder = path.parent / "logs" / path.stem
    total_steps = state.step + steps_left(state, len(rows), rows_per_step, args.epochs)
    warmup = warmup_steps(args.warmup_iters, args.warmup_ratio, total_steps)
    plan = Plan(
        args,
        network,
        world.device,
        dtype,
        world.world_size,
        tokens_per_epoch=rows.dataset.n_tokens,
        total_steps=total_steps,
        warmup=warmup,
        learning_rates=learning_rates,
        sequences=sequences,
    )

    def lr_at(step: int) -> float:
        return get_lr(step, total_steps, args.learning_rate, warmup, args.min_lr, args.lr_decay)

    # A dry run leaves the picture of the run whose record this is as it is.
    picture = folder / ("lr.dry_run.png" if args.dry_run else "lr.png")
    notes = [
        *notes,
        *describe_rows("training", rows),
        *(note for data in val.values() for note in describe_rows("validation", data)),
        *(describe_rows("test", test) if test is not None else ()),
        *plan.describe(lr_at, picture if world.is_main else None),
    ]
    if args.dry_run:
        world.log("\n".join(notes))
        return None
    cut_to = None if resume is None else state.metrics_bytes
    try:
        reporter = Reporter(world, folder, total_steps, state.step, cut_to, wandb_run)
        if world.is_main:
            write_config(folder / "config.json", args, state.run_id, network.config.vocab_size)
    except OSError as error:
        raise UserError(f"--out_dir {folder}: {error.strerror or error}") from None
    for note in notes:
        reporter.say(note)
    return Run(
        args=args,
        world=world,
        stage=stage,
        path=path,
        network=network,
        tokenizer_hash=tokenizer_hash,
        optimizer=optimizer,
        scaler=scaler,
        autocast=torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32),
        state=state,
        reporter=reporter,
        stop=stop,
        n_rows=len(rows),
        identity=run_identity(args, rows, tokenizer_hash, frozen),
        saved_as="newest" if resume is None else resume["saved_as"],
        peak_tokens_per_second=plan.peak_tokens_per_second(),
    )


def describe_rows(use: str, rows: Any) -> list[str]:
    """What there is to train on, to validate on or to test on, and what was left out: lines."""
    dataset = rows.dataset
    size = (
        f"{dataset.n_documents:,} documents, {dataset.n_tokens:,} target tokens in {len(rows):,} "
        f"rows, {rows.fill:.1%} filled"
    )
    return [f"{use} data {dataset.store.path}: {note}" for note in (size, *dataset.notes)]


def steps_left(state: TrainState, n_rows: int, rows_per_step: int, epochs: int) -> int:
    """Optimizer steps from here to the end of a run.

    Args:
        state: where it stands.
        n_rows: rows of an epoch.
        rows_per_step: of all processes together.
        epochs: of the run.
    """
    if state.epoch >= epochs:
        return 0
    this_epoch = math.ceil((n_rows - state.row) / rows_per_step)
    return this_epoch + (epochs - state.epoch - 1) * math.ceil(n_rows / rows_per_step)


def is_finished(args: argparse.Namespace, state: TrainState, val: bool, test: bool) -> bool:
    """Whether a run that could be resumed has nothing left to do.

    Args:
        args: the flags.
        state: where it stands.
        val, test: whether there are data to validate on, and to test on.
    """
    patience = args.early_stopping_patience
    ended = state.epoch >= args.epochs or (patience and state.evaluations_since_best >= patience)
    scored = (state.evaluated_at == state.step or not val) and (state.tested or not test)
    return bool(ended and scored)
