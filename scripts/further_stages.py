"""The stages after instruction tuning, on the sample world: run, measured, told in a table.

Part of the quick start (`--all`). It imports nothing but the standard library, as `environment`.
"""

from __future__ import annotations  # an old Python must get as far as `require_python`

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from steps import copy_beginning, short, step

PREFERENCE = [
    *("--loss_type", "sigmoid", "--beta", "1", "--learning_rate", "6e-5", "--batch_size", "4"),
]
ADAPTER = ["--learning_rate", "1e-3", "--epochs", "10", "--batch_size", "4"]
STUDENT = ["--dim", "128", "--n_layers", "2", "--n_heads", "4", "--n_kv_heads", "4"]
SMOKE_STUDENT = ["--dim", "32", "--n_layers", "1", "--n_heads", "2", "--n_kv_heads", "2"]
STUDENT_TEXTS = ["--batch_size", "4", "--learning_rate", "3e-3", "--epochs", "1"]
STUDENT_CHATS = ["--batch_size", "4", "--learning_rate", "1e-3", "--epochs", "8"]
STUDENT_LINES = 2000  # of the conversations: with all of them a teacher has little to add
SETTINGS = [PREFERENCE, ADAPTER, STUDENT, STUDENT_TEXTS, STUDENT_CHATS, STUDENT_LINES]

# What the stages must reach, as shares.
ACCURACY, STYLE, IDENTITY, FALL = 0.90, 0.80, 0.95, 0.03

Scores = dict[str, dict[str, float]]  # by model and skill


class Measure(NamedTuple):
    """A line of the table: what a stage is to change, before and after it."""

    stage: str
    measured: str
    before: str
    after: str
    minutes: float


@dataclass
class Quickstart:
    """What the quick start has made: where it is, and its flags.

    Attributes:
        python: interpreter.
        out_dir: where everything goes.
        sample: folder of the sample's files.
        tokenizer: folder.
        model: flags of the tuned model's shape.
        rows: flags that all stages share.
        smoke: a tiny model, one epoch each.
    """

    python: Path
    out_dir: Path
    sample: Path
    tokenizer: Path
    model: list[str]
    rows: list[str]
    smoke: bool

    def weights(self, stage: str) -> Path:
        """A stage's weights."""
        return self.out_dir / f"{stage}_{self.model[1]}.pth"

    def train(self, title: str, script: str, *words: str | Path) -> None:
        """Train, or go on; flags that all stages share come after the `words`."""
        same = ["--tokenizer_path", self.tokenizer, *self.model, *self.rows, "--resume"]
        epochs = ["--epochs", "1"] if self.smoke else []
        step(title, self.python, script, *words, *same, "--out_dir", self.out_dir, *epochs)

    def score(self, title: str, test: str, **models: str | Path) -> Scores:
        """Shares of right answers to a test of the sample."""
        figures = self.out_dir / "scores_of_stage.json"
        step(
            title,
            self.python,
            "scripts/score_world.py",
            *[f"{name}={path}" for name, path in models.items()],
            *["--data_path", self.sample / test, "--tokenizer_path", self.tokenizer],
            *["--json", figures],
        )
        return json.loads(figures.read_text(encoding="utf-8"))

    def metrics(self, name: str) -> list[dict[str, float]]:
        """What a run in this folder noted."""
        path = self.out_dir / "logs" / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def minutes(self, name: str) -> float:
        """That a run's steps took."""
        return self.metrics(name)[-1]["seconds"] / 60

    def without_identity(self, shares: dict[str, float]) -> float:
        """The share of right answers to the test but for the questions of who the model is."""
        lines = (self.sample / "test.jsonl").read_text(encoding="utf-8").splitlines()
        asked = Counter(json.loads(line)["skill"] for line in lines)
        del asked["identity"]
        return sum(shares[skill] * n for skill, n in asked.items()) / sum(asked.values())


def percent(share: float) -> str:
    """A share as a table tells it."""
    return f"{100 * share:.1f} %"


def run_preference(start: Quickstart, known: float) -> tuple[list[Measure], list[str]]:
    """Prefer kind answers; lines of the table, and what misses its goal.

    Args:
        start: the quick start.
        known: the tuned model's share of right answers.
    """
    start.train(
        "Preference: kind answers rather than curt or plain ones",
        "train_dpo.py",
        *["--data_path", start.sample / "dpo.jsonl"],
        *["--val_data_path", start.sample / "dpo_test.jsonl", *PREFERENCE],
    )
    tuned, preferring = start.weights("full_sft"), start.weights("dpo")
    style = start.score("How it answers", "dpo_test.jsonl", tuned=tuned, dpo=preferring)
    right = start.score("What it still knows", "test.jsonl", dpo=preferring)["dpo"]["overall"]
    name = preferring.stem
    evaluations = [m["val_accuracy"] for m in start.metrics(name) if "val_accuracy" in m]
    accuracy = (evaluations[0], evaluations[-1])
    kind = (style["tuned"]["style"], style["dpo"]["style"])
    minutes = start.minutes(name)
    table = [
        Measure("train_dpo.py", "held-out pairs told apart", *map(percent, accuracy), minutes),
        Measure("", "answers of the preferred style", *map(percent, kind), 0),
        Measure("", "right answers", percent(known), percent(right), 0),
    ]
    goals = {
        f"preference accuracy {percent(accuracy[1])}, at least {percent(ACCURACY)} wanted": (
            accuracy[1] >= ACCURACY
        ),
        f"preferred style {percent(kind[1])}, at least {percent(STYLE)} wanted": kind[1] >= STYLE,
        f"right answers fell by {percent(known - right)}, at most {percent(FALL)} wanted": (
            known - right <= FALL
        ),
    }
    return table, [miss for miss, reached in goals.items() if not reached]


def run_adapter(start: Quickstart) -> tuple[list[Measure], list[str]]:
    """Put another self on the tuned model; as `run_preference`."""
    start.train(
        "An adapter: another self",
        "train_lora.py",
        *["--data_path", start.sample / "lora.jsonl"],
        *["--val_data_path", start.sample / "lora_test.jsonl", *ADAPTER],
    )
    tuned = start.weights("full_sft")
    name = f"identity_{start.model[1]}"
    adapted = f"{short(tuned)}+{short(start.out_dir / 'lora' / f'{name}.pth')}"
    models = {"tuned": short(tuned), "adapted": adapted}
    who = start.score("Who it says it is", "lora_test.jsonl", **models)
    rest = start.score("What it still knows", "test.jsonl", **models)
    selves = (who["tuned"]["identity"], who["adapted"]["identity"])
    right = [start.without_identity(rest[kind]) for kind in models]
    whole = [percent(rest[kind]["overall"]) for kind in models]
    minutes = replace(start, out_dir=start.out_dir / "lora").minutes(name)
    table = [
        Measure("train_lora.py", "names its new self", *map(percent, selves), minutes),
        Measure("", "right answers to all other questions", *map(percent, right), 0),
        Measure("", "and with those of its name, which are to change", *whole, 0),
    ]
    fall = right[0] - right[1]
    goals = {
        f"new self {percent(selves[1])}, at least {percent(IDENTITY)} wanted": (
            selves[1] >= IDENTITY
        ),
        f"right answers fell by {percent(fall)}, at most {percent(FALL)} wanted": fall <= FALL,
    }
    return table, [miss for miss, reached in goals.items() if not reached]


def run_distillation(start: Quickstart) -> list[Measure]:
    """Teach a smaller model, beside the same one without a teacher; lines of the table.

    They are not judged: of one seed, a point or two may be chance.
    """
    # In a folder of its own: --resume asks about runs of another shape beside it.
    model = SMOKE_STUDENT if start.smoke else STUDENT
    student = replace(start, model=model, out_dir=start.out_dir / "student")
    words = ["--data_path", start.sample / "pretrain.jsonl", *STUDENT_TEXTS]
    student.train("A smaller model, pretrained", "train_pretrain.py", *words)
    chats = student.out_dir / "chats.jsonl"
    copy_beginning(start.sample / "sft.jsonl", chats, STUDENT_LINES)
    words = ["--data_path", chats, *STUDENT_CHATS]
    student.train("It learns to answer by itself", "train_full_sft.py", *words)
    words += ["--teacher_weight", start.weights("full_sft")]
    title = "It learns to answer from the larger one"
    student.train(title, "train_distillation.py", *words)
    alone, taught = student.weights("full_sft"), student.weights("distill")
    scores = start.score("What both know", "test.jsonl", alone=alone, taught=taught)
    right = (scores["alone"]["overall"], scores["taught"]["overall"])
    measured = "right answers of a smaller model, alone and taught"
    minutes = student.minutes(taught.stem)
    return [Measure("train_distillation.py", measured, *map(percent, right), minutes)]


def run_further_stages(
    start: Quickstart, pretrained: dict[str, float], tuned: dict[str, float]
) -> list[str]:
    """Run every stage after tuning, print the table of all and write it to stages.md.

    Args:
        start: the quick start.
        pretrained, tuned: the shares of right answers of both models, by skill.

    Returns:
        What misses its goal.
    """
    dim = start.model[1]
    losses = [m["loss"] for m in start.metrics(f"pretrain_{dim}") if "loss" in m]
    texts, chats = (start.minutes(f"{stage}_{dim}") for stage in ("pretrain", "full_sft"))
    loss = (f"{losses[0]:.2f}", f"{losses[-1]:.2f}")
    answers = [percent(found["overall"]) for found in (pretrained, tuned)]
    recall = [percent(found["recall"]) for found in (pretrained, tuned)]
    table = [
        Measure("train_pretrain.py", "loss on plain text (nats per token)", *loss, texts),
        Measure("train_full_sft.py", "right answers", *answers, chats),
        Measure("", "of them about what only the texts tell", *recall, 0),
    ]
    below = []
    for lines, misses in (run_preference(start, tuned["overall"]), run_adapter(start)):
        table += lines
        below += misses
    table += run_distillation(start)
    text = "| stage | measured | before | after | minutes in steps |\n"
    text += "| --- | --- | ---: | ---: | ---: |\n"
    for stage, *cells, minutes in table:
        name = f"`{stage}`" if stage else ""
        text += f"| {name} | {' | '.join(cells)} | {f'{minutes:.1f}' if stage else ''} |\n"
    (start.out_dir / "stages.md").write_text(text, encoding="utf-8")
    print(f"\n== What each stage changed\n{text}", flush=True)
    return below
