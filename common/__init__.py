"""What every part needs: user errors, types of flags, files that are written whole. No torch."""

from .arguments import (
    ROOT,
    TOKENIZER,
    BooleanFlag,
    StageParser,
    add_empty_think_ratio,
    add_parse_think,
    add_skip_bad_lines,
    add_text_columns,
    add_tokenizer_path,
    half_open_unit_interval,
    is_run_name,
    make_parser,
    name_or_path,
    named_path,
    non_negative_float,
    non_negative_int,
    number,
    open_unit_interval,
    port,
    positive_float,
    positive_int,
    positive_unit_interval,
    prompts,
    run_name,
    seed,
    unit_interval,
    user_path,
    weighted_path,
)
from .errors import LESS_MEMORY, UserError, report_os_errors, report_user_errors
from .files import SaveError, report_save_errors, write_atomically
from .language import Translate, add_lang, translator
from .units import format_duration, format_number
