"""What a run saves: its weights, the best ones, numbered ones, and the resume file."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from common import SaveError, report_save_errors
from model import active_lora, load_trained_state, save_lora, save_weights, trained_state
from model.weights import read_state

from .random_states import get_random_states
from .resume import Resume, TrainState, json_arguments, save_resume
from .setup import Setup


@dataclass
class Saver:
    """Writes the files of a run beside each other; only the main process writes.

    What cannot be written is reported and kept in `errors`; the run goes on.

    Attributes:
        setup: what the run began with.
        identity: what may not change when the run is resumed, by flag.
        optimizer, scaler: their states go into the resume file.
        report: takes a line for the user.
        saved_as: the file that holds this run's last save, see `Resume`.
        errors: why the last try to save something failed, by what it is.
    """

    setup: Setup
    identity: dict[str, Any]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    report: Callable[[str], None]
    saved_as: Literal["newest", "previous"]
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def best_path(self) -> Path:
        """File of the best weights."""
        return self.setup.path.with_name(f"{self.setup.path.stem}_best.pth")

    def save(self, state: TrainState, numbered: Literal["", "for good", "for now"]) -> None:
        """Write the weights, numbered ones if asked for, and the resume file.

        Args:
            state: progress of the run.
            numbered: whether …_step{N}.pth is written, and whether --save_total_limit counts it.
        """
        world = self.setup.world
        random_states = world.all_gather(get_random_states(world.device))
        if world.is_main:
            self._try(state, "weights", lambda: self._save_weights(self.setup.path))
            if numbered:
                self._try(state, "numbered", lambda: self._save_numbered(state, numbered))
            self._try(state, "resume", lambda: self._save_resume(state, random_states))

    def save_best(self, state: TrainState) -> bool:
        """Write the best weights; whether that worked, on every process."""
        world = self.setup.world
        saved = world.is_main and self._try(
            state, "best", lambda: self._save_weights(self.best_path)
        )
        return bool(world.all_reduce_max(int(saved)))

    def best_state(self) -> dict[str, torch.Tensor] | None:
        """The best weights, on every process."""
        world = self.setup.world
        return world.broadcast(read_state(self.best_path) if world.is_main else None)

    def _try(self, state: TrainState, what: str, save: Callable[[], None]) -> bool:
        try:
            save()
        except SaveError as error:
            self.errors[what] = str(error)
            self.report(f"step {state.step}: {error}; going on")
            return False
        self.errors.pop(what, None)
        return True

    def _save_weights(self, path: Path) -> None:
        setup = self.setup
        dtype = getattr(torch, setup.args.save_dtype)
        if active_lora(setup.raw_model):
            save_lora(setup.raw_model, path, dtype, setup.frozen["--from_weight"])
        else:
            config = setup.raw_model.config
            save_weights(
                path, setup.raw_model, config, setup.stage.name, setup.tokenizer_hash, dtype
            )

    def _save_numbered(self, state: TrainState, how: Literal["for good", "for now"]) -> None:
        self._save_weights(self._numbered(state.step))
        if how == "for good" or state.step in state.numbered:
            return
        state.numbered.append(state.step)
        while len(state.numbered) > self.setup.args.save_total_limit:
            path = self._numbered(state.numbered[0])
            with report_save_errors(path):
                path.unlink(missing_ok=True)
                path.with_suffix(".json").unlink(missing_ok=True)
            state.numbered.pop(0)

    def _numbered(self, step: int) -> Path:
        return self.setup.path.with_name(f"{self.setup.path.stem}_step{step}.pth")

    def _save_resume(self, state: TrainState, random_states: list[dict[str, Any]]) -> None:
        resume = Resume(
            state,
            json_arguments(self.setup.args),
            self.identity,
            trained_state(self.setup.raw_model),
            self.optimizer.state_dict(),
            self.scaler.state_dict(),
            random_states,
            self.saved_as,
        )
        save_resume(self.setup.path, resume)
        self.saved_as = "newest"


def load_resume(
    setup: Setup,
    resume: Resume,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Put model, optimizer and scaler where a resume file left them; the flags are those of now."""
    load_trained_state(setup.raw_model, resume.model)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({**resume.optimizer, "param_groups": groups})
    if resume.scaler:  # it is empty without float16
        scaler.load_state_dict(resume.scaler)
