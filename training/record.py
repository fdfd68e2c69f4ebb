"""The output of a run: a progress bar, a log, a metrics file and, on request, a tracker."""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common import ROOT, Text, format_duration, translate, write_atomically

from .distributed import Distributed
from .resume import TrainState, json_arguments
from .tracking import Tracker

STEPS_BEFORE_ESTIMATE = 5
BAR_FORMAT = "{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"


def write_config(path: Path, args: argparse.Namespace, run_id: str, vocab_size: int) -> None:
    """Keep what the run was started with, which `diagnosis.report` reads."""
    versions = {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    contents = {
        "run_id": run_id,
        "launcher": _launcher(),
        "command": sys.argv,
        "arguments": json_arguments(args),
        "versions": {"python": platform.python_version(), **versions},
        "commit": _commit(),
        "vocab_size": vocab_size,
    }
    _write_json(path, contents)


def add_ending(path: Path, ending: Text) -> None:
    """Add to the file of `write_config` how the run ended, also as a Text is made."""
    contents = {"ending": ending, "ending_text": [ending.template, ending.values]}
    _write_json(path, json.loads(path.read_text(encoding="utf-8")) | contents)


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    text = json.dumps(contents, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def _launcher() -> list[str]:
    """The words in front of the script's name; torchrun describes itself in the environment."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ["python"]
    hosts, processes = (os.environ[name] for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    several = ["--nnodes", hosts] if hosts != "1" else []
    return ["torchrun", *several, "--nproc_per_node", processes]


def _commit() -> str | None:
    """The commit of the code, with `+changes` where tracked files differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return None


class LineFile:
    """A UTF-8 file that grows by whole lines. On a disk that is full, lines are lost, not the run.

    It is cut to `length` bytes, if it is longer.
    """

    def __init__(self, path: Path, length: int | None = None):
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._warned = False
        if length is not None and self.size > length:
            self._file.truncate(length)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._file.fileno()).st_size

    def add(self, text: str) -> None:
        """Add lines, all of them or none."""
        data, before = text.encode("utf-8"), self.size
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(before)
            self._warn_once(error)

    def sync(self) -> int:
        """Wait until the lines are on disk; the bytes in the file."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._warn_once(error)
        return self.size

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _warn_once(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            with suppress(OSError):
                print(f"{self.path}: cannot be written ({error.strerror})", file=sys.stderr)


class Record:
    """Shows progress on a terminal, prints plain lines elsewhere, and keeps log and figures.

    Only the main process has output. `folder` gets training_log.txt and metrics.jsonl, an object
    per report, which is cut to what it held at `state`.
    """

    def __init__(
        self,
        world: Distributed,
        folder: Path,
        total_steps: int | None,
        state: TrainState,
        tracker: Tracker | None,
    ):
        self.world = world
        self.folder = folder
        self.total_steps = total_steps
        self.tracker = tracker
        self.first_step = state.step
        self.started = time.perf_counter()
        self.metrics: LineFile | None = None
        self.log_file: LineFile | None = None
        self.bar = tqdm(
            total=total_steps,
            initial=state.step,
            bar_format=BAR_FORMAT,
            dynamic_ncols=True,
            disable=None if world.is_main else True,  # None: unless stderr is a terminal
        )
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            self.metrics = LineFile(folder / "metrics.jsonl", state.metrics_bytes)
            self.log_file = LineFile(folder / "training_log.txt")

    def advance(self, step: int, left: int, gpu_price: float | None, note: Text) -> None:
        """Move the bar to `step`, with `left` to go.

        After a few, report how long the rest takes and what it costs, followed by `note`.
        """
        self.total_steps = self.bar.total = step + left
        self.bar.update(step - self.bar.n)
        if left and step - self.first_step == STEPS_BEFORE_ESTIMATE:
            seconds = self.seconds_per_step(step)
            cost = cost_line(seconds, left, gpu_price, self.world.world_size)
            self.print(Text("{cost}{note}", cost=cost, note=note))

    def log(self, state: TrainState, figures: dict[str, float]) -> None:
        """Report training steps: to screen, files and tracker."""
        shown = _line({name: value for name, value in figures.items() if value}, "  ")
        line = f"step {state.step}/{self.total_steps}  {shown}"
        if self.bar.disable:
            left = self.seconds_per_step(state.step) * (self.total_steps - state.step)
            self.print(f"{line}  left {format_duration(left)}")
        else:
            names = ("loss", "lr", "tokens_per_second")
            shown = {name: figures[name] for name in names if name in figures}
            self.bar.set_postfix_str(_line(shown, ", "))
            self._write_log(line)
        self._write(state, figures)

    def log_scores(self, state: TrainState, scores: dict[str, float]) -> None:
        """Report an evaluation, on a line of its own."""
        total = self.total_steps or "?"  # not known before the first step, with --max_minutes
        self.print(f"step {state.step}/{total}  {_line(scores, '  ')}")
        self._write(state, scores)

    def log_samples(self, state: TrainState, samples: list[tuple[str, str]]) -> None:
        """Report what the model makes of prompts: to screen, log and tracker, not as figures."""
        for prompt, text in samples:
            self.print(f"step {state.step}  sample {prompt!r} → {text!r}")
        if self.tracker is not None:
            self.tracker.log_samples(samples, state.step)

    def seconds_per_step(self, step: int) -> float:
        """Wall-clock seconds of a step since this process began, evaluations and saves included."""
        return (time.perf_counter() - self.started) / max(1, step - self.first_step)

    def print(self, message: str) -> None:
        """Print a line without breaking the bar, and log it, in the user's language."""
        message = translate(message, self.world.language)
        if self.bar.disable:
            self.world.log(message)
        else:
            self.bar.write(message)
        self._write_log(message)

    def sync(self) -> int:
        """Make sure that the metrics are on disk; the length of their file in bytes."""
        return 0 if self.metrics is None else self.metrics.sync()

    def close(self) -> None:
        """Finish the bar, the files and the tracker."""
        for part in (self.bar, self.metrics, self.log_file):
            if part is not None:
                part.close()
        if self.tracker is not None:
            self.tracker.finish()

    def _write(self, state: TrainState, figures: dict[str, float]) -> None:
        about = {"epoch": max(0, state.epoch - (state.row == 0)), "tokens": state.tokens}
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        if self.metrics is not None:
            line = {"step": state.step, **about, "seconds": round(state.seconds, 3), **finite}
            self.metrics.add(json.dumps(line, allow_nan=False) + "\n")
        if self.tracker is not None:
            self.tracker.log(about | finite, state.step)

    def _write_log(self, message: str) -> None:
        if self.log_file is not None:
            stamp = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            self.log_file.add("".join(f"{stamp}  {line}\n" for line in message.splitlines()))


def _line(figures: dict[str, float], separator: str) -> str:
    return separator.join(f"{name} {_format(value)}" for name, value in figures.items())


def _format(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2e}"


def cost_line(seconds_per_step: float, steps_left: int, gpu_price: float | None, gpus: int) -> Text:
    """How long the rest of a run takes and, with the price of a GPU-hour, what it costs."""
    seconds = seconds_per_step * steps_left
    line = Text("about {time} to go", time=format_duration(seconds))
    if gpu_price is None:
        return line
    return Text(
        "{line}; at {price:.2f} per GPU-hour{times}: {cost:,.2f}",
        line=line,
        price=gpu_price,
        times=f" × {gpus}" if gpus > 1 else "",
        cost=seconds / 3600 * gpus * gpu_price,
    )
