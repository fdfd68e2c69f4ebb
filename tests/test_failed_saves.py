"""A disk that is full or cannot be written: nothing saved before is lost, and the run goes on."""

import errno
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from interruptions import (
    SHAPE,
    assert_same,
    at_call,
    killed,
    read_metrics,
    result,
    snapshot,
    write_texts,
)

from training import Run

resource = pytest.importorskip("resource", reason="limits on file sizes, as POSIX has them")

WHOLE = [
    *SHAPE, "--max_seq_len", "32", "--batch_size", "2", "--accumulation_steps", "2",
    "--epochs", "2", "--learning_rate", "3e-3", "--dropout", "0.2", "--save_interval", "2",
    "--log_interval", "1",
]  # fmt: skip
WEIGHTS = 840_000  # bytes of the weights; a resume file has three times as many


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "train.jsonl", 16)


@pytest.fixture(scope="module")
def unbroken(run, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    run(*WHOLE, "--data_path", data, "--out_dir", out)
    return result(out)


@pytest.fixture(scope="module")
def interrupted(run, data, tmp_path_factory):
    """Folder of a run of twelve steps that was killed in its sixth; saved after 2 and 4."""
    out = tmp_path_factory.mktemp("interrupted")
    with killed(6, Run, "add_step"):
        run(*WHOLE, "--data_path", data, "--out_dir", out)
    return out


@pytest.fixture
def out(interrupted, tmp_path):
    """A copy of `interrupted`."""
    return shutil.copytree(interrupted, tmp_path / "out")


@pytest.fixture
def disk():
    """Sets how many bytes a file may have; None: as many as it likes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def allow(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield allow
    allow(None)


def contents(out, *names):
    return [(out / name).read_bytes() for name in names]


@pytest.mark.parametrize(
    ("room", "kept"),
    [
        (WEIGHTS * 3 // 2, ["pretrain_32_resume.prev.pth", "pretrain_32_resume.pth"]),
        (
            WEIGHTS // 2,
            ["pretrain_32_resume.prev.pth", "pretrain_32_resume.pth", "pretrain_32.pth"],
        ),
    ],
    ids=["resume", "weights"],
)
def test_a_full_disk_keeps_what_was_saved(run, data, unbroken, out, disk, room, kept):
    """The run goes on to its end, its status is 2, and with room again it can be repeated."""
    words = [*WHOLE, "--data_path", data, "--out_dir", out, "--resume"]
    before = contents(out, *kept)
    disk(room)
    done = run(*words, code=2)
    disk(None)
    assert contents(out, *kept) == before
    for name in kept[1:]:
        said = [line for line in done.stdout.splitlines() if f"{out / name}: cannot be" in line]
        assert len(said) >= 2  # each save says so
        assert all(os.strerror(errno.EFBIG) in line for line in said)
    assert len(done.stderr.splitlines()) == 1
    assert "the last save failed" in done.stderr
    assert read_steps(out) == list(range(1, 13))
    assert not list(out.glob("*.tmp"))
    run(*words)
    assert_same(result(out), unbroken)


def read_steps(out):
    return [line["step"] for line in read_metrics(out)]


def test_saves_that_failed_on_the_way_are_made_good(run, data, unbroken, tmp_path, disk):
    words = [*WHOLE, "--data_path", data, "--out_dir", tmp_path]
    with (
        at_call(3, Run, "add_step", lambda: disk(WEIGHTS // 2)),
        at_call(7, Run, "add_step", lambda: disk(None)),
    ):
        done = run(*words)
    assert "cannot be saved" in done.stdout
    assert done.stderr == ""
    assert_same(result(tmp_path), unbroken)


def test_metrics_on_a_full_disk_are_whole_lines(run, data, tmp_path, disk):
    """The disk is full in the middle of the line of step 4; from step 6 on it is not."""
    path = tmp_path / "logs" / "pretrain_32" / "metrics.jsonl"
    words = [*WHOLE, "--data_path", data, "--out_dir", tmp_path]
    with (
        at_call(4, Run, "add_step", lambda: disk(path.stat().st_size + 50)),
        at_call(6, Run, "add_step", lambda: disk(None)),
    ):
        done = run(*words)
    assert str(path) in done.stderr
    assert read_steps(tmp_path) == [1, 2, 3, *range(6, 13)]


@contextmanager
def fails(error, *, when):
    """Files that `when` takes cannot be opened to write."""
    opened = Path.open

    def refuse(path, mode="r", *args, **kwargs):
        if "w" in mode and when(path):
            raise OSError(error, os.strerror(error), str(path))
        return opened(path, mode, *args, **kwargs)

    with mock.patch.object(Path, "open", refuse):
        yield


@pytest.mark.parametrize("returns", [True, False])
def test_a_folder_that_goes_away(run, data, unbroken, tmp_path, returns):
    """A file takes its place while training."""
    out, away = tmp_path / "out", tmp_path / "away"

    def move():
        out.rename(away)
        out.write_text("not a folder", encoding="utf-8")

    def restore():
        out.unlink()
        away.rename(out)

    words = [*WHOLE, "--data_path", data, "--out_dir", out]
    with at_call(3, Run, "add_step", move):
        if returns:
            with at_call(7, Run, "add_step", restore):
                done = run(*words)
        else:
            done = run(*words, code=2)
            assert "the last save failed" in done.stderr
            assert len(done.stderr.splitlines()) == 1
            assert out.read_text(encoding="utf-8") == "not a folder"
            restore()
            run(*words, "--resume")
    assert "cannot be saved" in done.stdout
    assert_same(result(out), unbroken)


def test_a_folder_that_can_no_longer_be_written(run, data, unbroken, out):
    words = [*WHOLE, "--data_path", data, "--out_dir", out, "--resume"]
    kept = ["pretrain_32.pth", "pretrain_32_resume.pth", "pretrain_32_resume.prev.pth"]
    before, locked = contents(out, *kept), []
    with (
        at_call(2, Run, "add_step", lambda: locked.append(True)),
        fails(errno.EACCES, when=lambda path: locked and path.parent == out),
    ):
        done = run(*words, code=2)
    assert os.strerror(errno.EACCES) in done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert contents(out, *kept) == before
    run(*words)
    assert_same(result(out), unbroken)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("room", [0, 1000])
def test_a_disk_that_is_full_from_the_start(run, data, out, disk, resume, room):
    """Where there is room for a first byte, but not for more, the earlier run has made way."""
    before = {path: kept for path, kept in snapshot(out).items() if path.suffix == ".pth"}
    disk(room)
    done = run(*WHOLE, "--data_path", data, "--out_dir", out, *["--resume"] * resume, code=2)
    disk(None)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert str(out) in done.stderr
    if room and not resume:
        (moved,) = (out / "replaced").iterdir()
        before = {moved / path.name: kept for path, kept in before.items()}
    assert before.items() <= snapshot(out).items()


def test_numbered_weights_that_cannot_be_removed(run, data, tmp_path):
    """As where another program has them open on Windows."""
    unlink = Path.unlink

    def refuse(path, missing_ok=False):
        if path.name == "pretrain_32_step2.pth":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        unlink(path, missing_ok)

    words = [*WHOLE, "--save_total_limit", 1, "--data_path", data, "--out_dir", tmp_path]
    with mock.patch.object(Path, "unlink", refuse):
        done = run(*words, code=2)
    assert "pretrain_32_step2.pth" in done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "pretrain_32_step12.pth").is_file()


def test_best_weights_are_the_best_or_the_run_fails(run, data, tmp_path):
    """The loss falls throughout; from step 4 on, the best weights cannot be saved."""
    words = [*WHOLE, "--val_data_path", data, "--save_best", "--data_path", data]
    words += ["--out_dir", tmp_path]
    count = 0

    def full(path):
        nonlocal count
        count += path.name == ".pretrain_32_best.pth.tmp"
        return path.name == ".pretrain_32_best.pth.tmp" and count > 1

    with fails(errno.ENOSPC, when=full):
        done = run(*words, code=2)
    scores = [line["val_loss"] for line in read_metrics(tmp_path) if "val_loss" in line]
    assert scores == sorted(scores, reverse=True)
    assert "pretrain_32_best.pth" in done.stderr


def test_an_earlier_runs_best_weights_are_not_tested(run, data, tmp_path):
    """They cannot be replaced; the test score must not be theirs."""
    test = ["--val_data_path", data, "--test_data_path", data, "--data_path", data]
    run(*WHOLE, *test, "--out_dir", tmp_path)
    theirs = read_metrics(tmp_path)[-1]["test_loss"]
    words = [*WHOLE, *test, "--epochs", 1, "--learning_rate", 1e-5, "--out_dir", tmp_path]
    with fails(errno.ENOSPC, when=lambda path: "_best" in path.name):
        run(*words, code=2)
    ours = [line["test_loss"] for line in read_metrics(tmp_path) if "test_loss" in line]
    assert theirs not in ours
