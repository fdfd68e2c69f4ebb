"""Batch size, learning rate and epochs that the plan chooses, by hand; flags and resumed runs."""

import json
import math
import re

import pytest
from interruptions import SHAPE, killed, write_texts

from training import Run, settings
from training.settings import fitting_settings

RATES = ((1e6, 0.1, 0.3, 1.0), (5e6, 0.1, 0.2, 1.0), (math.inf, 0.01, 0.05, 0.1))
WORDS = [*SHAPE, "--max_seq_len", 64, "--save_interval", 10, "--log_interval", 10]

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize(
    ("n_rows", "row_length", "epochs", "wanted"),
    [
        # 320 rows of 512, four times: 1,280 rows are 320 steps of 4; fewer never.
        (320, 512, None, (4, 4)),
        (8, 512, None, (4, 4)),
        # 3,900 rows, up to 2 M positions, four times: 15,600 rows, 52 for each of 300 steps: 32.
        (3900, 512, None, (32, 4)),
        # 900 rows, four times: 12 for each of 300 steps: 8, the power of two below.
        (900, 512, None, (8, 4)),
        (10_000, 512, None, (32, 2)),
        (100_000, 512, None, (32, 1)),
        # Rows of half the length: twice as many.
        (640, 256, None, (8, 4)),
        # Rows of 8,192 hold what four of 512 hold, four times; one is the least, two the most.
        (10, 8192, None, (1, 4)),
        (100_000, 8192, None, (2, 1)),
        # Passes that are known: 900 rows once are 3 for each of 300 steps: the least, 4.
        (900, 512, 1, (4, 1)),
        (900, 512, 8, (16, 8)),
        (900, 512, 0.5, (4, 0.5)),
    ],
)
def test_rows_and_epochs_by_hand(n_rows, row_length, epochs, wanted):
    found = fitting_settings(n_rows, row_length, 10, RATES, epochs)
    assert (found.rows_per_step, found.epochs) == wanted


@pytest.mark.parametrize(
    ("size", "rate"), [(10, 0.3), (1e6, 0.3), (1e6 + 1, 0.2), (5e6, 0.2), (1e9, 0.05)]
)
def test_the_rate_is_the_usual_one_of_the_size(size, rate):
    assert fitting_settings(900, 512, size, RATES).learning_rate == rate


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "train.jsonl", 20)


def flags(out):
    config = json.loads((out / "logs/pretrain_32/config.json").read_text(encoding="utf-8"))
    names = ("batch_size", "learning_rate", "min_lr", "epochs")
    return [config["arguments"][name] for name in names]


def test_what_is_not_given_is_chosen_and_said(run, texts, tmp_path):
    """20 texts fit into some ten rows of 64: the least batch, 4 × 512 / 64 rows."""
    said = run(*WORDS, "--data_path", texts, "--out_dir", tmp_path).stdout
    assert flags(tmp_path) == [32, 8e-3, 8e-4, 4]
    for flag in ("--batch_size 32 (", "--learning_rate 0.008 (muon with ", "--epochs 4 ("):
        assert f"chosen: {flag}" in said


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--batch_size", 3, "--learning_rate", 0.004, "--epochs", 2], [3, 0.004, 0.0004, 2]),
        (["--batch_size", 3], [3, 8e-3, 8e-4, 4]),
        (["--optimizer", "adamw", "--epochs", 1], [32, 1e-3, 1e-4, 1]),
        (["--accumulation_steps", 8], [4, 8e-3, 8e-4, 4]),
        (["--accumulation_steps", 64], [1, 8e-3, 8e-4, 4]),
        (["--max_steps", 2], [32, 8e-3, 8e-4, None]),  # a budget replaces the epochs
        (["--min_lr", 1e-5], [32, 8e-3, 1e-5, 4]),
    ],
)
def test_what_is_given_counts(run, texts, tmp_path, words, wanted):
    said = run(*WORDS, "--data_path", texts, "--out_dir", tmp_path, *words).stdout
    assert flags(tmp_path) == wanted
    for word in words:
        assert f"chosen: {word} " not in said


def test_a_size_stops_at_twenty_tokens_per_parameter(run, texts, tmp_path, monkeypatch):
    """As if the data were long: then the run ends within an epoch of theirs."""
    monkeypatch.setattr(settings, "TOKENS_PER_PARAMETER", 0.001)
    words = ["--data_path", texts, "--out_dir", tmp_path, "--max_seq_len", 64, "--device", "cpu"]
    run(*words, "--depth", 1)
    log = (tmp_path / "logs/pretrain_64/training_log.txt").read_text(encoding="utf-8")
    parameters = 64 * 6400 + 64 * (2 * 64 + 2 * 64 + 3 * 192 + 3)  # kv heads are all heads here
    tokens = int(re.search(r"([\d,]+) target tokens", log)[1].replace(",", ""))
    epochs = json.loads((tmp_path / "logs/pretrain_64/config.json").read_text("utf-8"))
    assert epochs["arguments"]["epochs"] == pytest.approx(0.001 * parameters / tokens)


def test_a_smallest_rate_above_the_chosen_one_is_an_error(run, texts, tmp_path):
    words = [*WORDS, "--data_path", texts, "--out_dir", tmp_path, "--min_lr", 0.1]
    assert "--min_lr 0.1 is above --learning_rate 0.008" in run(*words, code=2).stderr


def test_a_resumed_run_keeps_what_it_had(run, texts, tmp_path):
    words = [*WORDS, "--data_path", texts, "--out_dir", tmp_path]
    given = ["--batch_size", 2, "--learning_rate", 0.004, "--epochs", 3]
    with killed(12, Run, "add_step"):
        run(*words, *given)
    said = run(*words, "--resume").stdout
    assert "--resume: --batch_size 2 --learning_rate 0.004 --epochs 3, as before" in said
    assert "chosen:" not in said
    assert flags(tmp_path) == [2, 0.004, 0.0004, 3]
    said = run(*words, "--resume", "--epochs", 4).stdout
    assert "--epochs 4.0 (was 3.0)" in said
    assert flags(tmp_path) == [2, 0.004, 0.0004, 4]
