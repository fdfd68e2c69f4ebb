"""A new stage is its own idea: resume, validation and record come from what is shared."""

import ast
import math
from pathlib import Path

import pytest
from interruptions import SHAPE, assert_same, killed, read_metrics, result, write_texts

from training import Run

TOY = Path(__file__).with_name("toy_stage.py")
OWN = ("z_losses", "score", "train_epoch")  # the idea: its loss and its step

pytestmark = pytest.mark.usefixtures("quick")


def test_it_is_little_besides_its_own_idea():
    tree = ast.parse(TOY.read_text(encoding="utf-8"))
    own = sum(
        node.end_lineno - node.lineno + 1
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name in OWN
    )
    imports = sum(
        node.end_lineno - node.lineno + 1
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    )
    written = [line for line in TOY.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(written) - own - imports <= 60


def test_it_resumes_validates_and_reports(run, tmp_path):
    data = write_texts(tmp_path / "train.jsonl", 16)
    words = [*SHAPE, "--data_path", data, "--val_ratio", 0.2, "--eval_interval", 4, "--dropout"]
    words += [0.2, "--save_interval", 3, "--log_interval", 2, "--save_best", "--dtype", "float32"]
    run(*words, "--out_dir", tmp_path / "whole", script="tests/toy_stage.py")
    broken = [*words, "--out_dir", tmp_path / "broken"]
    with killed(8, Run, "add_step"):
        run(*broken, script="tests/toy_stage.py")
    run(*broken, "--resume", script="tests/toy_stage.py")
    assert_same(result(tmp_path / "broken", "toy_32"), result(tmp_path / "whole", "toy_32"))
    lines = read_metrics(tmp_path / "whole", "toy_32")
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert losses[0] == pytest.approx(math.log(6400), rel=0.05) and losses[-1] < losses[0]
    report = (tmp_path / "whole" / "logs" / "toy_32" / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# toy_32") and "## What stands out" in report
