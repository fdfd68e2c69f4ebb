"""A run that is killed and resumed ends as if it had not been, or says why it cannot go on."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from interruptions import (
    SHAPE,
    assert_same,
    at_call,
    evaluating,
    killed,
    learning,
    read_metrics,
    read_resume,
    result,
    saving,
    snapshot,
    write_texts,
)

from dataset import RowBatches
from model import MiniMindLM
from training import Run
from training.resume import Resume, TrainState, save_resume
from training.resume import read_resume as find_valid

ROWS = [*SHAPE, "--max_seq_len", "32", "--batch_size", "2", "--accumulation_steps", "2"]
ROWS += ["--optimizer", "adamw"]
WHOLE = [
    *ROWS, "--epochs", "3", "--learning_rate", "3e-3", "--dropout", "0.2", "--val_ratio", "0.2",
    "--save_best", "--save_total_limit", "2", "--keep_every", "5", "--save_interval", "3",
    "--eval_interval", "4", "--log_interval", "2",
]  # fmt: skip
PATIENCE = ["--early_stopping_min_delta", "10", "--early_stopping_patience"]
VARIANTS = {
    "dense": [],
    "moe": ["--use_moe", "--no-packing", "--optimizer", "muon"],
    "workers": ["--num_workers", "1", "--save_dtype", "float16"],
    # Ended by the second evaluation without progress, after step 6.
    "patience": [*PATIENCE, "2", "--eval_interval", "2"],
}


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "train.jsonl", 16)


@pytest.fixture(scope="module")
def unbroken(run, data, tmp_path_factory):
    """Gives what a variant of the run left that nothing interrupted."""
    results = {}

    def get(variant="dense"):
        if variant not in results:
            out = tmp_path_factory.mktemp("unbroken")
            run(*WHOLE, *VARIANTS[variant], "--data_path", data, "--out_dir", out)
            name = "pretrain_32_moe" if variant == "moe" else "pretrain_32"
            results[variant] = result(out, name)
        return results[variant]

    return get


@pytest.fixture(scope="module")
def interrupted(run, data, tmp_path_factory):
    """Folder of a run that was killed in step 8, with resume files of steps 6 and 5."""
    out = tmp_path_factory.mktemp("interrupted")
    with killed(8, Run, "add_step"):
        run(*WHOLE, "--data_path", data, "--out_dir", out)
    return out


@pytest.fixture
def out(interrupted, tmp_path):
    """A copy of `interrupted`."""
    return shutil.copytree(interrupted, tmp_path / "out")


STEPS = [(n, Run, "add_step", {}) for n in (2, 4, 1, 3, 5)]
WINDOWS = [(n, MiniMindLM, "forward", {"when": learning}) for n in (2, 14, 1, 8)]
EVALUATIONS = [(n, MiniMindLM, "forward", {"when": evaluating}) for n in (1, 2, 3)]
# A save makes six files, each under another name first, and renames the resume file before it.
SAVES = [(n, Path, "replace", {"when": saving}) for n in (2, 4, 5, 7, 8, 12, 1, 6, 3)]
REMOVALS = [(n, Path, "unlink", {"when": lambda path: "_step" in path.name}) for n in (2, 1)]
AFTER_SAVES = [(n, Run, "save", {"after": True}) for n in (1, 2)]


@pytest.mark.parametrize(
    ("variant", "kills"),
    [
        pytest.param("dense", STEPS, id="steps"),
        pytest.param("dense", WINDOWS, id="windows"),
        pytest.param("dense", EVALUATIONS, id="evaluations"),
        pytest.param("dense", SAVES, id="saves"),
        pytest.param("dense", REMOVALS + AFTER_SAVES, id="removals"),
        pytest.param("moe", [STEPS[1], WINDOWS[1]], id="moe"),
        pytest.param("workers", [WINDOWS[1]], id="workers"),
        pytest.param("patience", [(6, Run, "add_step", {})], id="patience"),
    ],
)
def test_killed_and_resumed_is_as_not_killed(run, data, unbroken, tmp_path, variant, kills):
    """Weights of every kind, resume file and metrics, after kill upon kill in the same run."""
    words = [*WHOLE, *VARIANTS[variant], "--data_path", data, "--out_dir", tmp_path]
    for n, owner, name, how in kills:
        with killed(n, owner, name, **how):
            run(*words, "--resume")
    run(*words, "--resume")
    name = "pretrain_32_moe" if variant == "moe" else "pretrain_32"
    assert_same(result(tmp_path, name), unbroken(variant))


def test_a_finished_run_is_left_alone(run, data, tmp_path):
    words = [*WHOLE, "--test_data_path", data, "--data_path", data, "--out_dir", tmp_path]
    run(*words)
    before = snapshot(tmp_path)
    done = run(*words, "--resume")
    assert "nothing to do" in done.stdout
    assert snapshot(tmp_path) == before


def test_a_run_that_stopped_early_is_left_alone(run, data, tmp_path):
    words = [*WHOLE, *PATIENCE, 1, "--data_path", data, "--out_dir", tmp_path]
    assert "stopped early" in run(*words).stdout
    before = snapshot(tmp_path)
    assert "nothing to do" in run(*words, "--resume").stdout
    assert snapshot(tmp_path) == before


def test_nothing_to_resume_starts_a_run(run, data, unbroken, tmp_path):
    done = run(*WHOLE, "--data_path", data, "--out_dir", tmp_path, "--resume")
    assert re.search("--resume: nothing .* new run", done.stdout)
    assert_same(result(tmp_path), unbroken())


class Mischief:
    """Pickled, it makes a folder where it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100_000])


def flip(path):
    contents = bytearray(path.read_bytes())
    middle = len(contents) // 2  # tensors are nearly all of the file
    contents[middle] = (contents[middle] + 1) % 256
    path.write_bytes(contents)


def empty(path):
    path.write_bytes(b"")


def pickle_code(path):
    path.write_bytes(pickle.dumps(Mischief(path.parent / "mischief")))


def save_code(path):
    torch.save({"format": 1, "state": Mischief(path.parent / "mischief")}, path)


def replace_by_weights(path):
    shutil.copy(path.with_name("pretrain_32.pth"), path)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_resume_file_costs_one_interval(run, data, unbroken, out, damage):
    newest = out / "pretrain_32_resume.pth"
    damage(newest)
    done = run(*WHOLE, "--data_path", data, "--out_dir", out, "--resume")
    assert str(newest) in done.stdout
    assert "going on after step 5" in done.stdout
    assert_same(result(out), unbroken())


@pytest.mark.parametrize("damage", [empty, pickle_code, save_code, replace_by_weights])
def test_what_is_no_resume_file_is_passed_over(run, data, out, damage):
    newest = out / "pretrain_32_resume.pth"
    damage(newest)
    before = {path: contents for path, contents in snapshot(out).items() if path.suffix == ".pth"}
    done = run(*WHOLE, "--data_path", data, "--out_dir", out, "--resume", "--dry_run")
    assert str(newest) in done.stdout
    assert "going on after step 5" in done.stdout
    assert not (out / "mischief").exists()
    assert before.items() <= snapshot(out).items()


def test_two_damaged_resume_files_start_a_run(run, data, unbroken, out):
    paths = [out / "pretrain_32_resume.pth", out / "pretrain_32_resume.prev.pth"]
    for path in paths:
        flip(path)
    before = {path.relative_to(out): kept for path, kept in snapshot(out).items()}
    done = run(*WHOLE, "--data_path", data, "--out_dir", out, "--resume")
    for path in paths:
        assert str(path) in done.stdout
    assert re.search("--resume: nothing .* new run", done.stdout)
    (moved,) = (out / "replaced").iterdir()
    after = {path.relative_to(moved): kept for path, kept in snapshot(moved).items()}
    moving = {path: kept for path, kept in before.items() if path.parts[0] != "tokenizers"}
    assert moving.items() <= after.items()
    assert_same(result(out), unbroken())


def test_a_damaged_resume_file_never_replaces_the_good_one(run, data, unbroken, out):
    """Killed in the save after the damage, at each of its renames."""
    words = [*WHOLE, "--data_path", data, "--out_dir", out, "--resume"]
    for n in range(1, 7):
        flip(out / "pretrain_32_resume.pth")
        with killed(n, Path, "replace", when=saving):
            run(*words)
        assert any(is_valid(path) for path in out.glob("pretrain_32_resume*.pth")), n
    run(*words)
    assert_same(result(out), unbroken())


def is_valid(path):
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False


def test_any_flipped_bit_is_noticed_or_harmless(tmp_path):
    """In the pickled part, in the directory of the file and in the headers of its entries."""
    weights, path = tmp_path / "x.pth", tmp_path / "x_resume.pth"
    tensors = {f"tensor{i}": torch.arange(i, 20.0) for i in range(5)}
    state = TrainState(run_id="1", rows_per_step=4, step=3)
    save_resume(weights, Resume(state, {}, {}, tensors, {}, {}, [], "newest"))
    good = path.read_bytes()
    generator = random.Random(0)
    for _ in range(1500):
        bad = bytearray(good)
        place = generator.randrange(len(good))
        bad[place] ^= 1 << generator.randrange(8)
        path.unlink()
        path.write_bytes(bad)
        contents, notes = find_valid(weights)
        if contents is None:
            assert str(path) in notes[0]
            assert len(notes[0].splitlines()) == 1
        else:
            assert contents.state == state, place
            assert_same(contents.model, tensors, str(place))


def other_ids(tokenizer_dir, folder):
    """A tokenizer of the same size and pieces that gives other ids: the upper half backwards."""
    shutil.copytree(tokenizer_dir, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    upper = sorted(vocabulary.values())[len(vocabulary) // 2 :]
    backwards = dict(zip(upper, reversed(upper), strict=True))
    for token, id_ in vocabulary.items():
        vocabulary[token] = backwards.get(id_, id_)
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["--n_layers", "3"],
        ["--dim", "64"],
        ["--use_moe"],
        ["--seed", "1"],
        ["--max_seq_len", "33"],
        ["--val_ratio", "0.3"],
        ["--no-packing"],
        ["--optimizer", "muon"],
        ["--data_path", "other.jsonl"],
        ["--tokenizer_path", "tokenizer"],
        ["--n_layers", "2", "--seed", "2", "--data_path", "other.jsonl"],
    ],
    ids=" ".join,
)
def test_what_may_not_change_is_named(run, data, out, tmp_path, tokenizer_dir, words):
    paths = {
        "other.jsonl": write_texts(tmp_path / "other.jsonl", 17),
        "tokenizer": other_ids(tokenizer_dir, tmp_path / "tokenizer"),
    }
    changed = [paths.get(word, word) for word in words]
    before = snapshot(out)
    done = run(*WHOLE, "--data_path", data, "--out_dir", out, "--resume", *changed, code=2)
    lines = done.stderr.splitlines()
    flags = [word.replace("--no-", "--") for word in words if word.startswith("--")]
    for flag in flags:
        assert sum(flag in re.findall(r"--\w+", line) for line in lines) == 1, done.stderr
    assert len(lines) <= len(flags) + 1, done.stderr  # and what to do
    assert snapshot(out) == before


def test_a_file_from_before_there_was_a_choice_of_optimizers(run, data, unbroken, out):
    """It holds AdamW's moments."""
    path = out / "pretrain_32_resume.pth"
    contents = torch.load(path, weights_only=True)
    for flag in ("optimizer", "lr_scale", "weight_decay_for"):
        del contents["arguments"][flag], contents["identity"][f"--{flag}"]
    torch.save(contents, path)
    words = [*WHOLE, "--data_path", data, "--out_dir", out, "--resume"]
    done = run(*words, "--optimizer", "muon", code=2)
    assert done.stderr.count("--optimizer muon: adamw in the run to resume") == 1
    run(*words, "--optimizer", "adamw")
    assert_same(result(out), unbroken())


@pytest.mark.parametrize(("changed", "rate"), [([], 3e-3), (["--learning_rate", 1e-3], 1e-3)])
def test_a_muon_run_from_before_the_embedding_had_a_rate_of_its_own(
    run, data, tmp_path, changed, rate
):
    """The embedding was in one group with the norms, and keeps their rate."""
    words = [*WHOLE, "--data_path", data, "--out_dir", tmp_path, "--optimizer", "muon"]
    with killed(5, Run, "add_step"):
        run(*words)
    path = tmp_path / "pretrain_32_resume.pth"
    contents = torch.load(path, weights_only=True)
    matrices, embedding, norms = contents["optimizer"]["param_groups"]
    assert embedding["initial_lr"] == pytest.approx(3 * norms["initial_lr"])
    bare = {**norms, "params": embedding["params"] + norms["params"]}
    contents["optimizer"]["param_groups"] = [matrices, bare]
    torch.save(contents, path)
    run(*words, "--resume", *changed)
    groups = read_resume(tmp_path)["optimizer"]["param_groups"]
    assert [group["initial_lr"] for group in groups] == pytest.approx([rate] * 3)


def test_the_same_data_elsewhere(run, data, unbroken, out, tmp_path):
    elsewhere = shutil.copy(data, tmp_path / "moved.jsonl")
    run(*WHOLE, "--data_path", elsewhere, "--out_dir", out, "--resume")
    assert_same(result(out), unbroken())


def test_what_may_change_is_said_and_takes_effect(run, data, unbroken, out):
    changed = ["--learning_rate", 1e-4, "--weight_decay", 0.05, "--beta1", 0.8, "--beta2", 0.9]
    done = run(*WHOLE, "--data_path", data, "--out_dir", out, "--resume", *changed)
    for line in (
        "--learning_rate 0.0001 (was 0.003)",
        "--weight_decay 0.05 (was 0.1)",
        "--beta1 0.8 (was 0.9)",
        "--beta2 0.9 (was 0.95)",
    ):
        assert line in done.stdout
    rates = [line["lr"] for line in read_metrics(out) if "lr" in line]
    before = [line["lr"] for line in unbroken()["metrics.jsonl"] if "lr" in line]
    assert rates[:3] == before[:3]
    assert max(rates[3:]) <= 1e-4
    decayed, bare = read_resume(out)["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], bare["weight_decay"]) == (0.05, 0.0)
    assert tuple(decayed["betas"]) == tuple(bare["betas"]) == (0.8, 0.9)


@pytest.mark.parametrize("step", [1, 3])
def test_a_new_run_killed_before_its_first_save(run, data, unbroken, out, step):
    """The run that it was to replace goes on from where it was moved; so does a new one here."""
    words = [*WHOLE, "--data_path", data]
    with killed(step, Run, "add_step"):
        run(*words, "--out_dir", out)
    (moved,) = (out / "replaced").iterdir()
    for folder in (moved, out):
        run(*words, "--out_dir", folder, "--resume")
        assert_same(result(folder), unbroken())


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def test_other_batches_go_on_at_the_same_row(run, tmp_path, monkeypatch):
    """Each epoch takes each row once, in the order of a run without changes; lr falls by rows."""
    data = write_texts(tmp_path / "train.jsonl", 24)
    taken = []
    rows_of = RowBatches.__iter__

    def record(batches):
        for rows in rows_of(batches):
            taken.extend((batches.epoch, row) for row in rows)
            yield rows

    monkeypatch.setattr(RowBatches, "__iter__", record)
    words = [
        *SHAPE, "--max_seq_len", 32, "--epochs", 2, "--log_interval", 1, "--lr_decay", "linear",
        "--warmup_iters", 0, "--learning_rate", 1e-3, "--min_lr", 1e-4, "--data_path", data,
    ]  # fmt: skip
    run(*words, "--batch_size", 2, "--accumulation_steps", 2, "--out_dir", tmp_path / "whole")
    whole, expected = list(taken), read_metrics(tmp_path / "whole")[-1]["tokens"]
    n_rows = len(whole) // 2  # of an epoch
    assert sorted(whole) == [(epoch, row) for epoch in (0, 1) for row in range(n_rows)]

    taken.clear()
    out = ["--out_dir", tmp_path / "parts", "--resume"]
    seen = []  # rows before each step
    for batch, accumulation, steps in [(2, 2, 3), (3, 1, 2), (5, 2, 3), (1, 3, None)]:
        split = ["--batch_size", batch, "--accumulation_steps", accumulation]
        before = len(taken)
        if steps is None:
            run(*words, *split, *out)
        else:
            with at_call(steps, Run, "add_step", stop, after=True):
                run(*words, *split, *out, code=143)
        for epoch in (0, 1):
            rest = range(max(before, epoch * n_rows), min(len(taken), (epoch + 1) * n_rows))
            seen += rest[:: batch * accumulation]
    assert taken == whole
    figures = read_metrics(tmp_path / "parts")
    assert figures[-1]["tokens"] == expected
    per_epoch = -(-n_rows // 4)  # steps of the batch that the run began with
    assert [line["lr"] for line in figures] == pytest.approx(
        [1e-3 - 9e-4 * (n // n_rows * per_epoch + n % n_rows / 4) / (2 * per_epoch) for n in seen]
    )


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--save_total_limit"], [6, 9, 12]),
        (["--keep_every", "5"], [5, 10]),
        (["--keep_every", "6", "--save_total_limit", "1"], [6, 9, 12]),
    ],
    ids=str,
)
def test_numbered_weights(run, data, tmp_path, words, kept):
    """Saves at 3, 6, 9 and 12; step 1000 is an earlier run's, which makes way."""
    earlier = tmp_path / "pretrain_32_step1000.pth"
    earlier.write_bytes(b"earlier")
    common = [*ROWS, "--epochs", 3, "--val_ratio", 0.2, "--save_interval", 3, "--data_path", data]
    common += ["--out_dir", tmp_path, *words]
    with killed(8, Run, "add_step"):
        run(*common)
    run(*common, "--resume")
    assert read_resume(tmp_path)["state"]["step"] == 12
    files = {f"pretrain_32_step{n}.{kind}" for n in kept for kind in ("pth", "json")}
    assert {path.name for path in tmp_path.glob("*_step*")} == files
    (moved,) = tmp_path.glob(f"replaced/*/{earlier.name}")
    assert moved.read_bytes() == b"earlier"
