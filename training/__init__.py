"""What stage scripts share; the training steps themselves are in the scripts."""

from model import summarise

from .arguments import (
    add_chat_arguments,
    add_stage_arguments,
    check_stage_arguments,
)
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
from .run import Run, average
from .run_files import lock_run
from .schedule import get_lr, warmup_steps
from .signals import StopSignal
from .start import run_identity, start_run
from .weights import check_output, load_first_weights

__all__ = [
    "Distributed",
    "Run",
    "StopSignal",
    "add_chat_arguments",
    "add_stage_arguments",
    "autocast_dtype",
    "average",
    "check_context",
    "check_identity",
    "check_output",
    "check_stage_arguments",
    "explain_out_of_memory",
    "find_processes",
    "find_resume",
    "find_sample",
    "get_lr",
    "get_random_states",
    "init_model",
    "load_first_weights",
    "lock_run",
    "make_optimizer",
    "open_process_group",
    "run_identity",
    "seed_everything",
    "set_random_states",
    "start_run",
    "summarise",
    "warmup_steps",
]
