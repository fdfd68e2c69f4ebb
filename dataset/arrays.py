"""Folders of memory-mapped arrays, built once whichever process comes first.

A folder holds one file of little-endian numbers for each array, and `meta.json`. It is built under
a temporary name, flushed, and renamed: it is there whole or not at all.
"""

import glob
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import ArrayLike

from common import UserError

POLL_SECONDS = 0.2
INDEX_DTYPE, LENGTH_DTYPE = np.dtype("<i8"), np.dtype("<i4")


class ArrayFolder:
    """The memory-mapped `arrays` of a folder by name, and its `meta`. It pickles as a path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.arrays = {
            name: _map_array(folder / name, dtype, length)
            for name, (dtype, length) in self.meta["arrays"].items()
        }

    def __reduce__(self) -> tuple[type["ArrayFolder"], tuple[Path]]:
        return ArrayFolder, (self.folder,)


Append = Callable[..., None]  # appends to arrays, by name, the numbers given for them
Fill = Callable[[Append], Mapping[str, Any] | None]  # returns what else meta.json holds


def find_arrays(folder: Path) -> ArrayFolder | None:
    """The arrays of a folder, or None unless it is there and complete."""
    try:
        return ArrayFolder(folder)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def build_once(folder: Path, dtypes: Mapping[str, np.dtype], fill: Fill) -> ArrayFolder:
    """Open the arrays of `folder`; where they are missing, one process lets `fill` write them.

    Other processes wait for the one that holds the lock, which the operating system takes back when
    that process dies. Under torchrun only the first process of each host asks for the lock; the
    others wait for the folder. Raises UserError if the folder cannot be written.
    """
    waits = "WORLD_SIZE" in os.environ and int(os.environ.get("LOCAL_RANK", "0")) > 0
    try:
        while (arrays := find_arrays(folder)) is None:
            if waits:
                time.sleep(POLL_SECONDS)
            else:
                _build_locked(folder, dtypes, fill)
        return arrays
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error}); --cache_dir names another folder"
        raise UserError(f"{folder.parent}: {problem}") from error


def _build_locked(folder: Path, dtypes: Mapping[str, np.dtype], fill: Fill) -> None:
    """Build a folder while no other process does, unless one has done so meanwhile."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=POLL_SECONDS)
    except Timeout:
        print(f"waiting for another process that builds {folder}", file=sys.stderr)
        lock.acquire()
    try:
        if find_arrays(folder) is None:
            _build(folder, dtypes, fill)
    finally:
        lock.release()


def _build(folder: Path, dtypes: Mapping[str, np.dtype], fill: Fill) -> None:
    """Build under a temporary name, flush, rename."""
    for leftover in folder.parent.glob(f"{glob.escape(folder.name)}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        with ExitStack() as stack:
            files = {n: stack.enter_context((temporary / n).open("wb")) for n in dtypes}

            def append(**values: ArrayLike) -> None:
                for name, numbers in values.items():
                    files[name].write(np.ascontiguousarray(numbers, dtype=dtypes[name]).data)

            meta = fill(append) or {}
            lengths = {n: files[n].tell() // dtypes[n].itemsize for n in dtypes}
        arrays = {name: (dtype.str, lengths[name]) for name, dtype in dtypes.items()}
        text = json.dumps({**meta, "arrays": arrays}, ensure_ascii=False, indent=1)
        (temporary / "meta.json").write_text(text, encoding="utf-8")
        for path in temporary.iterdir():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(folder)  # incomplete: a copy that was broken off, or a damaged file
        try:
            temporary.rename(folder)
        except OSError:
            if find_arrays(folder) is None:  # else another host was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _map_array(path: Path, dtype: str, length: int) -> np.ndarray:
    if length == 0:  # nothing that could be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r", shape=(length,)))
