"""The stages after instruction tuning on the sample world (`quickstart.py --all`).

They run, are measured, and end in a table. It imports nothing but the standard library.
"""

from __future__ import annotations  # an old Python must get as far as `require_python`

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from environment import short, step

PREFERENCE = [
    *("--loss_type", "sigmoid", "--beta", "1", "--learning_rate", "6e-5", "--batch_size", "4"),
]
ADAPTER = ["--learning_rate", "1e-3", "--epochs", "10", "--batch_size", "4"]
STUDENT = [
    *("--dim", "128", "--n_layers", "2", "--n_heads", "4", "--n_kv_heads", "4"),
    *("--rope_theta", "1e4"),
]
SMOKE_STUDENT = ["--dim", "32", "--n_layers", "1", "--n_heads", "2", "--n_kv_heads", "2"]
STUDENT_TEXTS = ["--batch_size", "4", "--learning_rate", "8e-3", "--epochs", "1"]
# With the same optimizer, so that only the teacher differs.
STUDENT_CHATS = [
    *("--batch_size", "4", "--optimizer", "adamw", "--learning_rate", "1e-3", "--epochs", "8"),
]
STUDENT_LINES = 350  # of the conversations: with all of them a teacher has little to add
SETTINGS = [PREFERENCE, ADAPTER, STUDENT, STUDENT_TEXTS, STUDENT_CHATS, STUDENT_LINES]

# What the stages must reach, as shares.
ACCURACY, STYLE, IDENTITY, FALL = 0.90, 0.80, 0.95, 0.03

Scores = dict[str, dict[str, float]]  # by model and skill


@dataclass
class Quickstart:
    """The models of the quick start: where they are, and the flags that make them."""

    python: Path  # interpreter
    out_dir: Path
    sample: Path  # folder of the sample's files
    tokenizer: Path  # folder
    model: list[str]  # flags of the shape; `--dim` comes first
    rows: list[str]  # flags that all stages share
    smoke: bool  # train each model for one epoch only

    def weights(self, stage: str) -> Path:
        """A stage's weights."""
        return self.out_dir / f"{stage}_{self.model[1]}.pth"

    def train(self, title: str, script: str, data: Path, *words: str | Path) -> None:
        """Train or resume on `data` with `words` and the flags that all stages share."""
        same = ["--tokenizer_path", self.tokenizer, *self.model, *self.rows, "--resume"]
        same += ["--out_dir", self.out_dir, *(["--epochs", "1"] if self.smoke else [])]
        step(title, self.python, script, "--data_path", data, *words, *same)

    def score(
        self,
        title: str,
        test: str,
        models: dict[str, str | Path],
        *words: str | Path,
        figures: str = "scores_of_stage.json",
    ) -> Scores:
        """Shares of right answers to a test of the sample, by model and skill.

        Questions are asked alone unless `words` has --history.
        """
        named = [f"{name}={short(path)}" for name, path in models.items()]
        data = ["--data_path", self.sample / test, "--tokenizer_path", self.tokenizer]
        words = [*named, *data, "--history", "0", *words, "--json", self.out_dir / figures]
        step(title, self.python, "scripts/score_world.py", *words)
        return json.loads((self.out_dir / figures).read_text(encoding="utf-8"))

    def metrics(self, weights: Path, key: str) -> list[float]:
        """The values of one figure in the metrics of a run."""
        path = weights.parent / "logs" / weights.stem / "metrics.jsonl"
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return [line[key] for line in lines if key in line]

    def share_without_identity(self, shares: dict[str, float]) -> float:
        """The share of right answers, questions about the model itself left out."""
        lines = (self.sample / "test.jsonl").read_text(encoding="utf-8").splitlines()
        asked = Counter(json.loads(line)["skill"] for line in lines)
        del asked["identity"]
        return sum(shares[skill] * n for skill, n in asked.items()) / sum(asked.values())


def copy_beginning(source: Path, target: Path, lines: int) -> None:
    """Write the first lines of a file to another one, unless it holds just these."""
    with source.open(encoding="utf-8", newline="") as file:
        beginning = "".join(islice(file, lines))
    if not target.is_file() or target.read_bytes() != beginning.encode("utf-8"):
        target.write_text(beginning, encoding="utf-8", newline="")


def percent(share: float) -> str:
    """A share as the table shows it."""
    return f"{100 * share:.1f} %"


class Results:
    """The table of what each stage changed, and the goals that were missed."""

    def __init__(self, start: Quickstart) -> None:
        self.start = start
        self.table = [
            "| stage | measured | before | after | minutes in steps |",
            "| --- | --- | ---: | ---: | ---: |",
        ]
        self.missed: list[str] = []

    def add(self, script: str, weights: Path, lines: dict[str, Sequence[float | str]]) -> None:
        """Add the lines of a stage: for what is measured a share, or a text, before and after."""
        stage, minutes = f"`{script}`", f"{self.start.metrics(weights, 'seconds')[-1] / 60:.1f}"
        for measured, values in lines.items():
            before, after = (v if isinstance(v, str) else percent(v) for v in values)
            self.table.append(f"| {stage} | {measured} | {before} | {after} | {minutes} |")
            stage = minutes = ""

    def want(self, name: str, share: float, least: float) -> None:
        """Note a miss if a share is below its goal."""
        if share < least:
            self.missed.append(f"{name} {percent(share)}, at least {percent(least)} wanted")


def run_preference(start: Quickstart, known: float, results: Results) -> None:
    """Prefer kind answers; the tuned model has the share `known` of right answers."""
    data = [start.sample / "dpo.jsonl", "--val_data_path", start.sample / "dpo_test.jsonl"]
    title = "Preference: kind answers rather than curt or plain ones"
    start.train(title, "train_dpo.py", *data, *PREFERENCE)
    models = {"tuned": start.weights("full_sft"), "dpo": start.weights("dpo")}
    style = start.score("How it answers", "dpo_test.jsonl", models)
    scores = start.score("What it still knows", "test.jsonl", {"dpo": models["dpo"]})
    right = scores["dpo"]["overall"]
    first, *_, last = start.metrics(models["dpo"], "val_accuracy")
    before, after = (style[name]["style"] for name in models)
    lines = {
        "held-out pairs told apart": (first, last),
        "answers of the preferred style": (before, after),
        "right answers": (known, right),
    }
    results.add("train_dpo.py", models["dpo"], lines)
    results.want("preference accuracy", last, ACCURACY)
    results.want("preferred style", after, STYLE)
    results.want("right answers after train_dpo.py", right, known - FALL)


def run_adapter(start: Quickstart, results: Results) -> None:
    """Give the tuned model another identity by an adapter."""
    data = [start.sample / "lora.jsonl", "--val_data_path", start.sample / "lora_test.jsonl"]
    start.train("An adapter: another identity", "train_lora.py", *data, *ADAPTER)
    tuned = start.weights("full_sft")
    adapter = replace(start, out_dir=start.out_dir / "lora").weights("identity")
    models = {"tuned": tuned, "adapted": f"{short(tuned)}+{short(adapter)}"}
    identity = start.score("Who it says it is", "lora_test.jsonl", models)
    scores = start.score("What it still knows", "test.jsonl", models)
    names = [identity[name]["identity"] for name in models]
    rest = [start.share_without_identity(scores[name]) for name in models]
    whole = [scores[name]["overall"] for name in models]
    lines = {
        "names its new identity": names,
        "right answers to all other questions": rest,
        "and with those of its name, which are to change": whole,
    }
    results.add("train_lora.py", adapter, lines)
    results.want("new identity", names[1], IDENTITY)
    results.want("right answers after train_lora.py", rest[1], rest[0] - FALL)


def run_distillation(start: Quickstart, results: Results) -> None:
    """Teach a smaller model, beside the same one without a teacher.

    There is no goal: with one seed, a point or two may be chance.
    """
    # In a folder of its own: --resume asks about runs of another shape beside it.
    model = SMOKE_STUDENT if start.smoke else STUDENT
    student = replace(start, model=model, out_dir=start.out_dir / "student")
    texts = [start.sample / "pretrain.jsonl", *STUDENT_TEXTS]
    student.train("A smaller model, pretrained", "train_pretrain.py", *texts)
    chats = student.out_dir / "chats.jsonl"
    copy_beginning(start.sample / "sft.jsonl", chats, STUDENT_LINES)
    words = [chats, *STUDENT_CHATS]
    student.train("It learns to answer by itself", "train_full_sft.py", *words)
    words += ["--teacher_weight", start.weights("full_sft")]
    student.train("It learns to answer from the larger one", "train_distillation.py", *words)
    models = {"alone": student.weights("full_sft"), "taught": student.weights("distill")}
    scores = start.score("What both know", "test.jsonl", models)
    right = [scores[name]["overall"] for name in models]
    lines = {"right answers of a smaller model, alone and taught": right}
    results.add("train_distillation.py", models["taught"], lines)


def run_further_stages(
    start: Quickstart, pretrained: dict[str, float], tuned: dict[str, float]
) -> list[str]:
    """Run every stage after tuning, print the table of all and write it to stages.md.

    `pretrained` and `tuned` are the shares of right answers of both models, by skill. Returns the
    goals that were missed.
    """
    results = Results(start)
    losses = start.metrics(start.weights("pretrain"), "loss")
    values = f"{losses[0]:.2f}", f"{losses[-1]:.2f}"
    lines = {"loss on plain text (nats per token)": values}
    results.add("train_pretrain.py", start.weights("pretrain"), lines)
    lines = {
        "right answers": (pretrained["overall"], tuned["overall"]),
        "of them about what only the texts tell": (pretrained["recall"], tuned["recall"]),
    }
    results.add("train_full_sft.py", start.weights("full_sft"), lines)
    run_preference(start, tuned["overall"], results)
    run_adapter(start, results)
    run_distillation(start, results)
    text = "\n".join(results.table) + "\n"
    (start.out_dir / "stages.md").write_text(text, encoding="utf-8")
    print(f"\n== What each stage changed\n{text}", flush=True)
    return results.missed
