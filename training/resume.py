"""The resume file: everything that a run needs to continue as if it had never stopped.

It is `…_resume.pth` beside the weights; the one before it is `…_resume.prev.pth`.
"""

import argparse
import json
import math
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from common import Text, UserError, report_save_errors, write_atomically
from model.weights import check_sums, read_pickle

from .arguments import MOE_DEFAULTS
from .guards import SpikeWatch
from .run_files import beside

FORMAT = 1


@dataclass
class Tally:
    """Sums over the steps since the last line of figures."""

    loss: float = 0.0  # over target tokens, weighted by the loss mask, or over pairs
    tokens: float = 0.0  # number of target tokens
    targets: float = 0.0  # sum of their weights, or number of pairs
    aux_loss: float = 0.0  # over good steps
    grad_norm: float = 0.0
    steps: int = 0
    good: int = 0  # steps whose update was not skipped
    seconds: float = 0.0
    lr: float = 0.0  # of the last step
    figures: dict[str, float] = field(default_factory=dict)  # the stage's own, summed as the loss
    # (layers, experts): choices that each expert got; empty for dense models.
    expert_load: list[list[float]] = field(default_factory=list)
    drawn: dict[str, float] = field(default_factory=dict)  # target tokens of each source

    def add(
        self,
        sums: dict[str, float],
        targets: float,
        tokens: float,
        grad_norm: float,
        expert_load: list[list[float]],
    ) -> None:
        """Add a step whose figures are finite; see `Run.add_step`."""
        self.good += 1
        self.tokens += tokens
        self.targets += targets
        self.grad_norm += grad_norm
        self.loss += sums["loss"]
        self.aux_loss += sums["aux_loss"]
        for name, value in sums.items():
            if name not in ("loss", "aux_loss"):
                self.figures[name] = self.figures.get(name, 0.0) + value
        if expert_load:
            self.expert_load = np.add(self.expert_load or 0.0, expert_load).tolist()

    def means(self) -> dict[str, float]:
        """The line of figures, by their names in metrics.jsonl."""
        figures: dict[str, float] = {}
        if self.good:
            figures["loss"] = self.loss / self.targets
            figures |= {name: value / self.targets for name, value in self.figures.items()}
        figures |= {f"share/{name}": n / sum(self.drawn.values()) for name, n in self.drawn.items()}
        figures["lr"] = self.lr
        if self.good:
            figures["grad_norm"] = self.grad_norm / self.good
        figures["tokens_per_second"] = round(self.tokens / self.seconds)
        if any(self.expert_load):
            shares = [n / sum(layer) for layer in self.expert_load for n in layer]
            figures["aux_loss"] = self.aux_loss / self.good
            figures["expert_load_min"] = round(min(shares), 4)
            figures["expert_load_max"] = round(max(shares), 4)
        return figures


@dataclass
class TrainState:
    """The progress of a run."""

    run_id: str  # tells runs in the same folder apart
    rows_per_step: int  # when the run began; the schedule counts in steps of so many rows
    step: int = 0  # optimizer steps finished, skipped ones included
    epoch: int = 0
    row: int = 0  # rows of the epoch that are done
    tokens: int = 0  # target tokens learnt from
    drawn: dict[str, float] = field(default_factory=dict)  # those of each source of a mixture
    mixture_tokens: float | None = None  # at which --mix_schedule ends, as the run began
    seconds: float = 0.0  # spent in steps
    elapsed: float = 0.0  # wall-clock seconds, of all that --max_minutes counts
    reserve: float = 0.0  # seconds of these that the end of the run will take
    budget_used: bool = False  # whether the run reached the end of its budget
    tally: Tally = field(default_factory=Tally)
    skipped: int = 0  # updates skipped
    bad_in_row: int = 0  # updates skipped since the last good one
    spikes: int = 0  # loss spikes
    spike_watch: SpikeWatch = field(default_factory=SpikeWatch)
    evaluated_at: int = -1  # step of the last evaluation; -1 without one
    validation: str = ""  # fingerprint of the data that `best_loss` is measured on
    best_loss: float = math.inf  # lowest validation loss
    best_step: int | None = None
    best_saved: bool = False  # whether the best weights are in …_best.pth
    evaluations_since_best: int = 0
    tested: bool = False  # whether the test data have been scored
    numbered: list[int] = field(default_factory=list)  # that --save_total_limit may remove
    metrics_bytes: int = 0  # length of the metrics file
    tracker_ids: dict[str, str] = field(default_factory=dict)  # of the run in each tracker

    def use_validation(self, fingerprint: str) -> None:
        """Start best score and early stopping anew if the data to validate on are others."""
        if fingerprint != self.validation:
            self.validation = fingerprint
            self.evaluated_at, self.evaluations_since_best = -1, 0
            self.best_loss, self.best_step, self.best_saved = math.inf, None, False

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        """The inverse of `dataclasses.asdict`, whose values it may change."""
        if wandb_id := values.pop("wandb_id", None):  # in older files
            values["tracker_ids"] = {"wandb": wandb_id}
        tally, watch = Tally(**values["tally"]), SpikeWatch(**values["spike_watch"])
        return cls(**{**values, "tally": tally, "spike_watch": watch})


class Resume(NamedTuple):
    """The contents of a resume file; `model`, `optimizer` and `scaler` are state_dicts."""

    state: TrainState
    arguments: dict[str, Any]  # the flags, as JSON values
    identity: dict[str, Any]  # what may not change when the run is resumed, by flag
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    random: list[dict[str, Any]]  # the states of each process's random generators
    # The file that holds the run's last save; "previous": the newest is damaged, and replaced by
    # the next save. Not in the file.
    saved_as: Literal["newest", "previous"]

    @property
    def is_finished(self) -> bool:
        """Whether the run reached the end that its own flags set."""
        epochs = self.arguments["epochs"]  # all that older files have
        return self.state.budget_used or (epochs is not None and self.state.epoch >= epochs)


def save_resume(weights: Path, resume: Resume) -> None:
    """Write the resume file beside `weights`; the run's last one becomes the one before it.

    SaveError if the disk is full or cannot be written; an older file is kept.
    """
    newest, previous = beside(weights, "resume"), beside(weights, "resume.prev")
    contents = {"format": FORMAT, **resume._asdict(), "state": asdict(resume.state)}
    del contents["saved_as"]
    with report_save_errors(newest):
        aside = previous if resume.saved_as == "newest" else None
        write_atomically(newest, lambda file: torch.save(contents, file), aside)


def read_resume(weights: Path) -> tuple[Resume | None, list[str]]:
    """The newest valid resume file beside `weights`, None without one, and notes for the user."""
    notes = []
    for saved_as, end in (("newest", "resume"), ("previous", "resume.prev")):
        path = beside(weights, end)
        if not path.is_file():
            continue
        try:
            check_sums(path)
            contents = read_pickle(path, mmap=False)  # the file will be moved and replaced
            if not isinstance(contents, dict) or contents.get("format") != FORMAT:
                raise UserError(f"{path}: not a resume file of this version")
            del contents["format"]
            contents["state"] = TrainState.from_dict(contents["state"])
            return Resume(**contents, saved_as=saved_as), notes
        except (UserError, KeyError, TypeError) as error:
            notes.append(str(error))
    return None, notes


def check_identity(weights: Path, resume: Resume, own: dict[str, Any]) -> None:
    """Raise UserError, naming every flag that differs, if `own` is not the identity of the run."""
    # Older files have fewer flags in the identity, and there, after the hash of the data's content,
    # what is used of it.
    older = {"n_heads": 8, "n_kv_heads": 2, "rope_theta": 1e6, **MOE_DEFAULTS}
    older |= {"optimizer": "adamw", "lr_scale": [], "weight_decay_for": []}
    flags = {**older, **resume.arguments}
    stored = {f"--{name}": value for name, value in flags.items()} | resume.identity
    stored["--data_path"] = stored["--data_path"].split()[0]
    same_tokenizer = stored["--tokenizer_path"] == own["--tokenizer_path"]
    lines = []
    for flag, value in own.items():
        there = stored.get(flag)
        # Another tokenizer gives other ids, and the content of the data is that of its ids.
        if there == value or (flag == "--data_path" and not same_tokenizer):
            continue
        what = f"{flag} {value}: {there} in"
        if flag in ("--tokenizer_path", "--data_path", "--from_weight", "--teacher_weight"):
            what = f"{flag}: not what was used by"  # hashes are not for reading
        lines.append(f"{what} the run to resume, {beside(weights, 'resume')}")
    if lines:
        lines.append("--resume needs the same; without it, a new run starts")
        raise UserError("\n".join(lines))


def changed_arguments(stored: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """`--flag new (was old)` for every flag whose value is another one than in the resume file."""
    of_a_start = ("resume", "overwrite", "dry_run", "local_rank", "lang")
    return [
        Text("--{name} {value} (was {before})", name=name, value=value, before=stored[name])
        for name, value in own.items()
        if name not in of_a_start and stored.get(name, value) != value
    ]


def json_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of a run as JSON values: paths become text."""
    return json.loads(json.dumps(vars(args), default=str))


def seed_everything(seed: int) -> None:
    """Start all random generators of this process: Python's, NumPy's, PyTorch's on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_random_states(device: torch.device) -> dict[str, Any]:
    """The states of this process's random generators."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Put the random generators where `get_random_states` found them."""
    random.setstate(states["python"])
    keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if "device" in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"])
