"""Files that are written whole or not at all."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_atomically(
    path: Path, write: Callable[[Any], None], previous: Path | None = None
) -> None:
    """Call `write` with a binary file that becomes `path` once it is complete and on disk.

    Whatever goes wrong, the file that was there before stays as it was; else it is replaced, or
    moved to `previous`. The folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be flushed, nor on some network drives
        folder = os.open(path.parent, os.O_RDONLY)
        with suppress(OSError):
            os.fsync(folder)
        os.close(folder)


class SaveError(Exception):
    """A file that could not be saved, in one line."""


@contextmanager
def report_save_errors(path: Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into a SaveError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError of its own when it has met an OSError.
        origin = error if isinstance(error, OSError) else error.__context__
        reason = getattr(origin, "strerror", None) or f"{error}".partition("\n")[0]
        raise SaveError(f"{path}: cannot be saved ({reason}); what was there is kept") from None
