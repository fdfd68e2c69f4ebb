"""Errors that users can fix, and how a script ends on them."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from .language import Text

LESS_MEMORY = Text(
    "what helps, in this order: a smaller --batch_size; with more --accumulation_steps the updates "
    "stay the same; --gradient_checkpointing; a shorter --max_seq_len"
)


class UserError(Exception):
    """An error that the user can fix; its text names the flag or the file, a line for each.

    Under torchrun rank 0 prints it, `every_rank` what may happen on one process only.
    """

    def __init__(self, text: str, *, every_rank: bool = False):
        super().__init__(text)
        self.every_rank = every_rank


@contextmanager
def report_user_errors() -> Iterator[None]:
    """End with exit status 2 and the text of a UserError, no traceback; with 130 on Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see interrupt.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # Windows consoles may differ
    try:
        yield
    except UserError as error:
        exit_with(str(error), every_rank=error.every_rank)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def report_os_errors(name: object) -> Iterator[None]:
    """Turn an OSError into a UserError about `name`: a flag with its value, or a file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}") from None


def exit_with(message: str, *, every_rank: bool = False) -> NoReturn:
    """Print the message on stderr and leave with exit status 2."""
    if every_rank or os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
