"""Plumbing that the stage scripts share; the training loops themselves are in the scripts."""

from .arguments import (
    ROOT,
    UserError,
    add_chat_arguments,
    add_skip_bad_lines,
    add_stage_arguments,
    check_stage_arguments,
    count,
    count_or_zero,
    flag,
    fraction,
    fraction_or_one,
    make_parser,
    name_or_path,
    named_path,
    positive,
    positive_or_zero,
    report_user_errors,
    seed,
    share,
    user_path,
)
from .checkpoint import (
    check_output,
    load_adapter,
    load_first_weights,
    load_model,
    load_weights,
    read_about,
    resolve_weights,
    save_weights,
    weights_path,
)
from .curves import draw_curves, read_metrics
from .distributed import Distributed, autocast_dtype, find_processes, open_process_group
from .guards import explain_out_of_memory, find_sample
from .network import check_context, init_model
from .optimizer import make_optimizer
from .resume import (
    check_identity,
    find_resume,
    get_random_states,
    seed_everything,
    set_random_states,
)
from .run import Run, average, summarise
from .run_files import lock_run
from .schedule import get_lr, warmup_steps
from .signals import StopSignal
from .start import run_identity, start_run
from .tokenizer import load_tokenizer

__all__ = [
    "ROOT",
    "Distributed",
    "Run",
    "StopSignal",
    "UserError",
    "add_chat_arguments",
    "add_skip_bad_lines",
    "add_stage_arguments",
    "autocast_dtype",
    "average",
    "check_context",
    "check_identity",
    "check_output",
    "check_stage_arguments",
    "count",
    "count_or_zero",
    "draw_curves",
    "explain_out_of_memory",
    "find_processes",
    "find_resume",
    "find_sample",
    "flag",
    "fraction",
    "fraction_or_one",
    "get_lr",
    "get_random_states",
    "init_model",
    "load_adapter",
    "load_first_weights",
    "load_model",
    "load_tokenizer",
    "load_weights",
    "lock_run",
    "make_optimizer",
    "make_parser",
    "name_or_path",
    "named_path",
    "open_process_group",
    "positive",
    "positive_or_zero",
    "read_about",
    "read_metrics",
    "report_user_errors",
    "resolve_weights",
    "run_identity",
    "save_weights",
    "seed",
    "seed_everything",
    "set_random_states",
    "share",
    "start_run",
    "summarise",
    "user_path",
    "warmup_steps",
    "weights_path",
]
