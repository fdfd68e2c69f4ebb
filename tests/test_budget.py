"""Runs that are as long as a budget of steps, tokens or time."""

import json
import re
import time

import pytest
import torch
from interruptions import (
    FLOAT32,
    SHAPE,
    assert_same,
    at_call,
    killed,
    read_metrics,
    read_resume,
    result,
    snapshot,
    write_texts,
)

import training.run
from diagnosis.plan import BUDGETS
from model import LMConfig, MiniMindLM
from training import Run
from training.budget import Budget
from training.resume import TrainState
from training.saving import Saver

WORDS = [
    *SHAPE, "--max_seq_len", 32, "--batch_size", 4, "--learning_rate", 1e-3, "--min_lr", 0,
    "--lr_decay", "linear", "--warmup_iters", 2, "--log_interval", 1, "--save_interval", 3,
    "--no-packing",
]  # fmt: skip
TEXTS = 22  # rows of an epoch, of 6 steps

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "train.jsonl", TEXTS, longest=11)


@pytest.fixture(scope="module")
def tokens(data, tokenizer):
    """Target tokens of the file: those of each text and its end."""
    texts = [json.loads(line)["text"] for line in data.read_text("utf-8").splitlines()]
    return sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)


@pytest.fixture
def start(run, data, tmp_path):
    """Run with these flags; gives the figures of each step and what was printed."""

    def start(*words, out=tmp_path, **how):
        done = run(*WORDS, "--data_path", data, "--out_dir", out, *words, **how)
        return [line for line in read_metrics(out) if "lr" in line], done

    return start


def linear(step, total, warmup=2):
    return 1e-3 * (step / warmup if step < warmup else (total - step) / (total - warmup))


# What ends a run


@pytest.mark.parametrize(
    ("words", "steps", "times"),
    [
        (["--max_steps", 8], 8, "1.33"),
        (["--max_steps", 4], 4, "0.667"),
        (["--epochs", 0.5], 3, None),  # 11 rows of 22
        (["--epochs", 1.25], 8, None),  # 28 rows of 22: the sixth step ends the first epoch
        (["--max_steps", 20, "--epochs", 2], 12, "2"),
        (["--max_steps", 7, "--epochs", 2], 7, "1.17"),
        (["--max_steps", 9, "--max_tokens", 1e9], 9, "1.5"),
    ],
    ids=str,
)
def test_the_schedule_ends_where_the_budget_does(start, words, steps, times):
    figures, done = start(*words)
    assert [line["lr"] for line in figures] == pytest.approx(
        [linear(i, steps) for i in range(steps)]
    )
    assert f"steps: {steps}, each of 4 rows" in done.stdout
    assert f"step {steps}/{steps}  loss" in done.stdout
    lines = re.findall("budget: (.*)", done.stdout)
    assert len(lines) == (times is not None)
    if times is not None:
        first = ", whichever comes first" if len(words) > 2 else ""
        assert lines[0].endswith(f"{first}; the data are read {times} times")


@pytest.mark.parametrize("share", [0.4, 1.0, 2.3])
@pytest.mark.parametrize("flag", ["--max_tokens", "--tokens_per_parameter"])
def test_a_budget_of_tokens_ends_with_the_step_that_reaches_it(start, tokens, flag, share):
    wanted = share * tokens
    given = wanted
    if flag == "--tokens_per_parameter":
        given /= sum(p.numel() for p in MiniMindLM(LMConfig(dim=32, n_layers=1)).parameters())
    figures, done = start(flag, given)
    seen = [0, *(line["tokens"] for line in figures)]
    assert seen[-2] < wanted - 1e-6 <= seen[-1]
    # The rate follows the tokens, in steps of the mean size.
    total = wanted / (tokens / 6)
    rates = [linear(n / (tokens / 6), total) for n in seen[:-1]]
    assert [line["lr"] for line in figures] == pytest.approx(rates)
    (times,) = re.findall(r"the data are read ([\d.]+) times", done.stdout)
    assert float(times) == pytest.approx(share, abs=1 / 6)


def test_a_budget_replaces_the_default_of_epochs_only(start):
    figures, _ = start("--max_steps", 13)
    assert figures[-1]["step"] == 13 and figures[-1]["epoch"] == 2


def test_where_a_run_is_and_where_it_ends_by_hand():
    """100 rows and 1,000 tokens an epoch, in steps that began with 10 rows and now have 20."""
    budget = Budget(100, 1000, 20, epochs=1.5, max_steps=40, max_tokens=1200, max_seconds=60)
    state = TrainState("", 10, step=9, row=90, tokens=890, seconds=18, elapsed=30)
    # rows: 9 of 15; steps: 9 of 40; tokens: 8.9 of 12; time: 15 more steps of 2 s.
    assert budget.place(state) == (8.9, 12)
    assert budget.steps_left(state) == 2  # of 20 rows: 310 tokens
    state.reserve = 25
    assert budget.place(state) == (9, 9 + 5 / 2 - 0.5)
    assert budget.steps_left(state) == 2
    state.reserve = 29.1  # less than half a step is left
    assert budget.is_used_up(state)
    # Half an epoch of 100 rows, begun in steps of 20 and gone on in steps of 10.
    budget = Budget(100, 1000, 10, epochs=1.5, max_steps=None, max_tokens=None, max_seconds=None)
    state = TrainState("", 20, epoch=1, row=50)
    assert budget.steps_left(state) == 0 and budget.is_used_up(state)


# Resuming


@pytest.mark.parametrize(
    "words",
    [
        ["--max_steps", 9],
        ["--max_tokens", 500],
        ["--epochs", 1.4],
        ["--tokens_per_parameter", 0.0024, "--max_steps", 9],
    ],
    ids=str,
)
def test_killed_and_resumed_is_as_not_killed(start, tmp_path, words):
    words = [*words, "--dropout", 0.1, "--val_ratio", 0.2]
    start(*words, out=tmp_path / "whole")
    with killed(5, Run, "add_step"):
        start(*words, out=tmp_path / "killed")
    start(*words, "--resume", out=tmp_path / "killed")
    assert_same(result(tmp_path / "killed"), result(tmp_path / "whole"))
    before = snapshot(tmp_path / "killed")
    _, done = start(*words, "--resume", out=tmp_path / "killed")
    assert "nothing to do" in done.stdout and snapshot(tmp_path / "killed") == before


def test_a_resumed_run_goes_on_on_the_curve_of_its_new_budget(start, tmp_path):
    start("--max_steps", 6)
    figures, done = start("--max_steps", 10, "--resume")
    assert "--max_steps 10 (was 6)" in done.stdout
    assert [line["lr"] for line in figures] == pytest.approx(
        [linear(i, 6) for i in range(6)] + [linear(i, 10) for i in range(6, 10)]
    )
    before = snapshot(tmp_path)
    _, done = start("--max_steps", 5, "--resume")  # less than it had
    assert "nothing to do" in done.stdout and snapshot(tmp_path) == before
    figures, _ = start("--epochs", 2, "--resume")
    assert [line["lr"] for line in figures[10:]] == pytest.approx([linear(i, 12) for i in (10, 11)])


def test_a_resume_file_from_before_there_were_budgets(start, tmp_path):
    start("--epochs", 2, out=tmp_path / "whole")
    with killed(5, Run, "add_step"):
        start("--epochs", 2, out=tmp_path / "killed")
    path = tmp_path / "killed" / "pretrain_32_resume.pth"
    contents = torch.load(path, weights_only=True)
    for name in ("elapsed", "budget_used"):
        del contents["state"][name]
    for name in ("size", "depth", *BUDGETS, "sample_prompts"):
        del contents["arguments"][name]
    torch.save(contents, path)
    start("--epochs", 2, "--resume", out=tmp_path / "killed")
    assert_same(result(tmp_path / "killed"), result(tmp_path / "whole"))


def test_a_finished_run_is_not_called_unfinished(start):
    _, done = start("--max_steps", 3)
    _, done = start("--max_steps", 3)
    assert "unfinished" not in done.stdout
    with killed(5, Run, "add_step"):
        start("--max_steps", 8)
    _, done = start("--max_steps", 3)
    assert "unfinished run, at step 3" in done.stdout


# Time, on a clock that steps, evaluations and saves move


class Clock:
    """Stands for time.perf_counter."""

    # Seconds of a training step, of an evaluated row, of a save, of samples and of the report.
    STEP, ROW, SAVE, SAMPLES, REPORT = 2.0, 0.25, 1.5, 5.0, 4.0

    def __init__(self, patch):
        self.began = self.now = 1000.0
        self.slowness = 1.0
        patch.setattr(time, "perf_counter", lambda: self.now)
        forward, save, generate = MiniMindLM.forward, Saver.save, MiniMindLM.batch_generate
        report = training.run.write_report

        def timed_forward(model, input_ids, *args, **kwargs):
            cost = self.STEP * self.slowness if model.training else self.ROW * len(input_ids)
            self.now += cost
            return forward(model, input_ids, *args, **kwargs)

        def timed_save(saver, *args):
            self.now += self.SAVE
            return save(saver, *args)

        def timed_generate(model, prompts, **how):
            self.now += self.SAMPLES
            return generate(model, prompts, **how)

        def timed_report(*args):
            self.now += self.REPORT
            return report(*args)

        patch.setattr(MiniMindLM, "forward", timed_forward)
        patch.setattr(MiniMindLM, "batch_generate", timed_generate)
        patch.setattr(Saver, "save", timed_save)
        patch.setattr(training.run, "write_report", timed_report)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


TIMED = ["--max_minutes", 2, "--save_interval", 10]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--val_ratio", 0.5, "--eval_interval", 8],
        ["--val_ratio", 0.5, "--eval_interval", 1000, "--test_data_path", "data"],
        ["--val_ratio", 0.5, "--eval_interval", 1000, "--sample_prompts", "red"],
    ],
    ids=["training only", "validation", "test", "samples"],
)
def test_a_run_takes_the_time_asked_for(start, clock, data, tmp_path, words):
    """Within 5 %, with the evaluation, the test, the saves, samples and report at the end."""
    figures, done = start(*TIMED, *(data if word == "data" else word for word in words))
    assert clock.now - clock.began == pytest.approx(120, rel=0.05)
    assert "the data are repeated for as long as there is time" in done.stdout
    assert "not repeat bit for bit" in done.stdout
    assert re.search(r"to go; about [23456]\d steps, [\d.]+ epochs in all", done.stdout)
    scored = [line["step"] for line in read_metrics(tmp_path) if "val_loss" in line]
    assert scored[-1:] == [figures[-1]["step"]] * ("--val_ratio" in words)


def test_the_rate_follows_the_clock(start, clock):
    """Warm-up, then a decay that ends with the run, also where steps get slower on the way."""

    def slow_down():
        clock.slowness = 3.0

    with at_call(20, Run, "add_step", slow_down):
        figures, _ = start(*TIMED)
    assert clock.now - clock.began == pytest.approx(120, rel=0.05)
    rates = [line["lr"] for line in figures]
    assert rates[:3] == [0, 5e-4, 1e-3]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 1e-4


def test_a_resumed_run_counts_the_time_that_it_had(start, clock, tmp_path):
    with killed(25, Run, "add_step"):
        start(*TIMED)
    saved = read_resume(tmp_path)["state"]
    assert saved["step"] == 20 and saved["elapsed"] == pytest.approx(40 + 2 * 1.5 + 9, abs=0.1)
    clock.began = clock.now
    figures, _ = start(*TIMED, "--resume")
    assert saved["elapsed"] + clock.now - clock.began == pytest.approx(120, rel=0.05)
    rates = [line["lr"] for line in figures]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    before = snapshot(tmp_path)
    _, done = start(*TIMED, "--resume")
    assert "nothing to do" in done.stdout and snapshot(tmp_path) == before
    clock.began = clock.now
    start("--max_minutes", 3, "--resume")
    assert clock.now - clock.began == pytest.approx(60, rel=0.05)


def test_steps_end_a_run_before_its_time_does(start, clock):
    figures, done = start(*TIMED, "--max_steps", 9)
    assert [line["lr"] for line in figures] == pytest.approx([linear(i, 9) for i in range(9)])
    assert "--max_steps 9 --max_minutes 2, whichever comes first" in done.stdout


SKEWED = """
import os, runpy, sys, time
now, pace = 0.0, 0.25 * (1 + 2 * int(os.environ["RANK"]))
def read():
    global now
    now += pace
    return now
time.perf_counter = read
sys.argv[0] = "train_pretrain.py"
runpy.run_path("train_pretrain.py", run_name="__main__")
"""


def test_all_processes_follow_the_first_one_s_clock(run, data, tmp_path):
    """A second one whose clock is three times as fast ends at the same step, and is silent."""
    script = tmp_path / "skewed.py"
    script.write_text(SKEWED, encoding="utf-8")
    done = run(
        *WORDS, "--data_path", data, "--out_dir", tmp_path, "--max_minutes", 1, *FLOAT32,
        "--val_ratio", 0.2, "--eval_interval", 5, "--sample_prompts", "red",
        script=script, processes=2,
    )  # fmt: skip
    state = read_resume(tmp_path)["state"]
    assert state["budget_used"] and state["step"] > 9 and 60 <= state["elapsed"] < 61
    assert re.findall(r"step (\d+)  sample 'red' → ", done.stdout)[:1] == ["5"]
    assert done.stdout.count("step 5  sample") == 1
