"""What stage scripts share; the training steps themselves are in the scripts."""

from .arguments import CHAT_IDENTITY, add_chat_arguments, make_stage_parser, parse_stage_arguments
from .distributed import Distributed, autocast_dtype, find_processes, open_process_group
from .guards import explain_out_of_memory
from .optimizer import make_optimizer
from .run import Run
from .run_files import lock_run
from .schedule import get_lr
from .settings import choose_settings
from .setup import (
    Rows,
    Setup,
    Splits,
    Stage,
    check_context,
    find_resume,
    load_first_weights,
    map_sources,
    open_chat_splits,
    open_splits,
    prepare,
)
from .signals import StopSignal
from .start import start_run
from .step import StepTotals, count_targets, rows_with_text, score_tokens
