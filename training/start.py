"""The beginning of a run: new or resumed, its plan reported and its record opened."""

import math
import time
import uuid
from dataclasses import replace

import torch

from common import Text, UserError, report_os_errors
from dataset import Mixture
from diagnosis.plan import BUDGETS, Plan
from model import keep_tokenizer

from .budget import Budget, make_budget
from .record import Record, write_config
from .resume import (
    TrainState,
    changed_arguments,
    json_arguments,
    seed_everything,
    set_random_states,
)
from .run import Run
from .run_files import check_lock, log_folder, move_earlier_run
from .samples import encode_prompts
from .saving import Saver, load_resume
from .schedule import get_lr, warmup_steps
from .setup import Rows, Setup, Splits
from .signals import StopSignal
from .step import Score
from .tracking import start_tracker


def start_run(
    setup: Setup,
    data: Splits,
    stop: StopSignal,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    score: Score,
) -> Run | None:
    """Start or resume a run, its model on its device: report its plan and open its record.

    None if there is nothing to do: the run is finished, or --dry_run was given. UserError if
    another run holds the files, or they cannot be written.
    """
    args, world, path = setup.args, setup.world, setup.path
    raw_model = setup.raw_model
    seed_everything(args.seed + world.rank)  # for dropout, which differs between processes
    resume = world.broadcast(setup.resume)
    notes = setup.notes
    if resume is None:
        state = TrainState(run_id=uuid.uuid4().hex, rows_per_step=setup.rows_per_step)
    else:
        state = resume.state
        load_resume(setup, resume, optimizer, scaler)
        if world.rank < len(resume.random):
            set_random_states(resume.random[world.rank], world.device)
        notes = notes + changed_arguments(resume.arguments, json_arguments(args))
    state.use_validation(" ".join(rows.dataset.fingerprint for rows in data.val.values()))
    budget = make_budget(setup, data)
    if args.mix_schedule:
        if state.mixture_tokens is None:
            state.mixture_tokens = budget.total_tokens()
        if state.mixture_tokens is None:
            raise UserError("--mix_schedule: its end is not known; give --epochs or --max_tokens")
        data.train.set_total(state.mixture_tokens)  # another one would give other rows
    if resume is not None and is_finished(setup, state, data, budget):
        text = Text(
            "{path}: this run is finished, at step {step}; nothing to do",
            path=path,
            step=state.step,
        )
        world.log(text)
        return None
    prompts = encode_prompts(setup)
    total_steps = planned_steps(budget, state)
    warmup = warmup_steps(args.warmup_iters, args.warmup_ratio, total_steps or 0)
    if resume is None:
        check_budget(setup, budget, total_steps, warmup)

    folder, tracker = log_folder(path), None
    if args.tracker and world.is_main and not args.dry_run:
        tracker = start_tracker(args, path.stem, folder, state)
    if world.is_main and not args.dry_run:
        check_lock(path)
        if resume is None:
            notes = notes + move_earlier_run(path, args.out_dir, args.overwrite)
    plan = Plan(
        args,
        raw_model,
        world.device,
        setup.dtype,
        world.world_size,
        tokens_per_epoch=data.train.dataset.n_tokens,
        epochs=total_steps and budget.epochs_after(state, total_steps - state.step),
        total_steps=total_steps,
        warmup=warmup,
        learning_rates=setup.stage.learning_rates[args.optimizer],
        sequences=setup.stage.sequences_per_row,
    )

    def lr_at(step: int) -> float:
        return get_lr(step, total_steps, args.learning_rate, warmup, args.min_lr, args.lr_decay)

    # A dry run leaves the picture of the run whose record this is as it is.
    picture = folder / ("lr.dry_run.png" if args.dry_run else "lr.png")
    validation = Text("validation data")
    notes = [
        *notes,
        *describe_rows(Text("training data"), data.train),
        *(note for rows in data.val.values() for note in describe_rows(validation, rows)),
        *(describe_rows(Text("test data"), data.test) if data.test is not None else ()),
        *plan.describe(lr_at, picture if world.is_main else None),
    ]
    if args.dry_run:
        for note in notes:
            world.log(note)
        return None
    with report_os_errors(f"--out_dir {folder}"):
        record = Record(world, folder, total_steps, state, tracker)
        if world.is_main:
            keep_tokenizer(setup.tokenizer, args.out_dir, setup.tokenizer_hash)
            vocab_size = raw_model.config.vocab_size
            write_config(folder / "config.json", args, state.run_id, vocab_size)
    for note in notes:
        record.print(note)
    saved_as = "newest" if resume is None else resume.saved_as
    saver = Saver(setup, setup.identity(data.train), optimizer, scaler, record.print, saved_as)
    speed = plan.peak_tokens_per_second()
    return Run(setup, data, state, budget, saver, record, stop, score, prompts, speed)


def describe_rows(use: Text, rows: Rows) -> list[Text]:
    """What there is to train on, to validate on or to test on, and what was left out: lines."""
    if isinstance(rows, Mixture):
        parts = [line for part in rows.parts.values() for line in describe_rows(use, part)]
        return [*parts, *(Text("{use}: {line}", use=use, line=line) for line in rows.describe())]
    dataset = rows.dataset
    size = Text(
        "{documents:,} documents, {tokens:,} target tokens in {rows:,} rows, {fill:.1%} filled",
        documents=dataset.n_documents,
        tokens=dataset.n_tokens,
        rows=len(rows),
        fill=rows.fill,
    )
    return [
        Text("{use} {path}: {note}", use=use, path=dataset.store.path, note=note)
        for note in (size, *dataset.notes)
    ]


def planned_steps(budget: Budget, state: TrainState) -> int | None:
    """Optimizer steps of a run; None if time alone limits it, and no step was measured."""
    if state.step == 0:
        budget = replace(budget, max_seconds=None)
    if not budget.has_limits:
        return None
    return state.step + budget.steps_left(state)


def check_budget(setup: Setup, budget: Budget, total_steps: int | None, warmup: int) -> None:
    """Raise UserError if the budget of a new run ends before its warm-up, or its first step."""
    args = setup.args
    given = " ".join(f"--{name} {getattr(args, name):g}" for name in BUDGETS if getattr(args, name))
    if given and total_steps is not None and 0 < total_steps <= warmup:
        raise UserError(
            f"{given}: the run's {total_steps:,} steps end before the warm-up of {warmup:,}: "
            "lower --warmup_iters or --warmup_ratio"
        )
    if budget.max_seconds is None:
        return
    spent = setup.world.broadcast(time.perf_counter() - setup.started)
    if spent >= budget.max_seconds:
        raise UserError(
            f"--max_minutes {args.max_minutes:g}: preparing the run took {spent / 60:.2g} minutes; "
            "what could be kept is ready now: start again, or give it more"
        )


def is_finished(setup: Setup, state: TrainState, data: Splits, budget: Budget) -> bool:
    """Whether a run that could be resumed has nothing left to do."""
    patience = setup.args.early_stopping_patience or math.inf
    ended = budget.is_used_up(state) or state.evaluations_since_best >= patience
    validated = not data.val or state.evaluated_at == state.step
    return ended and validated and (state.tested or data.test is None)
