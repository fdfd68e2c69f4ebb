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
    """Memory-mapped arrays of a folder that `build_once` made. It pickles as the folder's path.

    Attributes:
        arrays: the arrays by name.
        meta: content of meta.json.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.arrays = {
            name: _map_array(folder / name, dtype, length)
            for name, (dtype, length) in self.meta["arrays"].items()
        }

    def __reduce__(self) -> tuple[type["ArrayFolder"], tuple[Path]]:
        return ArrayFolder, (self.folder,)

    @classmethod
    def find(cls, folder: Path) -> "ArrayFolder | None":
        """The arrays of a folder if it is there and complete."""
        return cls(folder) if _is_complete(folder) else None


class ArrayWriter:
    """Appends numbers to the arrays of a folder that is being built."""

    def __init__(self, folder: Path, dtypes: Mapping[str, np.dtype]) -> None:
        self._dtypes = dtypes
        self._lengths = dict.fromkeys(dtypes, 0)
        self._stack = ExitStack()
        self._files = {
            name: self._stack.enter_context((folder / name).open("wb")) for name in dtypes
        }

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def append(self, **values: ArrayLike) -> None:
        """Append to each named array the values given for it, converted to its dtype."""
        for name, numbers in values.items():
            array = np.ascontiguousarray(numbers, dtype=self._dtypes[name])
            self._files[name].write(array.data)
            self._lengths[name] += len(array)

    def description(self) -> dict[str, tuple[str, int]]:
        """The dtype and length of each array."""
        return {name: (dtype.str, self._lengths[name]) for name, dtype in self._dtypes.items()}


def build_once(
    folder: Path,
    dtypes: Mapping[str, np.dtype],
    fill: Callable[[ArrayWriter], Mapping[str, Any] | None],
) -> ArrayFolder:
    """Open the arrays of `folder`; where they are missing, one process builds them first.

    Other processes wait for the one that holds the lock, which the operating system takes back when
    that process dies. Under torchrun only the first process of each host asks for the lock; the
    others wait for the folder to appear.

    Args:
        folder: where the arrays are.
        dtypes: dtype of each array.
        fill: writes the arrays, and returns what else meta.json holds.

    Raises:
        UserError: if the folder cannot be written.
    """
    try:
        if _is_complete(folder):
            return ArrayFolder(folder)
        if "WORLD_SIZE" in os.environ and int(os.environ.get("LOCAL_RANK", "0")) > 0:
            while not _is_complete(folder):
                time.sleep(POLL_SECONDS)
            return ArrayFolder(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        try:
            lock.acquire(timeout=POLL_SECONDS)
        except Timeout:
            print(f"waiting for another process that builds {folder}", file=sys.stderr)
            lock.acquire()
        try:
            if not _is_complete(folder):
                _build_folder(folder, dtypes, fill)
        finally:
            lock.release()
        return ArrayFolder(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{folder.parent}: cannot be written ({reason}); --cache_dir names another folder"
        ) from error


def _build_folder(
    folder: Path,
    dtypes: Mapping[str, np.dtype],
    fill: Callable[[ArrayWriter], Mapping[str, Any] | None],
) -> None:
    """Build under a temporary name, flush, rename. The caller holds the lock."""
    for leftover in folder.parent.glob(f"{glob.escape(folder.name)}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        with ArrayWriter(temporary, dtypes) as writer:
            meta = {**(fill(writer) or {}), "arrays": writer.description()}
        text = json.dumps(meta, ensure_ascii=False, indent=1)
        (temporary / "meta.json").write_text(text, encoding="utf-8")
        for path in temporary.iterdir():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(folder)  # incomplete: a copy that was broken off, or a damaged file
        try:
            temporary.rename(folder)
        except OSError:
            if not _is_complete(folder):  # else another host was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    """Whether the folder is there with arrays of the lengths that meta.json names."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return all(
            (folder / name).stat().st_size == np.dtype(dtype).itemsize * length
            for name, (dtype, length) in meta["arrays"].items()
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False


def _map_array(path: Path, dtype: str, length: int) -> np.ndarray:
    if length == 0:  # nothing that could be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r", shape=(length,)))
