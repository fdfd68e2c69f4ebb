"""Training on several sources: what is drawn, what is recorded, and that a run resumes exactly."""

import json
from unittest import mock

import pytest
import torch
from interruptions import SHAPE, assert_same, killed, read_metrics, result, write_texts
from test_train_full_sft import chat, known_of, write_chats

from dataset import shorten_rows
from dataset.mixture import Mixture
from training import Run

WORDS = [
    *SHAPE, "--max_seq_len", 32, "--batch_size", 2, "--epochs", 2, "--val_ratio", 0.2,
    "--save_interval", 2, "--log_interval", 1, "--eval_interval", 4, "--learning_rate", 1e-3,
]  # fmt: skip
VARIANTS = {
    "weights": [],
    "stop": ["--source_end", "stop"],
    "schedule": ["--mix_schedule", "{a}=0.1", "{b}=0.9", "--length_schedule", 8],
}

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two files, of which one has an `=` in its name, and a folder of code."""
    folder = tmp_path_factory.mktemp("sources")
    code = folder / "code"
    code.mkdir()
    for n in range(6):
        (code / f"f{n}.py").write_text(f"def f{n}(x):\n    return x + {n}\n", encoding="utf-8")
    return {
        "a": write_texts(folder / "a=0.5.jsonl", 12),
        "b": write_texts(folder / "b.jsonl", 40),
        "code": code,
    }


def words_of(sources, out, variant):
    shares = [f"{sources['a']}=0.3", f"{sources['b']}=0.5", f"{sources['code']}=0.2"]
    words = [str(word).format(**sources) for word in VARIANTS[variant]]
    return [*WORDS, *words, "--data_path", *shares, "--out_dir", out]


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_is_as_not_killed(run, sources, tmp_path, variant):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run(*words_of(sources, whole, variant))
    with killed(4, Run, "add_step"):
        run(*words_of(sources, parts, variant))
    run(*words_of(sources, parts, variant), "--resume")
    assert_same(result(parts), result(whole))
    figures = read_metrics(whole)
    lines = [line for line in figures if "loss" in line]
    shares = [[line.get(f"share/{n}", 0) for n in ("a=0.5", "b", "code")] for line in lines]
    assert all(sum(share) == pytest.approx(1) for share in shares)
    (last,) = [line for line in done.stdout.splitlines() if "target tokens by source" in line]
    drawn = [float(part.split()[-1].rstrip("%")) for part in last.split(", ")]
    if variant == "weights":
        assert drawn == pytest.approx([30, 50, 20], abs=6)
        assert "share 0.3 of the tokens" in done.stdout and "so it is repeated" in done.stdout
    if variant == "schedule":
        assert drawn == pytest.approx([20, 70, 20], abs=12)
        assert sum(s[1] for s in shares[:4]) < sum(s[1] for s in shares[-4:])
    assert {"val_loss/a=0.5", "val_loss/b", "val_loss/code", "val_loss"} <= figures[-1].keys()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--data_path", "{a}=0.5", "{b}"], "--data_path: each source needs a weight"),
        (["--data_path", "{a}=0.5", "{b}=0"], "--data_path: each source needs a weight"),
        (["--data_path", "{a}", "{a}"], "--data_path: a source is named twice"),
        (["--data_path", "{a}=-1", "{b}=1"], "a weight is at least 0"),
        (["--data_path", "{a}", "{b}", "--mix_schedule", "{a}=1"], "--mix_schedule: PATH=WEIGHT"),
        (["--data_path", "{a}=1", "--mix_schedule", "{a}=2"], "--mix_schedule needs several"),
        (
            ["--data_path", "{a}=1", "{b}=1", "--mix_schedule", "{code}=1"],
            "--mix_schedule: PATH=WEIGHT",
        ),
        (
            ["--data_path", "{a}=1", "{b}=1", "--mix_schedule", "{a}=2", "--max_minutes", 1],
            "--mix_schedule: its end is not known",
        ),
    ],
)
def test_mistakes_are_one_line(run, sources, tmp_path, words, named):
    words = [str(word).format(**sources) for word in words]
    done = run(*SHAPE, *words, "--out_dir", tmp_path, code=2)
    assert named in done.stderr and done.stderr.count("\n") == 1


def test_a_longer_run_goes_on_with_the_rows_that_are_left(run, sources, tmp_path):
    """Weights that change with another end would give other rows, some of them once more."""
    words, ends, set_total = words_of(sources, tmp_path, "schedule"), [], Mixture.set_total

    def note_end(mixture, tokens):
        ends.append(tokens)
        set_total(mixture, tokens)

    with mock.patch.object(Mixture, "set_total", note_end):
        with killed(4, Run, "add_step"):
            run(*words)
        run(*words, "--resume", "--epochs", 3)
    assert len(ends) == 2 and ends[0] == ends[1]


def test_rows_are_shortened_without_losing_a_target():
    """By hand: an item of 3 and one of 4 positions, and one of padding, in rows of 3."""
    names = ("input_ids", "targets", "loss_mask", "attention_mask")
    batch = {name: torch.arange(8)[None] for name in names}
    batch |= {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]]), "sample": torch.tensor([5])}
    short = shorten_rows(batch, 3)
    assert short["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 0]]
    assert short["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2], [0, 0, 0]]
    shorter = shorten_rows(batch, 2)["position_ids"]
    assert shorter.tolist() == [[0, 1], [0, 0], [0, 1], [0, 0]]
    assert short["sample"].tolist() == [5]
    assert shorten_rows(batch, 8) is batch


def test_pairs_of_two_sources(run, tmp_path):
    """Each has its reference, and the batches are of both."""
    text = write_texts(tmp_path / "text.jsonl", 4)
    model = [*SHAPE, "--max_seq_len", 64, "--out_dir", tmp_path, "--epochs", 1]
    run(*model, "--data_path", text)
    for name in "ab":
        pairs = [{"prompt": f"{name}{n}", "chosen": "yes", "rejected": "no"} for n in range(6)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    sources = ["--data_path", f"{tmp_path / 'a.jsonl'}=2", f"{tmp_path / 'b.jsonl'}=1"]
    words = [*model, "--from_weight", tmp_path / "pretrain_32.pth", *sources, "--batch_size", 4]
    done = run(*words, script="train_dpo.py")
    assert done.stdout.count("pairs in ") == 2
    assert "target tokens by source: a 66.67%, b 33.33%" in done.stdout


def test_a_mixture_of_conversations_chooses_its_settings(run, tmp_path):
    """Samples and examples come from both sources; the longest conversation is that of all."""
    long = write_chats(tmp_path / "long.jsonl", [chat("red", "blue", "green", "red")] * 9)
    short = write_chats(tmp_path / "short.jsonl", [chat("number 1", "number 2")] * 400)
    words = [*SHAPE, "--max_seq_len", 64, "--from_weight", "none", "--out_dir", tmp_path]
    words += ["--learning_rate", 1e-3, "--max_tokens", 200]
    paths = ["--data_path", f"{long}=0.5", f"{short}=0.5"]
    done = run(*words, *paths, script="train_full_sft.py").stdout
    config = json.loads((tmp_path / "logs/full_sft_32/config.json").read_text(encoding="utf-8"))
    assert f"chosen: --batch_size {config['arguments']['batch_size']} (" in done
    longest, examples = known_of(tmp_path / "full_sft_32.pth")
    assert longest["exchanges"] == 2 and examples == ["red", "number 1"]
    assert "sample 'red' → " in done and "sample 'number 1' → " in done
