"""What a run says of itself: a progress bar, a metrics file and, on request, wandb."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .arguments import UserError
from .distributed import Distributed


def start_wandb(args: argparse.Namespace, name: str) -> Any:
    """Begin a run of wandb with all arguments; WANDB_MODE=offline keeps it on this machine.

    Raises:
        UserError: if wandb is not installed, or does not let the run begin.
    """
    try:
        import wandb
    except ImportError:
        raise UserError("--use_wandb: wandb is not installed; pip install wandb") from None
    config = {key: str(value) for key, value in vars(args).items()}
    try:
        return wandb.init(project=args.wandb_project, name=name, config=config)
    except wandb.errors.Error as error:
        raise UserError(f"--use_wandb: {error}; WANDB_MODE=offline needs no account") from None


BAR_FORMAT = "{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"


class Reporter:
    """Shows progress on a terminal, prints plain lines elsewhere, and keeps the figures.

    Only the main process reports.

    Args:
        world: this process.
        total_steps: optimizer steps of the run.
        metrics_path: JSONL file, one object per report.
        wandb_run: a run of wandb, or None.
    """

    def __init__(
        self, world: Distributed, total_steps: int, metrics_path: Path, wandb_run: Any = None
    ):
        self.world = world
        self.total_steps = total_steps
        self.wandb_run = wandb_run
        self.started = time.perf_counter()
        self.tokens = 0
        self.bar = None
        self.metrics = None
        if world.is_main:
            metrics_path.parent.mkdir(parents=True, exist_ok=True)
            if metrics_path.exists():
                metrics_path.replace(metrics_path.with_name("metrics.prev.jsonl"))
            self.metrics = metrics_path.open("w", encoding="utf-8")
            if sys.stderr.isatty():
                self.bar = tqdm(total=total_steps, bar_format=BAR_FORMAT, dynamic_ncols=True)

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def log(self, step: int, tokens: int, **figures: float) -> None:
        """Report training steps: to the screen, the metrics file and wandb.

        Args:
            step: optimizer steps taken.
            tokens: target tokens since the last call.
            figures: by name.
        """
        self.tokens += tokens
        shown = "  ".join(f"{name} {_format(value)}" for name, value in figures.items())
        if self.bar is not None:
            self.bar.set_postfix_str(
                f"loss {_format(figures['loss'])}, lr {_format(figures['lr'])}, "
                f"{_format(figures['tokens_per_second'])} tokens/s"
            )
        else:
            elapsed = time.perf_counter() - self.started
            left = elapsed / step * (self.total_steps - step)
            self.world.log(f"step {step}/{self.total_steps}  {shown}  left {_duration(left)}")
        self._record(step, figures)

    def log_scores(self, step: int, **scores: float) -> None:
        """Report an evaluation, on a line of its own."""
        shown = "  ".join(f"{name} {_format(value)}" for name, value in scores.items())
        self.say(f"step {step}/{self.total_steps}  {shown}")
        self._record(step, scores)

    def _record(self, step: int, figures: dict[str, float]) -> None:
        if self.metrics is not None:
            seconds = round(time.perf_counter() - self.started, 3)
            about = {"step": step, "tokens": self.tokens, "seconds": seconds}
            self.metrics.write(json.dumps(about | figures) + "\n")
            self.metrics.flush()
        if self.wandb_run is not None:
            self.wandb_run.log({"tokens": self.tokens} | figures, step=step)

    def say(self, message: str) -> None:
        """Print a line without breaking the bar."""
        if self.bar is not None:
            self.bar.write(message)
        else:
            self.world.log(message)

    def close(self) -> None:
        """Finish the bar, the file and wandb."""
        if self.bar is not None:
            self.bar.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def _format(value: float) -> str:
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if value >= 0.01 or value == 0 else f"{value:.2e}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
