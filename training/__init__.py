"""Plumbing that the stage scripts share; the training loops themselves are in the scripts."""

from .arguments import (
    ROOT,
    UserError,
    add_stage_arguments,
    check_stage_arguments,
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
    read_state,
    resolve_weights,
    save_weights,
    weights_path,
)
from .curves import draw_curves, read_metrics
from .distributed import Distributed, autocast_dtype, find_processes, open_process_group
from .guards import explain_out_of_memory
from .optimizer import make_optimizer

from .reporting import Reporter, start_wandb, write_config
from .resume import (
    TrainState,
    changed_arguments,
    check_identity,
    find_resume,
    get_random_states,
    json_arguments,
    seed_everything,
    set_random_states,
)
from .run import Run, is_finished, plan_run, steps_left
from .schedule import get_lr, warmup_steps
from .signals import StopSignal
from .tokenizer import load_tokenizer

__all__ = [
    "ROOT",
    "Distributed",
    "Reporter",
    "Run",
    "StopSignal",
    "TrainState",
    "UserError",
    "add_stage_arguments",
    "autocast_dtype",
    "changed_arguments",
    "check_identity",
    "check_output",
    "check_stage_arguments",
    "count",
    "draw_curves",
    "explain_out_of_memory",
    "find_processes",
    "find_resume",
    "flag",
    "fraction_or_one",
    "get_lr",
    "get_random_states",
    "is_finished",
    "json_arguments",
    "load_model",
    "load_tokenizer",
    "load_weights",
    "make_optimizer",
    "make_parser",
    "open_process_group",
    "plan_run",
    "positive_or_zero",
    "read_metrics",
    "read_state",
    "report_user_errors",
    "resolve_weights",
    "save_weights",
    "seed",
    "seed_everything",
    "set_random_states",
    "start_wandb",
    "steps_left",
    "warmup_steps",
    "weights_path",
    "write_config",
]
