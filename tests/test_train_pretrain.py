"""The script as users start it, on small files; by torchrun where several processes matter."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from rounding import LOSS, NORM, assert_same_training
from transformers import AutoTokenizer

from model import LMConfig, MiniMindLM

SHAPE = ["--dim", "32", "--n_layers", "2", "--device", "cpu"]


@pytest.fixture(autouse=True, scope="module")
def no_matplotlib():
    """Runs do without it, and drawing takes longer than everything else in a small one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "matplotlib.figure", None)
        yield


def write_lines(path, texts):
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts),
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """61 documents of very different lengths, from 3 to some 90 tokens."""
    words = ["red", "green", "blue", "一座山", "河流", "stone", "云"]
    texts = [
        " ".join(words[(i * k) % len(words)] for k in range(1, 2 + (7 * i) % 41)) for i in range(61)
    ]
    return write_lines(tmp_path_factory.mktemp("data") / "train.jsonl", texts)


def metrics(out_dir, name="pretrain_32"):
    path = out_dir / "logs" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


SPLIT = ["--max_seq_len", "32", "--log_interval", "1", "--save_interval", "1000", "--epochs", "2"]


@pytest.fixture(scope="module", params=[(False, "adamw"), (True, "muon")], ids=["dense", "moe"])
def splits(request, run, data, tmp_path_factory):
    """The same run as 1 process × 8, 1 × 2 × 4 and 2 × 2 × 2; rows divide by none of them."""
    results = {}
    moe, optimizer = request.param
    name = "pretrain_32_moe" if moe else "pretrain_32"
    for processes, batch, accumulation in [(1, 8, 1), (1, 2, 4), (2, 2, 2)]:
        out = tmp_path_factory.mktemp("split")
        run(
            *SHAPE, *SPLIT, "--data_path", data, "--out_dir", out, "--learning_rate", 1e-3,
            "--batch_size", batch, "--accumulation_steps", accumulation, "--use_moe", moe,
            "--optimizer", optimizer, processes=processes,
        )  # fmt: skip
        state = torch.load(out / f"{name}.pth", weights_only=True)
        results[processes, batch, accumulation] = metrics(out, name), state
    return results


def test_one_gradient_however_it_is_split(splits):
    (whole_metrics, whole), *others = splits.values()
    assert len(whole_metrics) > 20
    for split_metrics, split in others:
        assert len(split_metrics) == len(whole_metrics)
        for ours, theirs in zip(split_metrics, whole_metrics, strict=True):
            assert ours["tokens"] == theirs["tokens"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=LOSS)
            assert ours.get("aux_loss", 0) == pytest.approx(theirs.get("aux_loss", 0), rel=LOSS)
            # Which AdamW and clipping would make up for if it were a multiple of what it should be.
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=NORM)
        assert_same_training(split, whole, [line["lr"] for line in whole_metrics if "lr" in line])


def test_it_learns_and_balances_its_experts(splits):
    """Perfect balance costs alpha, 0.1, for each of the two layers, and nothing costs less."""
    for figures, _ in splits.values():
        assert figures[-1]["loss"] < figures[0]["loss"] - 0.5
        assert "aux_loss" not in figures[0] or 0.19 < figures[0]["aux_loss"] < 0.4


def test_every_token_is_used_in_every_epoch(splits, data, tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    texts = [json.loads(line)["text"] for line in data.read_text(encoding="utf-8").splitlines()]
    targets = sum(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])
    for split_metrics, _ in splits.values():
        assert split_metrics[-1]["tokens"] == 2 * targets


def test_the_first_step_by_hand(run, tmp_path, tokenizer_dir):
    """One document, one step: loss, gradient norm and the new weights, worked out here.

    AdamW's first step moves each weight by lr · g / (|g| + eps) after decay by lr · decay.
    """
    text = "The same words, 同样的话."
    data = write_lines(tmp_path / "one.jsonl", [text])
    run(
        *SHAPE, "--data_path", data, "--out_dir", tmp_path, "--warmup_iters", 0, "--seed", 7,
        "--grad_clip", 0.25, "--learning_rate", 1e-3, "--max_seq_len", 64, "--epochs", 1,
        "--optimizer", "adamw",
    )  # fmt: skip
    ids = torch.tensor([1, *AutoTokenizer.from_pretrained(tokenizer_dir)(text)["input_ids"], 2])
    torch.manual_seed(7)
    model = MiniMindLM(LMConfig(dim=32, n_layers=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:])
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    figures = metrics(tmp_path)[0]
    assert figures["loss"] == pytest.approx(loss.item(), rel=LOSS)
    assert figures["grad_norm"] == pytest.approx(norm.item(), rel=NORM)
    assert figures["lr"] == 1e-3
    expected = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad * min(1.0, 0.25 / norm.item())
        decay = 0.0 if "norm" in name or "tok_embeddings" in name else 0.1
        moved = 1e-3 * gradient / (gradient.abs() + 1e-8)
        expected[name] = before[name] * (1 - 1e-3 * decay) - moved
    after = torch.load(tmp_path / "pretrain_32.pth", weights_only=True)
    assert torch.equal(after.pop("output.weight"), after["tok_embeddings.weight"])
    assert_same_training(after, expected, [1e-3])


def test_a_repeated_text_is_learnt_and_continued(run, tmp_path):
    """Loss starts near ln(6400); at the end the model says the text by heart."""
    data = write_lines(tmp_path / "poem.jsonl", ["白日依山尽，黄河入海流。"] * 64)
    done = run(
        *SHAPE, "--data_path", data, "--val_data_path", data, "--out_dir", tmp_path,
        "--batch_size", 4, "--epochs", 30, "--learning_rate", 1e-2, "--max_seq_len", 48,
    )  # fmt: skip
    assert "saved" in done.stdout
    figures = metrics(tmp_path)
    assert figures[0]["loss"] > 2
    assert figures[-1]["val_loss"] < 0.1
    bits = figures[-1]["val_loss"] / math.log(2)
    tokens = figures[-1]["tokens"] / 30 / 64
    assert figures[-1]["val_bits_per_byte"] == pytest.approx(bits * tokens / 36, rel=LOSS)
    said = run(
        "--out_dir", tmp_path, "--dim", 32, "--prompt", "白日", "--temperature", 0,
        script="eval_model.py",
    )  # fmt: skip
    assert said.stdout == "白日依山尽，黄河入海流。\n"


def test_continued_pretraining_starts_from_the_weights(run, data, tmp_path):
    common = [*SHAPE, "--data_path", data, "--batch_size", 8, "--max_seq_len", 32]
    run(*common, "--out_dir", tmp_path / "a", "--epochs", 8, "--learning_rate", 3e-3)
    weights = tmp_path / "a" / "pretrain_32.pth"
    run(*common, "--out_dir", tmp_path / "b", "--from_weight", weights, "--log_interval", 1)
    last, first = metrics(tmp_path / "a")[-1], metrics(tmp_path / "b")[0]
    assert first["loss"] == pytest.approx(last["loss"], abs=0.5)
    assert first["loss"] < 6


def test_unpacked_rows_and_checkpointing_give_the_same_losses(run, data, tmp_path):
    """Rows differ between packed and unpacked, but the validation loss is over all tokens."""
    common = [*SHAPE, "--data_path", data, "--val_data_path", data, "--learning_rate", 1e-9]
    losses = []
    for name, words in [
        ("packed", []),
        ("unpacked", ["--no-packing"]),
        ("plain", ["--no-flash_attn", "--gradient_checkpointing"]),
    ]:
        out = tmp_path / name
        run(*common, *words, "--out_dir", out, "--max_seq_len", 64)
        losses.append(metrics(out)[-1]["val_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=LOSS)


def test_wandb_offline(run, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(
        *SHAPE, "--data_path", data, "--out_dir", tmp_path, "--max_seq_len", "32", "--use_wandb",
        fresh=True,
    )  # fmt: skip
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
