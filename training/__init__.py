"""Plumbing that the stage scripts share; the training loops themselves are in the scripts."""

from .arguments import (
    ROOT,
    UserError,
    add_stage_arguments,
    count,
    flag,
    fraction_or_one,
    make_parser,
    positive_or_zero,
    report_user_errors,
    seed,
)
from .checkpoint import (
    check_output,
    load_model,
    load_weights,
    resolve_weights,
    save_weights,
    weights_path,
)
from .distributed import Distributed, autocast_dtype, find_processes, open_process_group
from .optimizer import make_optimizer
from .reporting import Reporter, start_wandb
from .schedule import get_lr, warmup_steps
from .tokenizer import load_tokenizer

__all__ = [
    "ROOT",
    "Distributed",
    "Reporter",
    "UserError",
    "add_stage_arguments",
    "autocast_dtype",
    "check_output",
    "count",
    "find_processes",
    "flag",
    "fraction_or_one",
    "get_lr",
    "load_model",
    "load_tokenizer",
    "load_weights",
    "make_optimizer",
    "make_parser",
    "open_process_group",
    "positive_or_zero",
    "report_user_errors",
    "resolve_weights",
    "save_weights",
    "seed",
    "start_wandb",
    "warmup_steps",
    "weights_path",
]
