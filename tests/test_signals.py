"""SIGTERM and Ctrl-C let the run save before it ends; a second Ctrl-C does not wait."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from interruptions import (
    SHAPE,
    assert_same,
    at_call,
    read_metrics,
    read_resume,
    result,
    started,
    wait_for_step,
    write_texts,
)

from model import MiniMindLM
from training import Run

posix = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")

ROWS = [*SHAPE, "--max_seq_len", "32", "--dropout", "0.2", "--learning_rate", "3e-3"]
WHOLE = [
    *ROWS, "--batch_size", "2", "--accumulation_steps", "2", "--epochs", "2", "--log_interval", "2",
    "--val_ratio", "0.2", "--eval_interval", "4", "--save_interval", "3",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick():
    """No plots, which take most of a small run's time; one thread for what fixtures run too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patches:
        patches.setitem(sys.modules, "matplotlib.figure", None)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "train.jsonl", 16)


@pytest.fixture(scope="module")
def unbroken(run, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    run(*WHOLE, "--data_path", data, "--out_dir", out)
    return result(out)


@pytest.fixture
def handlers():
    """Handlers of the test's own, which a run must leave as they were and never needs."""

    def unexpected(number, frame):
        raise AssertionError("the run does not handle this signal")

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, unexpected) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == [unexpected] * 2
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def send(*numbers):
    def act():
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


def learning(model, *args):
    return model.training


def evaluating(model, *args):
    return not model.training


def of_the_run(path, target):
    return path.name.startswith(".pretrain_32")


@posix
@pytest.mark.parametrize(
    ("number", "n", "owner", "name", "how", "step"),
    [
        pytest.param(signal.SIGTERM, 1, MiniMindLM, "forward", {"when": learning}, 1, id="first"),
        pytest.param(signal.SIGINT, 10, MiniMindLM, "forward", {"when": learning}, 5, id="window"),
        pytest.param(signal.SIGTERM, 6, Run, "add_step", {"after": True}, 6, id="step"),
        pytest.param(signal.SIGINT, 1, MiniMindLM, "forward", {"when": evaluating}, 4, id="val"),
        pytest.param(signal.SIGTERM, 2, MiniMindLM, "forward", {"when": evaluating}, 8, id="end"),
        pytest.param(signal.SIGINT, 2, Path, "replace", {"when": of_the_run}, 4, id="save"),
    ],
)
def test_the_step_is_finished_and_saved(
    run, data, unbroken, handlers, tmp_path, number, n, owner, name, how, step
):
    words = [*WHOLE, "--data_path", data, "--out_dir", tmp_path]
    with at_call(n, owner, name, send(number), **how):
        done = run(*words, code=128 + number)
    assert f"stopped by {signal.Signals(number).name} at step {step}" in done.stdout
    saved = read_resume(tmp_path)
    assert saved["state"]["step"] == step
    assert_same(torch.load(tmp_path / "pretrain_32.pth", weights_only=True), saved["model"])
    run(*words, "--resume")
    assert_same(result(tmp_path), unbroken)


@posix
@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)]
)
@pytest.mark.parametrize(
    ("n", "owner", "name", "how", "step"),
    [
        pytest.param(9, MiniMindLM, "forward", {"when": learning}, 3, id="window"),
        pytest.param(1, MiniMindLM, "forward", {"when": evaluating}, 3, id="val"),
        pytest.param(6, Path, "replace", {"when": of_the_run}, 3, id="save"),
    ],
)
def test_a_second_interrupt_ends_the_run_at_once(
    run, data, unbroken, handlers, tmp_path, n, owner, name, how, step, numbers
):
    """What was saved before remains, and goes on."""
    words = [*WHOLE, "--data_path", data, "--out_dir", tmp_path]
    with at_call(n, owner, name, send(*numbers), **how):
        done = run(*words, code=130)
    assert "Traceback" not in done.stderr
    assert read_resume(tmp_path)["state"]["step"] == step
    assert not list(tmp_path.glob("*.tmp"))
    run(*words, "--resume")
    assert_same(result(tmp_path), unbroken)


@posix
def test_signals_of_the_system(run, root, data, tmp_path):
    """SIGTERM, then Ctrl-C, which a terminal sends to loader processes as well, then SIGKILL."""
    words = [*WHOLE, "--epochs", 40, "--save_interval", 20, "--log_interval", 1]
    words += ["--eval_interval", 50, "--data_path", data]
    out = ["--out_dir", tmp_path / "out", "--num_workers", 1]
    with started(root, *words, *out) as process:
        wait_for_step(process, tmp_path / "out", 2)
        process.terminate()
        assert process.wait(30) == 143
    with started(root, *words, *out, "--resume") as process:
        wait_for_step(process, tmp_path / "out", 30)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
    with started(root, *words, *out, "--resume") as process:
        wait_for_step(process, tmp_path / "out", 70)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    run(*words, *out, "--resume")
    run(*words, "--out_dir", tmp_path / "unbroken", "--num_workers", 1)
    assert_same(result(tmp_path / "out"), result(tmp_path / "unbroken"))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "many.jsonl", 400)


# Windows of 200 rows, which two processes need a second or so for.
TOGETHER = [*ROWS, "--batch_size", "1", "--accumulation_steps", "100", "--log_interval", "1"]


@posix
def test_processes_drop_the_open_window(run, root, many, tmp_path):
    """Stopped in the second window and in the third; then resumed by two processes, and by one."""
    words = [*TOGETHER, "--data_path", many, "--out_dir"]
    out = tmp_path / "out"
    for step, number in (1, signal.SIGTERM), (2, signal.SIGINT):
        with started(root, *words, out, "--resume", processes=2) as process:
            wait_for_step(process, out, step)
            if number == signal.SIGTERM:
                process.terminate()
            else:
                os.killpg(process.pid, number)
            printed, _ = process.communicate(timeout=30)
        assert f"stopped by {number.name} at step {step}" in printed
        assert read_resume(out)["state"]["step"] == step
        shutil.copytree(out, tmp_path / f"step{step}")
    run(*words, out, "--resume", processes=2)
    run(*words, tmp_path / "unbroken", processes=2)
    assert_same(result(out), result(tmp_path / "unbroken"))

    alone = ["--batch_size", 7, "--accumulation_steps", 3, "--resume"]
    run(*words, tmp_path / "step1", *alone)
    assert read_metrics(tmp_path / "step1")[-1]["tokens"] == read_metrics(out)[-1]["tokens"]
