"""scripts/quickstart.py from nothing to a scorecard, and what it says of low scores."""

import json
import os
import runpy
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def quickstart(root):
    return runpy.run_path(str(root / "scripts" / "quickstart.py"), run_name="quickstart")


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """The folder that `--smoke` leaves, and what it printed, of a first start and a second."""
    if not (root / ".venv").is_dir():
        pytest.skip("needs the .venv that scripts/test.py makes")
    out = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, root / "scripts" / "quickstart.py", "--smoke", "--out_dir", out]
    printed = []
    for _ in range(2):
        done = subprocess.run(
            command,
            cwd=out,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        printed.append(done.stdout)
    return out, printed


def test_smoke_goes_all_the_way(finished):
    out, (first, _) = finished
    for title in "Pretraining", "Instruction tuning", "without pretraining", "Scores", "Chat with":
        assert title in first
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert list(scores) == ["untrained", "pretrained only", "tuned only", "both stages"]
    card = (out / "scorecard.md").read_text(encoding="utf-8")
    assert "| recall | English |" in card


def test_a_second_start_trains_nothing_again(finished):
    _, (first, second) = finished
    assert "this run is finished" not in first
    assert second.count("this run is finished") == 3
    assert "A tokenizer for this world" not in second


def test_scores_that_are_too_low_are_named(quickstart):
    good = {"overall": 0.9, "recall": 0.8, "sums": 0.6}
    poor = {"overall": 0.79, "recall": 0.69, "sums": 0.59}
    alone = {"recall": 0.09}
    names = quickstart["PRETRAINED"], quickstart["TUNED"]
    both = quickstart["BOTH"]
    misses = quickstart["misses"]
    assert misses({both: good, **dict.fromkeys(names, alone)}) == []
    found = misses({both: poor, names[0]: {"recall": 0.1}, names[1]: alone})
    assert [line.split(":")[0] for line in found] == [
        "overall",
        "recall",
        "sums",
        f"recall, {names[0]}",
    ]
