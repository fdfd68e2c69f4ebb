"""The resume file: everything that a run needs to continue as if it had never stopped.

`{stage}_{dim}{_moe}_resume.pth` beside the weights, and the one before it, `…_resume.prev.pth`.
"""

import argparse
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from common import UserError, report_save_errors, write_atomically
from model.weights import check_sums, read_pickle

from .arguments import MOE_DEFAULTS
from .guards import SpikeWatch

FORMAT = 1


@dataclass
class Tally:
    """Sums over the steps since the last line of figures.

    Attributes:
        loss: summed over target tokens, weighted by the loss mask, or over pairs.
        tokens, targets: how many target tokens, and the sum of their weights, or pairs.
        aux_loss, grad_norm: over steps; `grad_norm` over the `good` ones, whose norm is a number.
        steps, good: how many steps, and how many without those that were skipped.
        seconds: that the steps took.
        figures: further ones of the stage, by name, summed as the loss is.
        expert_load: (layers, experts) choices that each expert got; empty for dense models.
    """

    loss: float = 0.0
    tokens: float = 0.0
    targets: float = 0.0
    aux_loss: float = 0.0
    grad_norm: float = 0.0
    steps: int = 0
    good: int = 0
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    expert_load: list[list[float]] = field(default_factory=list)

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
            before = self.expert_load or [[0.0] * len(layer) for layer in expert_load]
            self.expert_load = [
                [x + y for x, y in zip(old, new, strict=True)]
                for old, new in zip(before, expert_load, strict=True)
            ]

    def means(self, lr: float) -> dict[str, float]:
        """The line of figures, by their names in metrics.jsonl."""
        figures: dict[str, float] = {}
        if self.good:
            figures["loss"] = self.loss / self.targets
            figures |= {name: value / self.targets for name, value in self.figures.items()}
        figures["lr"] = lr
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
    """The progress of a run.

    Attributes:
        run_id: tells runs in the same folder apart.
        rows_per_step: rows of a step when the run began; the schedule counts in steps of so many.
        step: optimizer steps finished, skipped ones included.
        epoch, row: the next row to learn from: `row` rows of the epoch are done.
        tokens: target tokens learnt from.
        seconds: spent in steps.
        tally: what the next line of figures is made of.
        skipped, bad_in_row: updates skipped so far, and just now without a good one between.
        spikes, spike_watch: loss spikes so far, and what finds them.
        evaluated_at: step of the last evaluation; -1 without one.
        validation: fingerprint of the data that `best_loss` is measured on.
        best_loss, best_step: lowest validation loss, and when; None without one.
        best_saved: whether the best weights are in …_best.pth.
        evaluations_since_best: how many were no progress.
        tested: whether the test data have been scored.
        numbered: steps of the numbered weights that --save_total_limit may remove.
        metrics_bytes: length of the metrics file.
        wandb_id: id of wandb's run.
    """

    run_id: str
    rows_per_step: int
    step: int = 0
    epoch: int = 0
    row: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)
    skipped: int = 0
    bad_in_row: int = 0
    spikes: int = 0
    spike_watch: SpikeWatch = field(default_factory=SpikeWatch)
    evaluated_at: int = -1
    validation: str = ""
    best_loss: float = math.inf
    best_step: int | None = None
    best_saved: bool = False
    evaluations_since_best: int = 0
    tested: bool = False
    numbered: list[int] = field(default_factory=list)
    metrics_bytes: int = 0
    wandb_id: str | None = None

    def use_validation(self, fingerprint: str) -> None:
        """Start best score and early stopping anew if the data to validate on are others."""
        if fingerprint != self.validation:
            self.validation = fingerprint
            self.evaluated_at, self.evaluations_since_best = -1, 0
            self.best_loss, self.best_step, self.best_saved = math.inf, None, False

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        """The inverse of `dataclasses.asdict`."""
        return cls(
            **{
                **values,
                "tally": Tally(**values["tally"]),
                "spike_watch": SpikeWatch(**values["spike_watch"]),
            }
        )


def resume_paths(weights: Path) -> tuple[Path, Path]:
    """The resume file beside the weights, and the one before it."""
    newest = weights.with_name(f"{weights.stem}_resume.pth")
    return newest, newest.with_name(f"{newest.stem}.prev.pth")


class Resume(NamedTuple):
    """The contents of a resume file.

    Attributes:
        state: progress of the run.
        arguments: its flags, as JSON values.
        identity: what may not change when it is resumed, by flag.
        model, optimizer, scaler: their state_dicts.
        random: the states of each process's random generators.
        saved_as: the file that holds the run's last save, if there is one. "previous": the newest
            is damaged, and replaced by the next save. Not in the file.
    """

    state: TrainState
    arguments: dict[str, Any]
    identity: dict[str, Any]
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    random: list[dict[str, Any]]
    saved_as: Literal["newest", "previous"]


def save_resume(weights: Path, resume: Resume) -> None:
    """Write the resume file beside `weights`; the run's last one becomes the one before it.

    Raises:
        SaveError: if the disk is full or cannot be written; an older file is kept.
    """
    newest, previous = resume_paths(weights)
    contents = {"format": FORMAT, **resume._asdict(), "state": asdict(resume.state)}
    del contents["saved_as"]
    with report_save_errors(newest):
        aside = previous if resume.saved_as == "newest" else None
        write_atomically(newest, lambda file: torch.save(contents, file), aside)


def read_resume(weights: Path) -> tuple[Resume | None, list[str]]:
    """The newest valid resume file beside `weights`, None without one, and notes for the user.

    Nothing is memory-mapped: the file will be moved and replaced.
    """
    notes = []
    for saved_as, path in zip(("newest", "previous"), resume_paths(weights), strict=True):
        if not path.is_file():
            continue
        try:
            check_sums(path)
            contents = read_pickle(path, mmap=False)
            if not isinstance(contents, dict) or contents.get("format") != FORMAT:
                raise UserError(f"{path}: not a resume file of this version")
            del contents["format"]
            contents["state"] = TrainState.from_dict(contents["state"])
            return Resume(**contents, saved_as=saved_as), notes
        except (UserError, KeyError, TypeError) as error:
            notes.append(str(error))
    return None, notes


def check_identity(weights: Path, resume: Resume, own: dict[str, Any]) -> None:
    """Make sure that a run can be continued with the flags of this one.

    Args:
        weights: path of the run's weights.
        resume: the contents of its resume file.
        own: the identity now.

    Raises:
        UserError: naming every flag that differs.
    """
    newest, _ = resume_paths(weights)
    # Older files have fewer flags in the identity, and there, after the hash of the data's content,
    # what is used of it.
    arguments = {f"--{name}": value for name, value in resume.arguments.items()}
    older = {"n_heads": 8, "n_kv_heads": 2, **MOE_DEFAULTS, "lr_scale": [], "weight_decay_for": []}
    older = {f"--{name}": value for name, value in older.items()}
    stored = {**older, **arguments, **resume.identity}
    stored["--data_path"] = stored["--data_path"].split()[0]
    same_tokenizer = stored["--tokenizer_path"] == own["--tokenizer_path"]
    lines = []
    for flag, value in own.items():
        there = stored.get(flag)
        # Another tokenizer gives other ids, and the content of the data is that of its ids.
        if there == value or (flag == "--data_path" and not same_tokenizer):
            continue
        # Hashes are for comparing, not for reading.
        hashes = ("--tokenizer_path", "--data_path", "--from_weight", "--teacher_weight")
        readable = flag not in hashes
        what = f"{flag} {value}: {there} in" if readable else f"{flag}: not what was used by"
        lines.append(f"{what} the run to resume, {newest}")
    if lines:
        raise UserError(
            "\n".join([*lines, "--resume needs the same; without it, a new run starts"])
        )


def changed_arguments(stored: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """`--flag new (was old)` for every flag whose value is another one than in the resume file."""
    return [
        f"--{name} {value} (was {stored[name]})"
        for name, value in own.items()
        if name in stored
        and stored[name] != value
        and name not in ("resume", "overwrite", "dry_run", "local_rank")
    ]


def json_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of a run as JSON values: paths and names become text."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(element) for element in value]
        return value if isinstance(value, (bool, int, float, type(None))) else str(value)

    return {name: plain(value) for name, value in vars(args).items()}
