"""What a run saves: its weights, the best ones, numbered ones, and the resume file."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from common import SaveError, Text, report_save_errors
from model import active_lora, load_trained_state, save_lora, save_weights, trained_state
from model.weights import read_state

from .resume import Resume, TrainState, get_random_states, json_arguments, save_resume
from .run_files import beside
from .setup import Setup


@dataclass
class Saver:
    """Writes the files of a run beside each other; only the main process writes.

    What cannot be written is reported and kept in `errors`; the run goes on.
    """

    setup: Setup
    identity: dict[str, Any]  # what may not change when the run is resumed, by flag
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    report: Callable[[str], None]  # takes a line for the user
    saved_as: Literal["newest", "previous"]  # as in `Resume`
    errors: dict[str, str] = field(default_factory=dict)  # why the last try failed, by what

    def save(self, state: TrainState, at_interval: bool) -> None:
        """Write the weights, numbered ones where they are due, and the resume file.

        --save_total_limit counts the saves `at_interval`, of --save_interval.
        """
        args, world = self.setup.args, self.setup.world
        random_states = world.all_gather(get_random_states(world.device))
        if world.is_main:
            self._try(state, "weights", lambda: self._save_weights(self.setup.path))
            for_good = args.keep_every is not None and state.step % args.keep_every == 0
            if for_good or (args.save_total_limit and at_interval):
                self._try(state, "numbered", lambda: self._save_numbered(state, for_good))
            self._try(state, "resume", lambda: self._save_resume(state, random_states))

    def save_best(self, state: TrainState) -> bool:
        """Write the best weights; whether that worked, on every process."""
        world = self.setup.world
        best = beside(self.setup.path, "best")
        saved = world.is_main and self._try(state, "best", lambda: self._save_weights(best))
        return bool(world.all_reduce_max(int(saved)))

    def best_state(self) -> dict[str, torch.Tensor] | None:
        """The best weights, on every process."""
        world = self.setup.world
        best = beside(self.setup.path, "best")
        return world.broadcast(read_state(best) if world.is_main else None)

    def _try(self, state: TrainState, what: str, save: Callable[[], None]) -> bool:
        try:
            save()
        except SaveError as error:
            self.errors[what] = str(error)
            self.report(Text("step {step}: {error}; going on", step=state.step, error=error))
            return False
        self.errors.pop(what, None)
        return True

    def _save_weights(self, path: Path) -> None:
        setup = self.setup
        dtype = getattr(torch, setup.args.save_dtype)
        if active_lora(setup.raw_model):
            save_lora(setup.raw_model, path, dtype, setup.frozen["--from_weight"])
        else:
            model, stage = setup.raw_model, setup.stage.name
            hash_, conversations = setup.tokenizer_hash, setup.conversations
            save_weights(path, model, model.config, stage, hash_, dtype, conversations)

    def _save_numbered(self, state: TrainState, for_good: bool) -> None:
        self._save_weights(beside(self.setup.path, f"step{state.step}"))
        if for_good or state.step in state.numbered:
            return
        state.numbered.append(state.step)
        while len(state.numbered) > self.setup.args.save_total_limit:
            path = beside(self.setup.path, f"step{state.numbered[0]}")
            with report_save_errors(path):
                path.unlink(missing_ok=True)
                path.with_suffix(".json").unlink(missing_ok=True)
            state.numbered.pop(0)

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
    setup: Setup, resume: Resume, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Put model, optimizer and scaler where a resume file left them; the flags are those of now.

    A parameter's rate over --learning_rate stays, whatever a stage scales it by today.
    """
    load_trained_state(setup.raw_model, resume.model)
    groups = optimizer.state_dict()["param_groups"]
    before = {i: group for group in resume.optimizer["param_groups"] for i in group["params"]}
    rate = resume.arguments["learning_rate"]
    for group in groups:
        peak = before[group["params"][0]].get("initial_lr", rate)  # the oldest files have one rate
        group["initial_lr"] = peak * (setup.args.learning_rate / rate)  # by 1 without a change
    optimizer.load_state_dict({**resume.optimizer, "param_groups": groups})
    if resume.scaler:  # it is empty without float16
        scaler.load_state_dict(resume.scaler)
