"""SIGTERM and Ctrl-C let the run save before it ends; a second Ctrl-C does not wait."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from interruptions import (
    SHAPE,
    assert_same,
    at_call,
    evaluating,
    learning,
    read_metrics,
    read_resume,
    result,
    saving,
    started,
    wait_for_step,
    write_texts,
)
from transformers import AutoTokenizer

from dataset import PackedRows, PretrainDataset, RowBatches
from model import MiniMindLM
from training import Run

posix = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")

ROWS = [
    *SHAPE, "--max_seq_len", "32", "--dropout", "0.2", "--learning_rate", "3e-3", "--epochs", "1",
]  # fmt: skip
WHOLE = [
    *ROWS, "--batch_size", "2", "--accumulation_steps", "2", "--epochs", "2", "--log_interval", "2",
    "--val_ratio", "0.2", "--eval_interval", "4", "--save_interval", "3",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("quick")


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


@posix
@pytest.mark.parametrize(
    ("number", "n", "owner", "name", "how", "step"),
    [
        pytest.param(signal.SIGTERM, 1, MiniMindLM, "forward", {"when": learning}, 1, id="first"),
        pytest.param(signal.SIGINT, 10, MiniMindLM, "forward", {"when": learning}, 5, id="window"),
        pytest.param(signal.SIGTERM, 6, Run, "add_step", {"after": True}, 6, id="step"),
        pytest.param(signal.SIGINT, 1, MiniMindLM, "forward", {"when": evaluating}, 4, id="val"),
        pytest.param(signal.SIGTERM, 4, MiniMindLM, "forward", {"when": evaluating}, 8, id="end"),
        pytest.param(signal.SIGINT, 2, Path, "replace", {"when": saving}, 4, id="save"),
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
    ("n", "owner", "name", "how"),
    [
        pytest.param(9, MiniMindLM, "forward", {"when": learning}, id="window"),
        pytest.param(1, MiniMindLM, "forward", {"when": evaluating}, id="val"),
        pytest.param(6, Path, "replace", {"when": saving}, id="save"),
    ],
)
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_ends_the_run_at_once(
    run, data, unbroken, handlers, tmp_path, first, n, owner, name, how
):
    """What was saved before remains, and goes on."""
    words = [*WHOLE, "--data_path", data, "--out_dir", tmp_path]
    with at_call(n, owner, name, send(first, signal.SIGINT), **how):
        done = run(*words, code=130)
    assert "Traceback" not in done.stderr
    assert read_resume(tmp_path)["state"]["step"] == 3
    assert not list(tmp_path.glob("*.tmp"))
    run(*words, "--resume")
    assert_same(result(tmp_path), unbroken)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "many.jsonl", 300)


@posix
def test_signals_of_the_system(run, root, tmp_path):
    """SIGTERM to a whole group, as torchrun sends it: to loader processes too. Then SIGKILL."""
    data = write_texts(tmp_path / "train.jsonl", 100)
    words = [*ROWS, "--batch_size", 1, "--log_interval", 1, "--save_interval", 20]
    words += ["--num_workers", 1, "--data_path", data, "--out_dir"]
    out = tmp_path / "out"
    for step, number, status in (2, signal.SIGTERM, 143), (40, signal.SIGKILL, -9):
        with started(root, *words, out, "--resume") as process:
            wait_for_step(process, out, step)
            os.killpg(process.pid, number)
            printed, _ = process.communicate(timeout=30)
            assert process.returncode == status, printed
    run(*words, out, "--resume")
    run(*words, tmp_path / "unbroken")
    assert_same(result(out), result(tmp_path / "unbroken"))


# Training, whose main process stops torchrun after so many batches, and then slows down.
STOPPING = """
import os, runpy, sys, time
from model import MiniMindLM

number, batches = int(sys.argv[1]), int(sys.argv[2])
sys.argv = ["train_pretrain.py", *sys.argv[3:]]
forward = MiniMindLM.forward

def counted(*args, **kwargs):
    global batches
    batches -= 1
    if batches == 0 and os.environ["RANK"] == "0":
        os.kill(os.getppid(), number)
    if batches <= 0:
        time.sleep(0.05)
    return forward(*args, **kwargs)

MiniMindLM.forward = counted
runpy.run_path("train_pretrain.py", run_name="__main__")
"""


def stop_processes(root, words, out, number, batches, step):
    """Go on in `out` with two processes, and stop them within the accumulation of a step."""
    script = out.with_name("stopping.py")
    script.write_text(STOPPING, encoding="utf-8")
    words = [int(number), batches, *words, "--out_dir", out]
    with started(root, *words, script=script, processes=2) as process:
        printed, _ = process.communicate(timeout=240)
    assert f"stopped by {number.name} at step {step}" in printed
    assert process.returncode != 0
    assert read_resume(out)["state"]["step"] == step


@posix
def test_processes_finish_the_step(run, root, many, tmp_path, tokenizer_dir):
    """One process takes a step, then two take two, at once or stopped between; then one the rest.

    No row is taken twice or left out, and the learning rate falls by rows.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    rows = PackedRows(PretrainDataset(many, tokenizer, 33), 32)
    (order,) = RowBatches(len(rows), len(rows), seed=42, epoch=0)
    tokens = torch.stack([rows[row]["loss_mask"].sum() for row in order]).cumsum(0)

    words = [
        *ROWS, "--lr_decay", "linear", "--warmup_iters", 0, "--min_lr", 1e-3, "--log_interval", 1,
        "--data_path", many, "--resume",
    ]  # fmt: skip
    out = tmp_path / "out"
    with at_call(1, Run, "add_step", send(signal.SIGTERM), after=True):
        run(*words, "--out_dir", out, "--batch_size", 30, code=143)
    stopped = shutil.copytree(out, tmp_path / "stopped")
    together = [*words, "--batch_size", 1, "--accumulation_steps", 30]
    stop_processes(root, together, out, signal.SIGINT, 33, 3)
    stop_processes(root, together, stopped, signal.SIGTERM, 5, 2)
    stop_processes(root, together, stopped, signal.SIGTERM, 5, 3)
    assert_same(result(stopped), result(out))

    run(*words, "--out_dir", out, "--batch_size", 70)
    starts = [0, 30, 90, *range(150, len(rows), 70)]
    lines = read_metrics(out)
    assert [line["tokens"] for line in lines] == [
        tokens[end - 1] for end in (*starts[1:], len(rows))
    ]
    per_epoch = -(-len(rows) // 30)  # steps of the batch that the run began with
    assert [line["lr"] for line in lines] == pytest.approx(
        [3e-3 - 2e-3 * start / 30 / per_epoch for start in starts]
    )
