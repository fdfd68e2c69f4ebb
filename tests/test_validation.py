"""Validation, the best weights, early stopping, the test score, and the record of a run."""

import json
import math
import re
import sys
from collections import Counter
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dataset import PretrainDataset
from model import LMConfig, MiniMindLM

BASE = [
    "--dim", "32", "--n_layers", "2", "--device", "cpu", "--optimizer", "adamw",
    "--learning_rate", "5e-4", "--epochs", "1",
]  # fmt: skip
WORDS = ["red", "green", "blue", "一座山", "河流", "stone", "云"]


@pytest.fixture(autouse=True, scope="module")
def no_matplotlib():
    """Runs do without it, and drawing takes longer than everything else in a small one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "matplotlib.figure", None)
        yield


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def documents(count, first=0):
    """Texts of 1 to 17 words, no two of them the same."""
    return [
        " ".join([f"number {i}", *(WORDS[i * k % 7] for k in range(1, 1 + (5 * i) % 17))])
        for i in range(first, first + count)
    ]


def metrics(out, name="pretrain_32"):
    path = out / "logs" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluations(out):
    return [m for m in metrics(out) if "val_loss" in m]


def weights(out, kind=""):
    return torch.load(out / f"pretrain_32{kind}.pth", weights_only=True)


def same(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@torch.no_grad()
def by_hand(state, texts, tokenizer, row=64, **shape):
    """Mean loss, perplexity and bits per byte: each text alone, cut where it is longer than a row.

    Without batches, padding and packing, in float64 sums.
    """
    model = MiniMindLM(LMConfig(dim=32, n_layers=2, **shape)).eval()
    model.load_state_dict(state)
    nats = tokens = 0
    for text in texts:
        ids = torch.tensor([1, *tokenizer(text)["input_ids"], 2])
        for x, y in zip(ids[:-1].split(row), ids[1:].split(row), strict=True):
            nats += F.cross_entropy(model(x[None]).logits[0].double(), y, reduction="sum").item()
            tokens += len(y)
    text_bytes = sum(len(text.encode("utf-8")) for text in texts)
    return nats / tokens, math.exp(nats / tokens), nats / math.log(2) / text_bytes


def scores(line, kind="val", name=""):
    return tuple(line[f"{kind}_{unit}{name}"] for unit in ("loss", "perplexity", "bits_per_byte"))


# The figures


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_the_scores_by_hand(run, tmp_path, tokenizer, use_moe):
    """After some training, on texts shorter and longer than a row."""
    val = [*documents(12, first=500), "云河" * 150, "green " * 64, "green " * 63]
    run(
        *BASE, "--data_path", write_lines(tmp_path / "train.jsonl", documents(40)),
        "--val_data_path", write_lines(tmp_path / "val.jsonl", val), "--use_moe", use_moe,
        "--out_dir", tmp_path, "--max_seq_len", 64, "--batch_size", 4, "--learning_rate", 1e-2,
        "--save_interval", 1000,
    )  # fmt: skip
    name = "pretrain_32_moe" if use_moe else "pretrain_32"
    state = torch.load(tmp_path / f"{name}.pth", weights_only=True)
    last = metrics(tmp_path, name)[-1]
    assert scores(last) == pytest.approx(by_hand(state, val, tokenizer, use_moe=use_moe), rel=1e-5)
    assert scores(last)[0] < 8


@pytest.fixture(scope="module")
def val_texts():
    return [*documents(23, first=500), "云河" * 150]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("batch", [1, 5, 64])
def test_the_same_figure_for_any_batches(run, tmp_path, tokenizer, val_texts, packing, batch):
    """A learning rate of 1e-12 leaves the model as it is, whatever it is trained on."""
    run(
        *BASE, "--data_path", write_lines(tmp_path / "train.jsonl", documents(2)),
        "--val_data_path", write_lines(tmp_path / "val.jsonl", val_texts), "--out_dir", tmp_path,
        "--max_seq_len", 64, "--learning_rate", 1e-12, "--batch_size", batch, "--packing", packing,
    )  # fmt: skip
    torch.manual_seed(42)
    untrained = MiniMindLM(LMConfig(dim=32, n_layers=2)).state_dict()
    (line,) = evaluations(tmp_path)
    assert scores(line) == pytest.approx(by_hand(untrained, val_texts, tokenizer), rel=1e-5)


def test_each_set_and_all_together(run, tmp_path, tokenizer):
    sets = {"zh": ["山水之间", "云" * 40] * 3, "en": documents(9, first=500), "other": ["17 + 4"]}
    paths = {name: write_lines(tmp_path / f"{name}.jsonl", sets[name]) for name in sets}
    run(
        *BASE, "--data_path", write_lines(tmp_path / "train.jsonl", documents(12)),
        "--val_data_path", f"zh={paths['zh']}", f"en={paths['en']}", paths["other"],
        "--out_dir", tmp_path, "--max_seq_len", 64, "--batch_size", 4, "--learning_rate", 1e-2,
    )  # fmt: skip
    (line,) = evaluations(tmp_path)
    state = weights(tmp_path)
    for name, texts in sets.items():
        expected = by_hand(state, texts, tokenizer)
        assert scores(line, name=f"/{name}") == pytest.approx(expected, rel=1e-5)
    # All together is as if they were one file: longer sets count more.
    expected = by_hand(state, [text for texts in sets.values() for text in texts], tokenizer)
    assert scores(line) == pytest.approx(expected, rel=1e-5)
    report = (tmp_path / "logs" / "pretrain_32" / "report.md").read_text(encoding="utf-8")
    for name in sets:
        assert re.search(rf"\| {name} \| {line[f'val_loss/{name}']:.4f}, ", report)


@pytest.mark.parametrize(("texts", "expected"), [(10, [2, 4, 5]), (8, [2, 4])])
def test_it_is_evaluated_at_the_interval_and_once_at_the_end(run, tmp_path, texts, expected):
    run(
        *BASE, "--data_path", write_lines(tmp_path / "train.jsonl", documents(texts)),
        "--val_data_path", write_lines(tmp_path / "val.jsonl", ["red"]), "--out_dir", tmp_path,
        "--max_seq_len", 64, "--no-packing", "--batch_size", 2, "--eval_interval", 2,
    )  # fmt: skip
    assert [m["step"] for m in evaluations(tmp_path)] == expected


def test_watching_changes_nothing(run, tmp_path):
    """Not even the noise of dropout: evaluations take no random numbers and leave train mode on."""
    data = write_lines(tmp_path / "train.jsonl", documents(24))
    common = [
        *BASE, "--data_path", data, "--max_seq_len", 64, "--batch_size", 2, "--dropout", 0.2,
        "--log_interval", 1,
    ]  # fmt: skip
    run(*common, "--out_dir", tmp_path / "blind")
    run(*common, "--out_dir", tmp_path / "seeing", "--val_data_path", data, "--eval_interval", 1)
    assert same(weights(tmp_path / "blind"), weights(tmp_path / "seeing"))


# --val_ratio


@pytest.mark.parametrize(
    ("count", "ratio", "held_out"),
    [(60, 0.1, 6), (61, 0.1, 6), (3, 0.001, 1), (2, 0.5, 1), (2, 0.999, 1), (10, 0.95, 9)],
)
def test_a_split_shares_nothing_and_loses_nothing(tmp_path, tokenizer, count, ratio, held_out):
    """With bad lines between the good ones; parts are told apart by line numbers and tokens."""
    path, texts = tmp_path / "data.jsonl", [*documents(count - 1), "green " * 30]
    lines = ["bad"] + [line for t in texts for line in (json.dumps({"text": t}), "bad")]
    path.write_text("\n".join(lines), encoding="utf-8")
    whole = PretrainDataset(path, tokenizer, 9, skip_bad_lines=True)
    parts = whole.split(ratio)
    assert [part.n_documents for part in parts] == [count - held_out, held_out]
    seen = []
    for part in parts:
        assert part.n_documents < whole.n_documents
        targets, numbers = {}, []
        for i in range(len(part)):
            numbers.append(part.line_number(i))
            targets.setdefault(numbers[-1], []).extend(part[i][1].tolist())
        assert numbers == sorted(numbers)  # in file order
        for number, ids in targets.items():
            text = json.loads(lines[number - 1])["text"]
            assert ids == [*tokenizer(text)["input_ids"], 2]
        texts_here = [json.loads(lines[number - 1])["text"] for number in targets]
        assert part.n_tokens == sum(map(len, targets.values()))
        assert part.text_bytes == sum(len(text.encode("utf-8")) for text in texts_here)
        assert part.lengths().tolist() == [len(part[i][0]) for i in range(len(part))]
        seen += targets
    assert sorted(seen) == list(range(2, 2 * count + 1, 2))
    assert sum(part.n_tokens for part in parts) == whole.n_tokens
    assert sum(part.text_bytes for part in parts) == whole.text_bytes


def test_a_split_is_not_the_end_of_the_file(tmp_path, tokenizer):
    """Files are often sorted: the held-out texts come from all of it."""
    path = write_lines(tmp_path / "data.jsonl", documents(100))
    _, held_out = PretrainDataset(path, tokenizer, 64).split(0.2)
    numbers = [held_out.line_number(i) for i in range(len(held_out))]
    assert sum(number <= 50 for number in numbers) in range(4, 17)


def test_what_is_held_out_is_not_trained_on(run, tmp_path, tokenizer, monkeypatch):
    """Which texts were trained on is read from the model's inputs, for two seeds."""
    texts = documents(40)
    data = write_lines(tmp_path / "data.jsonl", texts)
    inputs, forward = [], MiniMindLM.forward

    def spied(model, input_ids, attention_mask=None, **kwargs):
        if model.training:
            inputs.extend(
                tuple(row[mask.bool()].tolist())
                for row, mask in zip(input_ids, attention_mask, strict=True)
            )
        return forward(model, input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(MiniMindLM, "forward", spied)
    text_of = {(1, *tokenizer(text)["input_ids"]): text for text in texts}
    held_out = []
    for seed in (1, 2):
        inputs.clear()
        out = tmp_path / f"{seed}"
        run(
            *BASE, "--data_path", data, "--val_ratio", 0.15, "--out_dir", out, "--seed", seed,
            "--max_seq_len", 64, "--no-packing", "--batch_size", 4, "--epochs", 2,
        )  # fmt: skip
        trained = Counter(text_of[ids] for ids in inputs)
        assert set(trained.values()) == {2}  # each text once in each epoch
        held_out.append([text for text in texts if text not in trained])
        assert len(held_out[-1]) == 6
        last_evaluation = evaluations(out)[-1]
        expected = by_hand(weights(out), held_out[-1], tokenizer)
        assert scores(last_evaluation) == pytest.approx(expected, rel=1e-5)
        tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in trained)
        assert last_evaluation["tokens"] == 2 * tokens
    assert held_out[0] == held_out[1]


# The best weights


@pytest.fixture(scope="module")
def overfitted(run, tmp_path_factory):
    """A run that learns 12 texts by heart, so that the same words in reverse get worse soon."""
    folder = tmp_path_factory.mktemp("overfitted")
    reverse = [" ".join(text.split()[::-1]) for text in documents(12)]
    sets = {"train": documents(12), "val": reverse[::2], "test": reverse[1::2]}
    paths = {name: write_lines(folder / f"{name}.jsonl", texts) for name, texts in sets.items()}
    words = [
        *BASE, "--data_path", paths["train"], "--val_data_path", paths["val"], "--test_data_path",
        paths["test"], "--out_dir", folder / "out", "--save_best", "--eval_interval", 3,
        "--keep_every", 3, "--batch_size", 4, "--no-packing", "--max_seq_len", 64, "--epochs", 6,
        "--learning_rate", 5e-2, "--lr_decay", "constant",
    ]  # fmt: skip
    run(*words)
    return SimpleNamespace(out=folder / "out", words=words, **sets)


def test_the_best_weights_are_those_of_the_lowest_loss(overfitted, tokenizer):
    """The numbered weights of each evaluation are scored again, by hand."""
    found = {}
    for line in evaluations(overfitted.out):
        state = weights(overfitted.out, f"_step{line['step']}")
        found[line["step"]] = by_hand(state, overfitted.val, tokenizer)[0]
        assert line["val_loss"] == pytest.approx(found[line["step"]], rel=1e-5)
    lowest = min(found, key=found.get)
    assert lowest not in (min(found), max(found))  # else nothing would be proved
    best = weights(overfitted.out, "_best")
    assert same(best, weights(overfitted.out, f"_step{lowest}"))
    assert not same(best, weights(overfitted.out))
    about = json.loads((overfitted.out / "pretrain_32_best.json").read_text(encoding="utf-8"))
    assert about["config"]["dim"] == 32


def test_the_test_data_are_scored_once_on_the_best_weights(overfitted, tokenizer):
    tested = [m for m in metrics(overfitted.out) if "test_loss" in m]
    assert tested == metrics(overfitted.out)[-1:]
    best = by_hand(weights(overfitted.out, "_best"), overfitted.test, tokenizer)
    last = by_hand(weights(overfitted.out), overfitted.test, tokenizer)
    assert scores(tested[0], "test") == pytest.approx(best, rel=1e-5)
    assert last[0] > best[0] + 0.1


def test_a_finished_run_that_is_resumed_does_nothing(run, overfitted):
    before = contents(overfitted.out)
    done = run(*overfitted.words, "--resume")
    assert "nothing to do" in done.stdout
    assert contents(overfitted.out) == before


def test_without_validation_the_last_weights_are_tested(run, tmp_path, tokenizer):
    test = documents(5, first=900)
    run(
        *BASE, "--data_path", write_lines(tmp_path / "train.jsonl", documents(12)),
        "--test_data_path", write_lines(tmp_path / "test.jsonl", test), "--out_dir", tmp_path,
        "--max_seq_len", 64, "--batch_size", 2, "--learning_rate", 1e-2,
    )  # fmt: skip
    tested = [m for m in metrics(tmp_path) if "test_loss" in m]
    assert len(tested) == 1
    expected = by_hand(weights(tmp_path), test, tokenizer)
    assert scores(tested[0], "test") == pytest.approx(expected, rel=1e-5)


def test_best_weights_that_cannot_be_saved_are_missed_at_the_end(run, tmp_path):
    """The run may go on, but it must not end as if what was asked for were there."""
    (tmp_path / "out" / "pretrain_32_best.pth").mkdir(parents=True)
    data = write_lines(tmp_path / "train.jsonl", documents(12))
    done = run(
        *BASE, "--data_path", data, "--val_data_path", data, "--out_dir", tmp_path / "out",
        "--max_seq_len", 64, "--save_best",
        code=2,
    )  # fmt: skip
    assert "pretrain_32_best.pth" in done.stderr
    assert done.stderr.count("\n") == 1


# Early stopping


def evaluate_to(monkeypatch, losses, text, tokenizer):
    """Make the evaluations of `text` alone give these losses, whatever the model has learnt.

    With `a` as logit of the k ids that the text has, and 0 of the V - k others, the loss of each
    target is ln(k · e^a + V - k) - a; so e^a = (V - k) / (e^loss - k).
    """
    forward, left = MiniMindLM.forward, iter(losses)
    ids = sorted({*tokenizer(text)["input_ids"], 2})
    k, vocab = len(ids), len(tokenizer)

    def scripted(model, *args, **kwargs):
        output = forward(model, *args, **kwargs)
        if not model.training:
            logits = torch.zeros_like(output.logits)
            loss = next(left)
            a = math.log((vocab - k) / (math.exp(loss) - k)) if loss == loss else loss
            logits[..., ids] = a
            output = output._replace(logits=logits)
        return output

    monkeypatch.setattr(MiniMindLM, "forward", scripted)


NAN = math.nan
# flags, losses of the evaluations (one a step, for 8 steps), how many are made, which is best
STOPS = {
    "patience": (["--early_stopping_patience", 2], [6, 5, 5.5, 5.4, 1], 4, 2),
    "progress starts anew": (["--early_stopping_patience", 2], [6, 7, 5, 7, 5.5, 1], 5, 3),
    "equal is no progress": (["--early_stopping_patience", 2], [6, 5, 5, 5, 1], 4, 2),
    "less than min_delta is none": (
        ["--early_stopping_patience", 2, "--early_stopping_min_delta", 0.01],
        [6, 5, 4.995, 4.993, 1],
        4,
        2,
    ),
    "small steps add up": (
        ["--early_stopping_patience", 2, "--early_stopping_min_delta", 0.01],
        [6, 5, 4.995, 4.985, 4.984, 4.983, 1],
        6,
        4,
    ),
    "min_delta 0": (
        ["--early_stopping_patience", 1, "--early_stopping_min_delta", 0],
        [6, 5.9999, 5.9998, 5.9998, 1],
        4,
        3,
    ),
    "patience 3 if none is given, 1e-4 to be better": (
        ["--early_stopping_patience"],
        [6, 5.9998, 5.99975, 5.99974, 5.99973, 1],
        5,
        2,
    ),
    "no number is no progress": (["--early_stopping_patience", 2], [6, NAN, NAN, 1], 3, 1),
    "never a number": (["--early_stopping_patience", 2], [NAN, NAN, 1], 2, None),
    "not asked for": (["--save_best"], [6, 5.99999, 7, 7, 7, 7, 7, 7], 8, 2),
    "too late to stop": (["--early_stopping_patience", 3], [6, 5, 4, 3, 2, 3, 3, 3], 8, 5),
}


@pytest.mark.parametrize(
    ("flags", "losses", "made", "best"), [pytest.param(*case, id=id) for id, case in STOPS.items()]
)
def test_early_stopping(run, tmp_path, tokenizer, monkeypatch, flags, losses, made, best):
    text = "red green"
    evaluate_to(monkeypatch, losses, text, tokenizer)
    done = run(
        *BASE, "--data_path", write_lines(tmp_path / "train.jsonl", documents(8)),
        "--val_data_path", write_lines(tmp_path / "val.jsonl", [text]), "--out_dir", tmp_path,
        "--max_seq_len", 64, "--no-packing", "--batch_size", 1, "--eval_interval", 1,
        "--keep_every", 1, *flags,
    )  # fmt: skip
    lines = evaluations(tmp_path)
    assert [m["step"] for m in lines] == list(range(1, made + 1))
    for line, loss in zip(lines, losses[: len(lines)], strict=True):
        expected = pytest.approx(loss, abs=1e-5) if loss == loss else None
        assert line["val_loss"] == expected
    assert ("stopped early" in done.stdout) == (made < 8)
    assert same(weights(tmp_path), weights(tmp_path, f"_step{made}"))
    if best is None:
        assert not (tmp_path / "pretrain_32_best.pth").exists()
    else:
        assert same(weights(tmp_path, "_best"), weights(tmp_path, f"_step{best}"))
    report = (tmp_path / "logs" / "pretrain_32" / "report.md").read_text(encoding="utf-8")
    assert f"Ended: {'stopped early' if made < 8 else 'finished'}" in report


def test_a_run_that_stopped_early_does_not_train_on_to_be_tested(
    run, tmp_path, tokenizer, monkeypatch
):
    """--resume with a test set that was not there before scores the best weights, no more."""
    val = write_lines(tmp_path / "val.jsonl", ["red green"])
    words = [
        *BASE, "--data_path", write_lines(tmp_path / "train.jsonl", documents(8)),
        "--val_data_path", val, "--out_dir", tmp_path, "--max_seq_len", 64, "--no-packing",
        "--batch_size", 1, "--eval_interval", 1, "--early_stopping_patience", 2,
    ]  # fmt: skip
    with monkeypatch.context() as patched:
        evaluate_to(patched, [6, 5, 5.5, 5.5], "red green", tokenizer)
        run(*words)
    before = weights(tmp_path)
    test = documents(5, first=900)
    run(*words, "--resume", "--test_data_path", write_lines(tmp_path / "test.jsonl", test))
    assert same(before, weights(tmp_path))
    (tested,) = [m for m in metrics(tmp_path) if "test_loss" in m]
    assert tested["step"] == 4
    expected = by_hand(weights(tmp_path, "_best"), test, tokenizer)
    assert scores(tested, "test") == pytest.approx(expected, rel=1e-5)


# The plan and the record


def test_the_record_of_a_run(run, tmp_path, root, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    pytest.importorskip("matplotlib")
    data = write_lines(tmp_path / "train.jsonl", documents(24))
    run(
        *BASE, "--data_path", data, "--val_ratio", 0.1, "--out_dir", tmp_path / "out",
        "--batch_size", 2, "--max_seq_len", 64, "--log_interval", 2, "--learning_rate", 0.004,
    )  # fmt: skip
    folder = tmp_path / "out" / "logs" / "pretrain_32"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["arguments"]["learning_rate"] == 0.004
    assert config["arguments"]["data_path"] == str(data)
    assert config["versions"]["torch"] == torch.__version__
    assert "commit" in config and config["vocab_size"] == 6400 and config["ending"] == "finished"
    for name in ("curves.png", "lr.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n")
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "Ended: finished" in report
    assert "(curves.png)" in report
    assert "--learning_rate 0.004" in report
    for line in (folder / "training_log.txt").read_text(encoding="utf-8").splitlines():
        stamp, _ = line.split("  ", 1)
        assert abs((datetime.now().astimezone() - datetime.fromisoformat(stamp)).days) < 1
    for line in metrics(tmp_path / "out"):
        wanted = {"step", "epoch", "tokens", "seconds"}
        if "loss" in line:
            wanted |= {"loss", "lr", "grad_norm", "tokens_per_second", "skipped", "spikes"}
        assert wanted <= line.keys()


class FakeWandb:
    """Takes what the run hands to wandb."""

    errors = SimpleNamespace(Error=OSError)

    def __init__(self):
        self.id, self.logged = "abc", []

    def init(self, **about):
        self.about = about
        return self

    def log(self, figures, step):
        self.logged.append({"step": step, **figures})

    def finish(self):
        pass


def test_wandb_gets_the_same_names(run, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    test = write_lines(tmp_path / "test.jsonl", documents(4, first=900))
    run(
        *BASE, "--data_path", write_lines(tmp_path / "train.jsonl", documents(24)),
        "--val_ratio", 0.1, "--test_data_path", test, "--out_dir", tmp_path, "--batch_size", 2,
        "--max_seq_len", 64, "--log_interval", 2, "--use_moe", "--use_wandb",
    )  # fmt: skip
    lines = metrics(tmp_path, "pretrain_32_moe")
    assert len(lines) > 3
    for logged, line in zip(fake.logged, lines, strict=True):
        line.pop("seconds")  # wandb has a clock of its own
        assert logged == line
    assert fake.about["config"]["batch_size"] == 2


def test_a_dry_run_says_what_it_would_do_and_does_nothing(run, tmp_path, monkeypatch):
    data = write_lines(tmp_path / "train.jsonl", documents(24))
    words = [
        *BASE, "--data_path", data, "--val_ratio", 0.25, "--out_dir", tmp_path / "out",
        "--batch_size", 2, "--max_seq_len", 64, "--no-packing",
    ]  # fmt: skip
    run(*words, "--save_interval", 2)
    (tmp_path / "out" / "logs" / "pretrain_32" / "lr.png").write_bytes(b"the curve of that run")
    before = contents(tmp_path / "out")
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    other = ["--accumulation_steps", 4, "--epochs", 3, "--learning_rate", 0.1]
    for resume in ([], ["--resume"]):
        done = run(*words, *other, *resume, "--dry_run")
        for part in ("parameters: ", "tokens: ", "FLOPs", "memory: ", "warning: --learning_rate"):
            assert part in done.stdout
        # 18 texts, 2 × 4 a step; the run that is resumed has done 9 steps.
        total = 9 + 2 * 3 if resume else 3 * 3
        assert f"steps: {total}" in done.stdout
        assert "step 1" not in done.stdout
        assert before.items() <= contents(tmp_path / "out").items()


def test_a_dry_run_leaves_no_trace_but_the_curve(run, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    pytest.importorskip("matplotlib")
    data = write_lines(tmp_path / "train.jsonl", documents(24))
    run(*BASE, "--data_path", data, "--out_dir", tmp_path / "out", "--dry_run")
    (name,) = contents(tmp_path / "out")
    assert name.startswith("logs/pretrain_32/lr.") and name.endswith(".png")


def test_the_cost_of_what_is_left(run, tmp_path):
    """At 3,600 per GPU-hour a second costs 1."""
    done = run(
        *BASE, "--data_path", write_lines(tmp_path / "train.jsonl", documents(24)),
        "--out_dir", tmp_path, "--batch_size", 1, "--max_seq_len", 64, "--no-packing",
        "--gpu_price", 3600,
    )  # fmt: skip
    found = re.search(
        r"about 0:00:(\d+) to go; at 3600\.00 per GPU-hour: ([\d.]+)$", done.stdout, re.M
    )
    assert round(float(found[2])) == int(found[1])
