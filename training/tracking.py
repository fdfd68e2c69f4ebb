"""Trackers: services and pages that show the figures of runs. Their packages are not required."""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from common import UserError

from .resume import TrainState, json_arguments

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Figures = Mapping[str, float | None]  # None for what is not finite
Samples = Sequence[tuple[str, str]]  # prompts, and what the model makes of them


class Tracker(Protocol):
    """What a run hands its figures to."""

    id: str | None  # names the run to the service, so that a resumed one continues it

    def log(self, figures: Figures, step: int) -> None:
        """Take the figures of an optimizer step."""

    def log_samples(self, samples: Samples, step: int) -> None:
        """Take the samples of a validation."""

    def finish(self) -> None:
        """Write what is not yet written."""


def start_tracker(args: argparse.Namespace, name: str, folder: Path, state: TrainState) -> Tracker:
    """Start the tracker that `--tracker` names, for the run `name`, whose logs are in `folder`.

    A run that is resumed continues. Raises UserError if the package is missing, or the service
    cannot be had.
    """
    flag = "--use_wandb" if args.use_wandb else f"--tracker {args.tracker}"
    project, config = args.wandb_project, json_arguments(args)
    run_id = state.tracker_ids.get(args.tracker)
    tracker: Tracker
    try:
        if args.tracker == "wandb":
            tracker = WandbTracker(project, name, config, run_id, flag)
        elif args.tracker == "swanlab":
            tracker = SwanLabTracker(project, name, config, run_id, flag)
        else:
            tracker = TensorBoardTracker(folder / "tensorboard", config, state.step)
    except ImportError:
        package = args.tracker
        raise UserError(f"{flag}: {package} is not installed; pip install {package}") from None
    if tracker.id is not None:
        state.tracker_ids[args.tracker] = tracker.id
    return tracker


class ServiceTracker:
    """What wandb and SwanLab have in common: packages that are used alike.

    `WANDB_MODE=offline` or `SWANLAB_MODE=offline` keeps the run on this machine. UserError for one
    of the package's `errors` at the start.
    """

    def __init__(
        self,
        service: ModuleType,
        errors: type[Exception],
        project: str,
        name: str,
        config: dict[str, Any],
        run_id: str | None,
        flag: str,
    ):
        about = {"project": project, "name": name, "config": config}
        try:
            self._run = service.init(**about, id=run_id, resume="allow")
        except errors as error:
            offline = f"{service.__name__.upper()}_MODE=offline"
            raise UserError(f"{flag}: {error}; {offline} needs no account") from None
        self.id = self._run.id

    def log(self, figures: Figures, step: int) -> None:
        """See Tracker."""
        self._run.log(dict(figures), step=step)

    def finish(self) -> None:
        """See Tracker."""
        self._run.finish()


class WandbTracker(ServiceTracker):
    """Weights & Biases."""

    def __init__(self, *run: Any):
        import wandb

        super().__init__(wandb, wandb.errors.Error, *run)

    def log_samples(self, samples: Samples, step: int) -> None:
        """See Tracker; as a table."""
        from wandb import Table

        table = Table(columns=["prompt", "text"], data=[list(sample) for sample in samples])
        self._run.log({"samples": table}, step=step)


class SwanLabTracker(ServiceTracker):
    """SwanLab."""

    def __init__(self, *run: Any):
        import swanlab

        super().__init__(swanlab, Exception, *run)  # its errors have no class in common

    def log(self, figures: Figures, step: int) -> None:
        """See Tracker; a figure that is not finite is left out, since SwanLab rejects it."""
        super().log(finite(figures), step)

    def log_samples(self, samples: Samples, step: int) -> None:
        """See Tracker; as texts with their prompts as captions."""
        from swanlab import Text

        texts = [Text(text, caption=prompt) for prompt, text in samples]
        self._run.log({"samples": texts}, step=step)


class TensorBoardTracker:
    """Files in `folder` that TensorBoard shows; of an earlier part of the run, those up to `step`.

    They are begun with the first figures, when an earlier run's have been moved out of the way.
    """

    id = None

    def __init__(self, folder: Path, config: dict[str, Any], step: int):
        from torch.utils.tensorboard import SummaryWriter  # an ImportError without tensorboard

        self._writer_class = SummaryWriter
        self._folder, self._config, self._step = folder, config, step

    @cached_property
    def _writer(self) -> "SummaryWriter":
        purge_step = self._step + 1 if self._step else None
        writer = self._writer_class(str(self._folder), purge_step=purge_step, flush_secs=5)
        writer.add_text("config", f"```\n{json.dumps(self._config, indent=2)}\n```", self._step)
        return writer

    def log(self, figures: Figures, step: int) -> None:
        """See Tracker; a figure that is not finite is left out, as a gap in its curve."""
        for name, value in finite(figures).items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, samples: Samples, step: int) -> None:
        """See Tracker; as one text in which a line is a prompt and its sample."""
        lines = [f"    {prompt!r} → {text!r}" for prompt, text in samples]  # shown as they are
        self._writer.add_text("samples", "\n".join(lines), step)

    def finish(self) -> None:
        """See Tracker."""
        self._writer.close()


def finite(figures: Figures) -> dict[str, float]:
    """The figures that are numbers."""
    return {name: value for name, value in figures.items() if value is not None}
