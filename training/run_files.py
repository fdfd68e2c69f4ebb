"""The files of a run: one run at a time writes them, and the next one keeps those of the last.

A run's name is that of its weights without `.pth`, as `full_sft_512_moe`, in its folder.

The lock is `.{name}.lock` beside the weights. It rests on the operating system's lock on that file
(flock; msvcrt's on Windows), which ends with the process that holds it, however that ends. Not
every shared file system carries it from host to host (Lustre without `-o flock`, NFS with nolock,
most of FUSE). There another host is known by the identity in the file, and a run there by the
file's time of change, which it renews every HEARTBEAT seconds: if that has stood still for SILENCE
seconds, by the clock of the one who waits, the run is dead.
"""

import json
import os
import platform
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from common import Text, UserError, report_os_errors

from .distributed import Distributed

if os.name == "nt":
    import msvcrt
else:
    import fcntl

HEARTBEAT, SILENCE = 5.0, 30.0  # seconds
PROCESS = uuid.uuid4().hex  # tells this process from all others, of other hosts too


def beside(weights: Path, end: str) -> Path:
    """The file of a run whose name ends in `_{end}.pth`: best, step{N}, resume, resume.prev."""
    return weights.with_name(f"{weights.stem}_{end}.pth")


def log_folder(weights: Path) -> Path:
    """The folder of a run's record."""
    return weights.parent / "logs" / weights.stem


@contextmanager
def lock_run(weights: Path, world: Distributed, dry_run: bool) -> Iterator[None]:
    """Keep the files of a run to this process, or to all of torchrun's, while the block runs.

    The main process holds the lock. A dry run, which writes nothing, needs none. UserError if
    another run holds it, or the folder cannot be written.
    """
    if dry_run or not world.is_main:
        yield
        return
    path = _lock_path(weights)
    with report_os_errors(f"--out_dir {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _acquire(path, weights)
    if hasattr(os, "register_at_fork"):
        # A forked loader process outlives a main process that is killed by some seconds.
        os.register_at_fork(after_in_child=file.close)
    ended = threading.Event()
    heartbeat = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        ended.set()
        heartbeat.join()
        _release(path, file)


def check_lock(weights: Path) -> None:
    """Raise UserError if this process does not hold the lock still, before it begins to write.

    Of two hosts that began in the same moment, without locks between them, only the later one does.
    """
    holder = _read_holder(_lock_path(weights))
    if holder.get("process") != PROCESS:
        raise _refusal(weights, holder)


def _lock_path(weights: Path) -> Path:
    return weights.with_name(f".{weights.stem}.lock")


def _refusal(weights: Path, holder: dict[str, Any]) -> UserError:
    who = f"process {holder['pid']} on {holder['host']}" if holder else "process unknown"
    return UserError(
        f"{weights}: another run is writing it ({who}): wait for its end, or choose another "
        "--run_name or --out_dir"
    )


def _acquire(path: Path, weights: Path) -> IO[bytes]:
    """The lock file, open and locked, with this process's identity in it."""
    while True:
        with ExitStack() as stack:
            file = stack.enter_context(path.open("a+b"))
            locked = _try_lock(file)
            holder = _read_holder(path)
            if locked is False:
                raise _refusal(weights, holder)
            if holder and (locked is None or holder["kernel"] != _kernel()):
                _await_silence(path, weights, holder)
            if _is_named(file, path):  # else its holder has just ended, and removed it
                try:
                    _write_holder(file)
                except OSError:
                    path.unlink(missing_ok=True)
                    raise
                stack.pop_all()
                return file


def _release(path: Path, file: IO[bytes]) -> None:
    if os.name == "nt":
        file.close()  # an open file cannot be removed there
    try:
        with suppress(OSError):
            if _read_holder(path).get("process") == PROCESS:
                path.unlink()
    finally:
        file.close()


def _try_lock(file: IO[bytes]) -> bool | None:
    """Whether the operating system's lock could be had; None where the file system has none."""
    try:
        if os.name == "nt":
            file.seek(1 << 30)  # what is locked cannot be read there
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _kernel() -> str:
    """What all processes share for which the operating system's locks hold everywhere."""
    with suppress(OSError):  # of Linux; containers of one host have names of their own
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return platform.node()


def _read_holder(path: Path) -> dict[str, Any]:
    """What the process that holds a lock, or held it when it died, wrote about itself, or {}."""
    try:
        holder = json.loads(path.read_bytes())
        return {name: holder[name] for name in ("host", "pid", "kernel", "process")}
    except (OSError, ValueError, KeyError, TypeError):  # none, or half written
        return {}


def _write_holder(file: IO[bytes]) -> None:
    me = {"host": platform.node(), "pid": os.getpid(), "kernel": _kernel(), "process": PROCESS}
    file.truncate(0)
    file.write(json.dumps(me).encode("utf-8"))
    file.flush()
    os.fsync(file.fileno())


def _is_named(file: IO[bytes], path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _await_silence(path: Path, weights: Path, holder: dict[str, Any]) -> None:
    """Wait until a holder on another host is known to be dead, or gone; UserError if it lives."""

    def changed() -> int:
        with path.open("rb") as file:  # on NFS a time of change is fresh where a file is opened
            return os.fstat(file.fileno()).st_mtime_ns

    print(
        f"{path}: left by a run on {holder['host']}; waiting {SILENCE:g} s to see if it lives",
        file=sys.stderr,
    )
    with suppress(FileNotFoundError):
        before, end = changed(), time.monotonic() + SILENCE
        while time.monotonic() < end:
            time.sleep(HEARTBEAT / 5)
            if changed() != before:
                raise _refusal(weights, holder)


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        with suppress(OSError):
            os.utime(path)


def move_earlier_run(weights: Path, out_dir: Path, overwrite: bool) -> list[str]:
    """Move what an earlier run of this name has left to `out_dir`/replaced/NAME-TIME, or delete it.

    There it lies as it did in `out_dir`, so that every tool takes that folder for its --out_dir.
    The resume files go first: if this is broken off, --resume finds all of a run or nothing of it.
    Returns a line for the user, or none if there was no such run.
    """
    left = _left_by_run(weights)
    if not left:
        return []
    try:
        if overwrite:
            for path in left:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return [Text("--overwrite: the earlier run {name} is deleted", name=weights.stem)]
        time_now = f"{datetime.now().astimezone():%Y%m%d-%H%M%S-%f}"
        folder = out_dir / "replaced" / f"{weights.stem}-{time_now}"
        for path in left:
            target = folder / path.relative_to(out_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
    except OSError as error:
        raise UserError(f"--out_dir {out_dir}: {error.filename}: {error.strerror}") from None
    text = Text("the earlier run {name} is moved to {folder}", name=weights.stem, folder=folder)
    return [text]


def _left_by_run(weights: Path) -> list[Path]:
    """Resume files, weights of all kinds, and the folder of logs, unless no run has begun there."""
    name, logs = re.escape(weights.stem), log_folder(weights)
    kinds = (rf"{name}_resume(\.prev|\.old)?\.pth", rf"{name}(_best|_step\d+)?\.(pth|json)")
    files = sorted(path for path in weights.parent.iterdir() if path.is_file())
    left = [path for kind in kinds for path in files if re.fullmatch(kind, path.name)]
    metrics = logs / "metrics.jsonl"
    if (left and logs.is_dir()) or (metrics.is_file() and metrics.stat().st_size):
        left.append(logs)
    return left
