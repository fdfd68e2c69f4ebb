"""Runs that meet in one folder: one at a time writes a name, and no earlier one is lost."""

import errno
import json
import os
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from interruptions import (
    SHAPE,
    assert_same,
    at_call,
    eventually,
    killed,
    read_metrics,
    result,
    snapshot,
    started,
    wait_for_step,
    write_texts,
)
from test_train_full_sft import chats, write_chats
from tiny_models import random_model, save_tuned

from common import UserError, is_run_name
from inference import WeightSpec
from inference.loading import choose_weights, find_adapter
from model import LMConfig, resolve_weights
from training import Run, find_processes, lock_run, run_files

WHOLE = [
    *SHAPE, "--max_seq_len", 32, "--batch_size", 2, "--epochs", 2, "--learning_rate", 3e-3,
    "--val_ratio", 0.2, "--save_best", "--save_total_limit", 1, "--save_interval", 4,
    "--log_interval", 2,
]  # fmt: skip
NAME = "pretrain_32"

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "train.jsonl", 20)


@pytest.fixture(scope="module")
def finished(run, data, tmp_path_factory):
    """The folder of a run that has left a file of every kind."""
    folder = tmp_path_factory.mktemp("finished")
    run(*WHOLE, "--data_path", data, "--out_dir", folder)
    names = {path.name for path in folder.iterdir()}
    ends = (".pth", ".json", "_best.pth", "_resume.pth", "_resume.prev.pth")
    assert names > {f"{NAME}{end}" for end in ends}
    assert any("_step" in name for name in names)
    return folder


@pytest.fixture
def out(finished, tmp_path):
    """A copy of `finished`."""
    return shutil.copytree(finished, tmp_path / "out")


def kept(folder):
    """The contents of all files of runs, by where they are in a folder; tokenizers are shared."""
    contents = {path.relative_to(folder): value for path, (value, _) in snapshot(folder).items()}
    return {path: value for path, value in contents.items() if path.parts[0] != "tokenizers"}


# One at a time


def test_the_second_of_two_runs_is_refused_until_the_first_is_dead(run, root, finished, tmp_path):
    """The first has a loader process, which outlives it by seconds, and ends by SIGKILL."""
    data, out = write_texts(tmp_path / "train.jsonl", 100), tmp_path / "out"
    words = [
        *SHAPE, "--max_seq_len", 32, "--batch_size", 1, "--log_interval", 1, "--save_interval", 5,
        "--num_workers", 1, "--data_path", data, "--out_dir",
    ]  # fmt: skip
    with started(root, *words, out) as process:
        wait_for_step(process, out, 6)
        for more in ([], ["--resume"], ["--overwrite"]):
            error = run(*words, out, *more, code=2).stderr
            assert error.startswith(
                f"train_pretrain.py: error: {out / NAME}.pth: another run is writing it (process "
            )
            assert "--run_name" in error and error.count("\n") == 1
        assert not (out / "replaced").exists()
        assert process.poll() is None, process.stdout.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
        run(*words, out, "--resume")
        process.stdout.read()
    run(*words, tmp_path / "alone")
    assert_same(result(out), result(tmp_path / "alone"))
    assert not (out / f".{NAME}.lock").exists()


def test_runs_of_other_names_and_dry_runs_are_not_refused(run, data, finished, tmp_path):
    words = [*WHOLE, "--data_path", data, "--out_dir", tmp_path]

    def others():
        run(*words, "--dry_run")
        run(*words, "--run_name", "other")
        run(*words, "--dim", 64)
        run(*words, code=2)

    with at_call(1, Run, "add_step", others):
        run(*words)
    run(*words, "--dry_run")
    assert_same(result(tmp_path)[f"{NAME}.pth"], result(finished)[f"{NAME}.pth"])
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def lock(tmp_path):
    """The lock file of a run of `tmp_path`, left by one on another host."""
    path = tmp_path / f".{NAME}.lock"
    holder = {"host": "nodeb", "pid": os.getpid(), "kernel": "another", "process": "another"}
    path.write_text(json.dumps(holder), encoding="utf-8")
    return path


def without_locks(monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_files.fcntl, "flock", flock)


KINDS = [None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]
posix = pytest.mark.skipif(os.name == "nt", reason="flock")


@posix
@pytest.mark.parametrize("locks", KINDS)
def test_a_run_on_another_host_that_lives(run, data, lock, monkeypatch, locks):
    """Its system's locks are not seen here, only that the file's time of change goes on."""
    if locks:
        without_locks(monkeypatch, locks)
    before, beats = lock.read_bytes(), iter(range(10**18, 10**18 + 9))
    monkeypatch.setattr(run_files.time, "sleep", lambda _: os.utime(lock, ns=(0, next(beats))))
    words = [*WHOLE, "--data_path", data, "--out_dir", lock.parent]
    error = run(*words, code=2).stderr.splitlines()[-1]
    assert f"{NAME}.pth: another run is writing it (process {os.getpid()} on nodeb)" in error
    assert lock.read_bytes() == before
    assert list(lock.parent.iterdir()) == [lock]


@posix
@pytest.mark.parametrize("locks", KINDS)
def test_a_run_on_another_host_that_is_dead(run, data, finished, lock, monkeypatch, locks):
    if locks:
        without_locks(monkeypatch, locks)
    monkeypatch.setattr(run_files, "HEARTBEAT", 0.02)
    monkeypatch.setattr(run_files, "SILENCE", 0.1)
    done = run(*WHOLE, "--data_path", data, "--out_dir", lock.parent)
    assert f"{lock}: left by a run on nodeb" in done.stderr
    assert_same(result(lock.parent), result(finished))
    assert not lock.exists()


@posix
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"host": "nodeb"}'])
def test_a_lock_that_was_half_written_does_not_hold(tmp_path, content):
    path = tmp_path / ".x.lock"
    path.write_bytes(content)
    with lock_run(tmp_path / "x.pth", find_processes("cpu", ddp=False), dry_run=False):
        run_files.check_lock(tmp_path / "x.pth")


def test_a_lock_shows_that_its_run_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(run_files, "HEARTBEAT", 0.01)
    path = tmp_path / ".x.lock"
    with lock_run(tmp_path / "x.pth", find_processes("cpu", ddp=False), dry_run=False):
        for _ in range(2):
            os.utime(path, ns=(0, 0))
            eventually(lambda: path.stat().st_mtime_ns > 0)
    assert not path.exists()


def test_of_two_hosts_that_begin_in_one_moment_one_stays(tmp_path):
    """The other's identity is in the file that both made: it came later."""
    weights, path = tmp_path / "x.pth", tmp_path / ".x.lock"
    with lock_run(weights, find_processes("cpu", ddp=False), dry_run=False):
        run_files.check_lock(weights)
        other = {**json.loads(path.read_bytes()), "host": "nodeb", "process": "other"}
        path.write_text(json.dumps(other), encoding="utf-8")
        with pytest.raises(UserError, match="on nodeb"):
            run_files.check_lock(weights)
    assert path.exists()  # it is the other's


@posix
def test_a_holder_that_ends_while_another_waits_to_look(tmp_path, monkeypatch):
    """It removes the file that the other one has open: a lock on that would guard nothing."""
    path, opened, try_lock = tmp_path / ".x.lock", [], run_files._try_lock
    path.touch()

    def removed(file):
        opened.append(file)
        if len(opened) == 1:
            path.unlink()
        return try_lock(file)

    monkeypatch.setattr(run_files, "_try_lock", removed)
    world = find_processes("cpu", ddp=False)
    with lock_run(tmp_path / "x.pth", world, dry_run=False):
        assert len(opened) == 2 and opened[0].closed
        with pytest.raises(UserError), lock_run(tmp_path / "x.pth", world, dry_run=False):
            pass


def test_of_many_that_want_a_lock_at_once_one_has_it(tmp_path):
    world, inside, most = find_processes("cpu", ddp=False), [], []

    def take():
        for _ in range(40):
            try:
                with lock_run(tmp_path / "x.pth", world, dry_run=False):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except UserError:
                pass

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}


# Nothing is lost


def moved(out):
    """The folders that earlier runs were moved to, the first one first."""
    folders = sorted((out / "replaced").iterdir(), key=lambda path: (len(path.name), path.name))
    assert all(re.fullmatch(r"\w+-\d{8}-\d{6}(-\d+)?", path.name) for path in folders)
    return folders


def test_a_finished_run_makes_way_for_the_next(run, data, finished, out):
    """All its files are in the folder that is said, and every tool finds them there."""
    others = [f"{NAME}_fast.pth", f"{NAME}0.pth", f"{NAME}_moe.pth", "full_sft_32.pth", "notes.txt"]
    for name in others:
        (out / name).write_bytes(b"mine")
    older = out / f"{NAME}_resume.old.pth"  # which earlier versions left
    older.write_bytes(b"older")
    first = {**kept(finished), older.relative_to(out): b"older"}
    words = [*WHOLE, "--data_path", data, "--out_dir", out, "--seed", 1]
    done = run(*words)
    (folder,) = moved(out)
    assert done.stdout.splitlines().count(f"the earlier run {NAME} is moved to {folder}") == 1
    assert kept(folder) == first
    assert all((out / name).read_bytes() == b"mine" for name in others)
    assert len(read_metrics(out)) == len(read_metrics(folder))
    log = (out / "logs" / NAME / "training_log.txt").read_text(encoding="utf-8")
    assert log.count("validation data") == 1
    second = {path: content for path, content in kept(out).items() if path.parts[0] != "replaced"}
    run(*words, "--seed", 2)
    assert kept(moved(out)[0]) == first
    assert kept(moved(out)[1]).items() <= second.items()
    ask = ["--out_dir", folder, "--prompt", "red", "--temperature", 0, "--max_new_tokens", 4]
    old = run(*ask, script="eval_model.py").stdout
    ask[1] = finished
    assert run(*ask, script="eval_model.py").stdout == old
    again = [*WHOLE, "--data_path", data, "--out_dir", folder, "--resume"]
    assert "nothing to do" in run(*again).stdout


def test_what_writes_nothing_moves_nothing(run, data, out):
    before = snapshot(out)
    words = [*WHOLE, "--data_path", data, "--out_dir", out]
    run(*words, "--dry_run")
    run(*words, "--overwrite", "--dry_run")
    run(*words, "--n_layers", 2, code=2)
    run(*words, "--data_path", "nowhere.jsonl", code=2)
    run(*words, "--resume")
    assert before.items() <= snapshot(out).items()
    run(*words, "--resume", "--overwrite", "--epochs", 3)
    assert not (out / "replaced").exists()
    assert torch.load(out / f"{NAME}_resume.pth", weights_only=True)["state"]["epoch"] == 3


def test_overwrite_keeps_no_copy(run, data, finished, out):
    (out / f"{NAME}_step1000.pth").write_bytes(b"old")
    (out / f"{NAME}_fast.pth").write_bytes(b"mine")
    done = run(*WHOLE, "--data_path", data, "--out_dir", out, "--overwrite")
    assert f"--overwrite: the earlier run {NAME} is deleted\n" in done.stdout
    assert (out / f"{NAME}_fast.pth").read_bytes() == b"mine"
    (out / f"{NAME}_fast.pth").unlink()
    assert not (out / "replaced").exists()
    assert_same(result(out), result(finished))
    assert kept(out).keys() == kept(finished).keys()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_unfinished_run_is_named(run, data, tmp_path, overwrite):
    words = [*WHOLE, "--data_path", data, "--out_dir", tmp_path]
    with killed(6, Run, "add_step"):
        run(*words)
    done = run(*words, *["--overwrite"] * overwrite)
    line = f"{tmp_path / NAME}_resume.pth holds an unfinished run, at step 4: --resume goes on"
    assert line in done.stdout
    assert (tmp_path / "replaced").exists() != overwrite


def test_killed_in_the_middle_of_moving(run, data, finished, out):
    """Each file is in its old place or in the new one, and the next run moves the rest as well."""
    words, first = [*WHOLE, "--data_path", data, "--out_dir", out], kept(finished)
    total = len([path for path in out.iterdir() if path.is_file()]) + 1  # and the logs
    done = 0
    while done < total:
        with killed(2 if done < total - 1 else 1, shutil, "move"):
            run(*words)
        done += 1
        found = {}
        for folder in (out, *moved(out)):
            found |= {p: c for p, c in kept(folder).items() if p.parts[0] != "replaced"}
        assert found == first
    run(*words)
    assert_same(result(out), result(finished))


def test_a_folder_that_nothing_can_be_moved_to(run, data, out):
    (out / "replaced").write_text("mine", encoding="utf-8")
    before = snapshot(out)
    error = run(*WHOLE, "--data_path", data, "--out_dir", out, code=2).stderr
    assert f"--out_dir {out}: {out / 'replaced'}" in error and error.count("\n") == 1
    assert before.items() <= snapshot(out).items()


def test_an_adapter_makes_way_as_well(run, tokenizer, tmp_path):
    """Even one of another base, which could not be trained again."""
    data = write_chats(tmp_path / "chats.jsonl", chats(6))
    words = [*SHAPE, "--max_seq_len", 64, "--data_path", data, "--out_dir", tmp_path]
    before = []
    for seed in range(3):
        save_tuned(random_model(seed), tmp_path, tokenizer)
        run(*words, "--epochs", 1, script="train_lora.py")
        now = kept(tmp_path / "lora")
        for number, folder in enumerate(moved(tmp_path) if seed else []):
            assert kept(folder / "lora") == before[number]
        before.append(now)
    assert [path.name.partition("-")[0] for path in moved(tmp_path)] == ["identity_32"] * 2
    assert len({content[Path("identity_32.pth")] for content in before}) == 3


# Side by side


def test_runs_of_two_names_lie_side_by_side(run, data, finished, tmp_path):
    """What one leaves is what it leaves alone; every tool finds it by its name."""
    words = [*WHOLE, "--data_path", data, "--out_dir", tmp_path]
    run(*words)
    before = snapshot(tmp_path)
    named = [*words, "--run_name", "slow-2", "--learning_rate", 1e-4]
    with killed(6, Run, "add_step"):
        run(*named)
    assert "nothing to do" in run(*words, "--resume").stdout
    done = run(*named, "--resume")
    assert "--resume: going on after step 4" in done.stdout
    assert f"saved {tmp_path / NAME}_slow-2.pth\n" in done.stdout
    after = snapshot(tmp_path)
    assert {path: after[path] for path in before} == before
    ends = {path.name.removeprefix(f"{NAME}_slow-2") for path in tmp_path.glob(f"{NAME}_slow-2*")}
    assert ends == {path.name.removeprefix(NAME) for path in finished.glob(f"{NAME}*")}
    rates = [line["lr"] for line in read_metrics(tmp_path, f"{NAME}_slow-2") if "lr" in line]
    assert max(rates) <= 1e-4
    report = (tmp_path / "logs" / f"{NAME}_slow-2" / "report.md").read_text(encoding="utf-8")
    assert report.startswith(f"# {NAME}_slow-2\n")
    error = run(*words, "--resume", "--dim", 64, code=2).stderr
    assert f"{NAME}_resume.pth" in error

    ask = ["--out_dir", tmp_path, "--prompt", "red", "--temperature", 0, "--max_new_tokens", 4]
    said = {
        weight: run(*ask, "--weight", weight, script="eval_model.py").stdout
        for weight in ("slow-2", f"{NAME}_slow-2", tmp_path / f"{NAME}_slow-2.pth")
    }
    assert len(set(said.values())) == 1
    run(*named, "--from_weight", "slow-2", "--run_name", "third", "--epochs", 1)
    error = run(*words, "--from_weight", "fourth", "--run_name", "x", code=2).stderr
    assert f"--from_weight fourth: no file {tmp_path / 'fourth_32.pth'}" in error


def test_names_mean_files(tmp_path, tokenizer):
    """Of a stage the newest, of a file, of a run: the same to talk to and to train from."""
    names = ["full_sft_32", "full_sft_32_a", "full_sft_32_b", "dpo_32_a", "full_sft_32_moe_c"]
    names += ["below/full_sft_32", "below/grpo_32", "else/grpo_32_d", "else/grpo_32_d_best"]
    (tmp_path / "below").mkdir()
    (tmp_path / "else").mkdir()
    for age, name in enumerate(names):
        model = random_model(use_moe="moe" in name)
        path = save_tuned(model, tmp_path, tokenizer, name, name.partition("_3")[0])
        os.utime(path, (1e9 + age, 1e9 + age))
    (tmp_path / "full_sft_32.pth").rename(tmp_path / "public_512.pth")  # whose .json is not there
    os.utime(save_tuned(random_model(), tmp_path, tokenizer, "full_sft_32"), (1e9, 1e9))
    shape, spec = LMConfig(dim=32), {"out_dir": tmp_path, "tokenizer_path": tmp_path}
    meant = {
        "full_sft": "full_sft_32",  # though there is a newer one below
        "full_sft_32_a": "full_sft_32_a",
        "b": "full_sft_32_b",
        "c": "full_sft_32_moe_c",
        "grpo": "below/grpo_32",
        "d": "else/grpo_32_d",
        "public": "public_512",
        "public_512": "public_512",
    }

    def found(name, **shape):
        """The file that every tool takes."""
        ours = choose_weights(WeightSpec(weight=name, **spec, **shape))
        assert resolve_weights("--from_weight", name, tmp_path, shape) == ours
        return ours.relative_to(tmp_path).with_suffix("").as_posix()

    assert {name: found(name) for name in meant} == meant
    assert found("full_sft", dim=32, use_moe=False) == "full_sft_32"
    for flag in ("--from_weight", "--weight"):
        runs = ", ".join(str(tmp_path / f"{name}.pth") for name in ("dpo_32_a", "full_sft_32_a"))
        with pytest.raises(UserError, match=re.escape(f"{flag} a: name one of {runs}")):
            resolve_weights(flag, "a", tmp_path, {})
    for name in ("sft", "../full_sft", "best", "*", "nothing.pth"):
        with pytest.raises(UserError, match="no file"):
            found(name)
    with pytest.raises(UserError, match="no file"):
        found("c", use_moe=False)
    (tmp_path / "lora").mkdir()
    for name in ("it_32", "it_32_a", "you_me_64_b"):
        (tmp_path / "lora" / f"{name}.pth").touch()
    adapters = {"it": "it_32", "it_32_a": "it_32_a", "a": "it_32_a", "you_me_64_b": "you_me_64_b"}
    for name, file in adapters.items():
        assert find_adapter(WeightSpec(lora_name=name, **spec), shape).stem == file


@pytest.mark.parametrize("name", ["fast", "3e-4", "v2", "2024-07-30", "a-best", "试验", "Stepwise"])
def test_names_of_runs(name):
    assert is_run_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a_b",
        "512",
        "moe",
        "MoE",
        "best",
        "resume",
        "step100",
        "-x",
        "a/b",
        "../a",
        "a.b",
        "a b",
    ],
)
def test_names_that_files_end_in_for_other_reasons(run, data, tmp_path, name):
    """As `full_sft_512_best.pth`; or that are no part of a name."""
    words = ["--data_path", data, "--out_dir", tmp_path, f"--run_name={name}"]
    error = run(*SHAPE, *words, code=2).stderr
    assert error.startswith(f"train_pretrain.py: error: argument --run_name: {name!r}: ")
    assert not any(tmp_path.iterdir())
