"""Batch size, learning rate and epochs of a run whose flags leave them open."""

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

from common import Text, format_number
from diagnosis.compute import count_parameters
from diagnosis.plan import BUDGETS, LearningRates, usual_rate

from .arguments import set_min_lr
from .setup import Setup, Splits

# With fewer optimizer steps than this little is learnt, so that small data get small batches.
STEPS = 300
FEWEST_ROWS, MOST_ROWS, ROW_LENGTH = 4, 32, 512  # of a step, counted in rows of so many positions
# (positions of the data up to, passes over them). Reading a text up to four times is nearly as good
# as new text (https://arxiv.org/abs/2305.16264).
EPOCHS = ((2e6, 4), (6e6, 2), (math.inf, 1))
# What --size and --depth stop at, if the data last longer (https://arxiv.org/abs/2203.15556).
TOKENS_PER_PARAMETER = 20


class Settings(NamedTuple):
    """What fits a run of a known size."""

    rows_per_step: int  # of all micro-batches and processes
    learning_rate: float
    epochs: float


def fitting_settings(
    n_rows: int,
    row_length: int,
    n_parameters: int,
    rates: LearningRates,
    epochs: float | None = None,
) -> Settings:
    """The settings for `n_rows` rows of data, of `row_length` positions each.

    `epochs` are the passes over the data if they are known. The rows of a step are a power of two
    that leaves the run at least STEPS steps, as far as FEWEST_ROWS and MOST_ROWS allow.
    """
    positions = n_rows * row_length
    if epochs is None:
        epochs = next(passes for most, passes in EPOCHS if positions <= most)
    fewest, most = FEWEST_ROWS * ROW_LENGTH, MOST_ROWS * ROW_LENGTH
    positions_per_step = min(max(epochs * positions / STEPS, fewest), most)
    rows = 2 ** math.floor(math.log2(max(1.0, positions_per_step / row_length)))
    return Settings(rows, usual_rate(rates, n_parameters), epochs)


def choose_settings(setup: Setup, data: Splits) -> None:
    """Set --batch_size, --learning_rate and --epochs where neither flag nor stage gave them.

    A resumed run keeps those that it had. `setup.notes` get what was chosen, and why. All processes
    call this. UserError if --min_lr is above the learning rate.
    """
    args, rows = setup.args, data.train
    left_open = [n for n in ("batch_size", "learning_rate", "epochs") if getattr(args, n) is None]
    if any(getattr(args, name) for name in BUDGETS) and "epochs" in left_open:
        left_open.remove("epochs")  # a budget replaces them
    stored = setup.world.broadcast(setup.resume and setup.resume.arguments) or {}
    kept = [name for name in left_open if stored.get(name) is not None]
    if "learning_rate" in kept and args.min_lr is None:
        args.min_lr = stored["min_lr"]  # perhaps given, and of this rate
    for name in kept:
        setattr(args, name, stored[name])
    if kept:
        setup.notes.append(Text("--resume: {flags}, as before", flags=_flags(args, kept)))

    chosen = [name for name in left_open if name not in kept]
    if chosen:
        n_parameters = count_parameters(setup.raw_model).total
        found = fitting_settings(
            len(rows),
            args.max_seq_len,
            n_parameters,
            setup.stage.learning_rates[args.optimizer],
            _known_passes(setup, data),
        )
        enough = TOKENS_PER_PARAMETER * count_parameters(setup.raw_model).active
        positions = format_number(len(rows) * args.max_seq_len)
        reason = Text("{n} positions of data", n=positions)
        if (args.size or args.depth) and found.epochs * data.train.dataset.n_tokens > enough:
            found = found._replace(epochs=enough / data.train.dataset.n_tokens)
            reason = Text("{n} tokens per parameter", n=TOKENS_PER_PARAMETER)
        share = args.accumulation_steps * setup.world.world_size
        values = {**found._asdict(), "batch_size": max(1, found.rows_per_step // share)}
        for name in chosen:
            setattr(args, name, values[name])
        reasons = {
            "batch_size": Text("{n} steps or more, where the data allow it", n=STEPS),
            "learning_rate": Text(
                "{optimizer} with {n} parameters",
                optimizer=args.optimizer,
                n=format_number(n_parameters),
            ),
            "epochs": reason,
        }
        setup.notes += [
            Text("chosen: {flags} ({reason})", flags=_flags(args, [name]), reason=reasons[name])
            for name in chosen
        ]
    set_min_lr(args)


def _known_passes(setup: Setup, data: Splits) -> float | None:
    """How often the flags have the data read, as far as epochs and target tokens say it."""
    args, n_tokens = setup.args, data.train.dataset.n_tokens
    per_parameter = args.tokens_per_parameter or math.inf
    tokens = min(
        args.max_tokens or math.inf, per_parameter * count_parameters(setup.raw_model).active
    )
    passes = min(args.epochs or math.inf, tokens / n_tokens)
    return None if math.isinf(passes) else passes


def _flags(args: argparse.Namespace, names: Sequence[str]) -> str:
    return " ".join(f"--{name} {getattr(args, name):g}" for name in names)
