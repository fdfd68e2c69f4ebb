"""What the tests of interrupted runs share: ways to interrupt one, and to compare what is left."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

SHAPE = ["--dim", "32", "--n_layers", "1", "--device", "cpu"]
TIMING = {"seconds", "tokens_per_second", "memory_gb", "mfu"}
WORDS = ["red", "green", "blue", "一座山", "河流", "stone", "云"]


def heed_ctrl_c() -> None:
    """For a new process: what a shell starts in the background ignores Ctrl-C, and so its own."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Killed(BaseException):
    """Stands for SIGKILL."""


def write_texts(path: Path, count: int, longest: int = 41) -> Path:
    """Documents of very different lengths, the longest of some 90 tokens."""
    texts = [
        " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 2 + (7 * i) % longest))
        for i in range(count)
    ]
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@contextmanager
def at_call(
    n: int,
    owner: Any,
    name: str,
    act: Callable[[], None],
    *,
    after: bool = False,
    when: Callable[..., bool] = lambda *args: True,
) -> Iterator[None]:
    """Do `act` before (or `after`) the n-th call, from 1, of a method, of those that `when` takes.

    Args:
        n: which call.
        owner, name: the method.
        act: what to do.
        after: do it when the call is done.
        when: gets the call's positional arguments and says whether it counts.
    """
    method = getattr(owner, name)
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += when(*args)
        now = calls == n and when(*args)
        if now and not after:
            act()
        value = method(*args, **kwargs)
        if now and after:
            act()
        return value

    with mock.patch.object(owner, name, counted):
        yield
    assert calls >= n, f"{name} was called {calls} times"


@contextmanager
def killed(n: int, owner: Any, name: str, **how: Any) -> Iterator[None]:
    """The run inside dies in the n-th call of a method; arguments as for `at_call`.

    From then on it renames and deletes nothing, like a process that is gone.
    """
    dead = False

    def die():
        nonlocal dead
        dead = True
        raise Killed

    def alive(method):
        def call(*args, **kwargs):
            if dead:
                raise Killed
            return method(*args, **kwargs)

        return call

    with ExitStack() as patches:
        for change in ("replace", "unlink"):
            patches.enter_context(mock.patch.object(Path, change, alive(getattr(Path, change))))
        patches.enter_context(at_call(n, owner, name, die, **how))
        with pytest.raises(Killed):
            yield


# What results are compared in, whatever this machine's processor could do.
FLOAT32 = ("--dtype", "float32")


def saving(path: Path, target: Path) -> bool:
    """For `at_call` of Path.replace: whether a file of the run gets its name, or another one."""
    return target.name.startswith("pretrain_32") and target.suffix in (".pth", ".json")


def learning(model: Any, *args: Any) -> bool:
    """For `at_call` of a model's forward: whether it is a training step's."""
    return model.training


def evaluating(model: Any, *args: Any) -> bool:
    """For `at_call` of a model's forward: whether it is an evaluation's."""
    return not model.training


def read_metrics(out: Path, name: str = "pretrain_32") -> list[dict[str, Any]]:
    """The lines of the metrics file."""
    path = out / "logs" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_resume(out: Path, name: str = "pretrain_32") -> dict[str, Any]:
    """The newest resume file."""
    return torch.load(out / f"{name}_resume.pth", weights_only=True)


def result(out: Path, name: str = "pretrain_32") -> dict[str, Any]:
    """All that a run left, by file name; without times, and where it and its data lay."""
    others = (f"{name}_resume.prev.pth", "replaced")
    left = {path.name: None for path in out.iterdir() if path.name not in others}
    for path in out.glob("*.pth"):
        if "_resume" not in path.name:
            left[path.name] = torch.load(path, weights_only=True)
    resume = read_resume(out, name)
    state = resume["state"]
    for timed in ("seconds", "elapsed", "metrics_bytes", "run_id"):
        del state[timed]
    for argument in ("resume", "overwrite", "data_path", "out_dir"):
        del resume["arguments"][argument]
    for group in resume["optimizer"]["param_groups"]:
        del group["lr"]  # set anew before each step
    left[f"{name}_resume.pth"] = resume
    left["metrics.jsonl"] = [
        {key: value for key, value in line.items() if key not in TIMING}
        for line in read_metrics(out, name)
    ]
    return left


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Nested containers are equal, tensors bit by bit."""
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            assert_same(ours[key], value, f"{where}/{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, value in enumerate(theirs):
            assert_same(ours[i], value, f"{where}/{i}")
    else:
        assert ours == theirs, where


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Content and time of change of all files in a folder, but for a dead run's lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@contextmanager
def started(
    root: Path, *words: Any, script: Path | None = None, processes: int = 1
) -> Iterator[subprocess.Popen]:
    """train_pretrain.py, or `script`, in a process of its own, in a new group.

    With several processes, torchrun's. They find no matplotlib: plots would take most of the time.
    """
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "matplotlib.py").write_text("raise ImportError", encoding="utf-8")
        paths = os.pathsep.join((folder, str(root)))
        settings = {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONPATH": paths}
        process = subprocess.Popen(
            [*launcher, str(script or root / "train_pretrain.py"), *map(str, words), *FLOAT32],
            cwd=root,
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def eventually(condition: Callable[[], Any]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    """Wait until the metrics file of a running process tells of a step."""
    path = out / "logs" / "pretrain_32" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (path.is_file() and f'{{"step": {step},' in path.read_text(encoding="utf-8")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
