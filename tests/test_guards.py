"""What a run does about numbers that are none, loss spikes, and too little memory."""

import json
import math
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from interruptions import FLOAT32
from test_validation import by_hand, scores
from transformers import AutoTokenizer

from common import UserError
from dataset import RowBatches
from model import LMConfig, MiniMindLM
from training import explain_out_of_memory
from training.guards import SpikeWatch

BASE = [
    "--dim", "32", "--n_layers", "2", "--device", "cpu", "--optimizer", "adamw",
    "--learning_rate", "5e-4", "--epochs", "1",
]  # fmt: skip
WORDS = ["red", "green", "blue", "一座山", "河流", "stone", "云"]
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True, scope="module")
def no_matplotlib():
    """Runs do without it, and drawing takes longer than everything else in a small one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "matplotlib.figure", None)
        yield


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def documents(count):
    """Texts of 1 to 17 words, no two of them the same."""
    return [
        " ".join([f"number {i}", *(WORDS[i * k % 7] for k in range(1, 1 + (5 * i) % 17))])
        for i in range(count)
    ]


def metrics(out, name="pretrain_32"):
    path = out / "logs" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def weights(out, step=None):
    name = "pretrain_32.pth" if step is None else f"pretrain_32_step{step}.pth"
    return torch.load(out / name, weights_only=True)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def poison_logits(output, ids, value):
    return output._replace(logits=output.logits * value)


def forbid_the_end(output, ids, value):
    """The loss of `</s>`, id 2, is infinite, while its probability has a gradient."""
    return output._replace(logits=output.logits.index_fill(2, torch.tensor(2), -value))


def poison_gradient(output, ids, value):
    output.logits.register_hook(lambda gradient: gradient * value)
    return output


class Poisoned:
    """Replaces MiniMindLM.forward: spoils what training calls number `calls` give, from 0.

    `seen` are the ids of all training calls.
    """

    def __init__(self, monkeypatch, calls, spoil=poison_logits, value=NAN):
        self.seen, forward = [], MiniMindLM.forward

        def poisoned(model, input_ids, *args, **kwargs):
            output = forward(model, input_ids, *args, **kwargs)
            if model.training:
                if len(self.seen) in calls:
                    output = spoil(output, input_ids, value)
                self.seen.append(input_ids.clone())
            return output

        monkeypatch.setattr(MiniMindLM, "forward", poisoned)

    def line(self, call, path):
        """`file:line` of the first text of the first row of a call, found by its tokens."""
        return find_line(self.seen[call], path)


@cache
def the_tokenizer():
    folder = Path(__file__).parent.parent / "model" / "minimind_tokenizer"
    return AutoTokenizer.from_pretrained(folder)


def find_line(ids, path):
    """`file:line` of the text that the first row of a batch begins with."""
    row = ids[0].tolist()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        document = [1, *the_tokenizer()(json.loads(line)["text"])["input_ids"]]
        # A row of several texts has a 2 (</s>) after each but the last, whose </s> is no input.
        if row[: len(document)] == document and row[len(document) :][:1] in ([], [2], [1], [0]):
            return f"{path}:{number}"
    raise AssertionError("not a text of the file")


def skipped_at(done):
    """`{step: file:line}` of what a run says about updates that it left out."""
    found = re.findall(r"^step (\d+): .*update skipped; (.*)$", done.stdout, re.MULTILINE)
    return {int(step): where for step, where in found}


@pytest.mark.parametrize(
    ("spoil", "value", "names_the_batch"),
    [
        (poison_logits, NAN, True),
        (forbid_the_end, INF, True),
        (poison_gradient, NAN, False),
        (poison_gradient, INF, False),
    ],
    ids=["loss NaN", "loss infinite", "gradient NaN", "gradient infinite"],
)
def test_a_bad_step_changes_nothing_and_is_reported(
    run, tmp_path, monkeypatch, spoil, value, names_the_batch
):
    """Three micro-batches a step; the second one of step 4 is bad."""
    data = write_lines(tmp_path / "data.jsonl", documents(36))
    poisoned = Poisoned(monkeypatch, {3 * 3 + 1}, spoil, value)
    done = run(
        *BASE, "--data_path", data, "--out_dir", tmp_path, "--max_seq_len", 64, "--no-packing",
        "--batch_size", 2, "--accumulation_steps", 3, "--keep_every", 1, "--log_interval", 1,
    )  # fmt: skip
    # A gradient belongs to the whole window, so the window's first text stands for it.
    bad_call = 3 * 3 + 1 if names_the_batch else 3 * 3
    assert skipped_at(done) == {4: poisoned.line(bad_call, data)}
    log = (tmp_path / "logs" / "pretrain_32" / "training_log.txt").read_text(encoding="utf-8")
    assert poisoned.line(bad_call, data) in log
    assert_same(weights(tmp_path, 3), weights(tmp_path, 4))
    assert not torch.equal(weights(tmp_path, 4)["norm.weight"], weights(tmp_path, 5)["norm.weight"])
    figures = metrics(tmp_path)
    assert {m["step"]: m["skipped"] for m in figures if m["step"] != 4} == {
        1: 0, 2: 0, 3: 0, 5: 1, 6: 1,
    }  # fmt: skip
    assert all(math.isfinite(m["loss"]) for m in figures if m["step"] != 4)


def test_it_is_as_if_the_bad_batch_had_not_been_there(run, tmp_path, monkeypatch):
    """All texts are the same, so that a run over one batch less sees the same sequence."""
    same = ["the same words in every document"]
    common = [
        *BASE, "--max_seq_len", 32, "--no-packing", "--batch_size", 2, "--accumulation_steps", 2,
        "--lr_decay", "constant", "--warmup_iters", 0, "--log_interval", 1,
    ]  # fmt: skip
    data = write_lines(tmp_path / "less.jsonl", 16 * same)
    run(*common, "--data_path", data, "--out_dir", tmp_path / "less")
    Poisoned(monkeypatch, {2 * 2})
    data = write_lines(tmp_path / "more.jsonl", 20 * same)
    run(*common, "--data_path", data, "--out_dir", tmp_path / "more")
    assert_same(weights(tmp_path / "less"), weights(tmp_path / "more"))
    less, more = metrics(tmp_path / "less"), metrics(tmp_path / "more")
    for name in ("loss", "tokens", "grad_norm"):
        assert [m[name] for m in less] == [m[name] for m in more if m["step"] != 3]


def test_a_packed_row_is_named_by_its_first_text(run, tmp_path, monkeypatch):
    data = write_lines(tmp_path / "data.jsonl", documents(36))
    poisoned = Poisoned(monkeypatch, {1, 2})
    done = run(
        *BASE, "--data_path", data, "--out_dir", tmp_path, "--max_seq_len", 64, "--batch_size", 2
    )
    assert len(poisoned.seen) > 3
    assert skipped_at(done) == {2: poisoned.line(1, data), 3: poisoned.line(2, data)}


def test_bad_steps_in_a_row_end_the_run(run, tmp_path, monkeypatch):
    data = write_lines(tmp_path / "data.jsonl", documents(24))
    words = [
        *BASE, "--data_path", data, "--out_dir", tmp_path, "--max_seq_len", 64, "--no-packing",
        "--batch_size", 2, "--keep_every", 1, "--max_bad_steps", 3, "--log_interval", 2,
    ]  # fmt: skip
    with monkeypatch.context() as patched:
        poisoned = Poisoned(patched, range(4, 100))
        done = run(*words, code=2)
    assert len(poisoned.seen) == 7
    assert done.stderr.count("\n") == 1
    assert "3 steps in a row (--max_bad_steps)" in done.stderr
    assert poisoned.line(6, data) in done.stderr
    assert "--learning_rate" in done.stderr
    assert_same(weights(tmp_path), weights(tmp_path, 4))
    # The record says what happened, in the figures and in the report.
    assert metrics(tmp_path)[-1]["skipped"] == 3
    folder = tmp_path / "logs" / "pretrain_32"
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "Ended: stopped: 3 steps in a row" in report
    assert "3 of 7 updates were skipped" in report
    assert "3 steps in a row" in (folder / "training_log.txt").read_text(encoding="utf-8")
    # Everything is there to go on with.
    done = run(*words, "--resume")
    assert "going on after step 7" in done.stdout
    assert metrics(tmp_path)[-1]["step"] == 12
    assert metrics(tmp_path)[-1]["skipped"] == 3


def test_a_good_step_starts_the_count_anew(run, tmp_path, monkeypatch):
    data = write_lines(tmp_path / "data.jsonl", documents(20))
    Poisoned(monkeypatch, {1, 2, 4, 5, 7, 8})
    done = run(
        *BASE, "--data_path", data, "--out_dir", tmp_path, "--max_seq_len", 64, "--no-packing",
        "--batch_size", 2, "--max_bad_steps", 3, "--log_interval", 1,
    )  # fmt: skip
    assert list(skipped_at(done)) == [2, 3, 5, 6, 8, 9]
    assert metrics(tmp_path)[-1]["skipped"] == 6
    # The estimate of the time left comes after five steps, and must come though the fifth was bad:
    # float16 skips some at the start as a rule, while it finds its loss scale.
    assert done.stdout.count(" to go") == 1


def test_a_run_that_really_diverges_names_its_learning_rate(run, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", documents(20))
    done = run(
        *BASE, "--data_path", data, "--out_dir", tmp_path, "--max_seq_len", 64, "--no-packing",
        "--batch_size", 1, "--learning_rate", 1e30, "--grad_clip", 1e30,
        code=2,
    )  # fmt: skip
    assert "10 steps in a row" in done.stderr
    assert "--learning_rate (it is 1e+30)" in done.stderr
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


WRAPPER = """
import json, math, os, runpy, sys
from pathlib import Path
sys.path.insert(0, str(Path.cwd()))
import torch
from model import MiniMindLM
sys.modules["matplotlib.figure"] = None
forward, calls = MiniMindLM.forward, 0
def poisoned(model, input_ids, *args, **kwargs):
    global calls
    output = forward(model, input_ids, *args, **kwargs)
    calls += model.training
    if model.training and calls == 6 and os.environ["RANK"] == "1":
        output = output._replace(logits=output.logits * math.nan)
        Path(__file__).with_suffix(".json").write_text(json.dumps(input_ids.tolist()))
    return output
MiniMindLM.forward = poisoned
runpy.run_path("train_pretrain.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def two_processes(run, tmp_path_factory):
    """Two micro-batches a step; the second one of step 3 is bad on rank 1 alone."""
    folder = tmp_path_factory.mktemp("two")
    data = write_lines(folder / "data.jsonl", documents(26))
    val = write_lines(folder / "val.jsonl", documents(13))
    wrapper = folder / "wrapper.py"
    wrapper.write_text(WRAPPER, encoding="utf-8")
    done = run(
        *BASE, "--data_path", data, "--val_data_path", val, "--out_dir", folder, "--max_seq_len",
        64, "--batch_size", 2, "--accumulation_steps", 2, "--keep_every", 1, "--log_interval", 1,
        "--no-packing", "--learning_rate", 1e-2, *FLOAT32,
        script=wrapper, processes=2,
    )  # fmt: skip
    return folder, data, done


def test_a_bad_batch_of_another_process(two_processes):
    folder, data, done = two_processes
    ids = torch.tensor(json.loads((folder / "wrapper.json").read_text(encoding="utf-8")))
    assert skipped_at(done) == {3: find_line(ids, data)}
    assert_same(weights(folder, 2), weights(folder, 3))
    assert not torch.equal(weights(folder, 3)["norm.weight"], weights(folder, 4)["norm.weight"])
    assert [m for m in metrics(folder) if "skipped" in m][-1]["skipped"] == 1


def test_two_processes_validate_as_one(two_processes):
    """13 texts, 2 at a time for each of 2 processes: the last batch is one process's alone."""
    folder, _, _ = two_processes
    expected = by_hand(weights(folder), documents(13), the_tokenizer())
    assert scores(metrics(folder)[-1]) == pytest.approx(expected, rel=1e-5)


# Spikes


def test_the_usual_loss_is_a_weighted_mean_and_variance():
    """Each loss counts 1/n until 1/n is 0.05; from then on 0.05, those before 0.95 as much."""
    losses = np.random.default_rng(0).normal(3.0, 0.2, 60)
    watch, shares = SpikeWatch(), np.empty(0)
    for n, loss in enumerate(losses, 1):
        watch.is_spike(loss)
        share = max(0.05, 1 / n)
        shares = np.append(shares * (1 - share), share)
        mean = (shares * losses[:n]).sum()
        assert shares.sum() == pytest.approx(1)
        assert watch.mean == pytest.approx(mean)
        assert watch.variance == pytest.approx((shares * (losses[:n] - mean) ** 2).sum())


def test_five_deviations_above_the_mean_are_a_spike():
    losses = [3.1, 2.9] * 15  # mean 3.0, standard deviation about 0.1
    for above, expected in [(0.3, False), (0.7, True), (-2.0, False)]:
        watch = SpikeWatch()
        assert not any(watch.is_spike(loss) for loss in losses)
        assert watch.is_spike(watch.mean + above) is expected


def test_too_few_losses_make_no_spike():
    watch = SpikeWatch()
    assert not any(watch.is_spike(loss) for loss in [8.0, 2.0, 900.0, 3.0] * 5)


def test_a_garbled_text_is_a_spike_that_is_named(run, tmp_path):
    """80 times the same text, but one; it comes as step 61."""
    texts = ["red green blue stone"] * 80
    order = [rows[0] for rows in RowBatches(80, 1, seed=42, epoch=0)]
    texts[order[60]] = "q7#Zk!)x@9vW^&j2$Lp%Tb"
    data = write_lines(tmp_path / "data.jsonl", texts)
    done = run(
        *BASE, "--data_path", data, "--out_dir", tmp_path, "--max_seq_len", 32, "--no-packing",
        "--batch_size", 1, "--learning_rate", 1e-2, "--log_interval", 20,
    )  # fmt: skip
    found = re.findall(r"^step (\d+): loss spike.* (\S+)$", done.stdout, re.MULTILINE)
    assert found == [("61", f"{data}:{order[60] + 1}")]
    assert [m["spikes"] for m in metrics(tmp_path)] == [0, 0, 0, 1]


# Figures


def test_a_line_of_figures_is_the_mean_since_the_last_one(run, tmp_path, monkeypatch):
    """The same run, logged after every step and after every fifth; 18 steps, one of them bad."""
    data = write_lines(tmp_path / "data.jsonl", documents(36))
    for interval in (1, 5):
        with monkeypatch.context() as patched:
            Poisoned(patched, {6})
            run(
                *BASE, "--data_path", data, "--out_dir", tmp_path / f"{interval}",
                "--max_seq_len", 64, "--no-packing", "--batch_size", 2, "--log_interval", interval,
                "--learning_rate", 1e-2,
            )  # fmt: skip
    single = [m for m in metrics(tmp_path / "1") if m.get("loss") is not None]
    assert [m["step"] for m in single] == [n for n in range(1, 19) if n != 7]
    losses = [m["loss"] for m in single]
    tokens = np.diff([0, *(m["tokens"] for m in single)])
    assert tokens.min() < tokens.max() / 2 and max(losses) > 1.5 * min(losses)  # else no proof
    fives = metrics(tmp_path / "5")
    assert [m["step"] for m in fives] == [5, 10, 15, 18]
    for line, (first, last) in zip(fives, [(1, 5), (6, 10), (11, 15), (16, 18)], strict=True):
        span = [i for i, m in enumerate(single) if first <= m["step"] <= last]
        expected = np.average([losses[i] for i in span], weights=[tokens[i] for i in span])
        assert line["loss"] == pytest.approx(expected, rel=1e-6)
        norms = [single[i]["grad_norm"] for i in span]
        assert line["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-6)
        assert line["tokens"] == single[span[-1]]["tokens"]
        assert line["skipped"] == (last > 6)
    assert_same(weights(tmp_path / "1"), weights(tmp_path / "5"))


@pytest.mark.parametrize("packing", [True, False])
def test_the_load_of_experts_by_hand(run, tmp_path, packing):
    """Each text alone through the untrained model, and every choice of every gate counted.

    A learning rate of 1e-12 leaves the model as it is, so that the line stands for all steps.
    """
    texts = documents(30)
    data = write_lines(tmp_path / "data.jsonl", texts)
    run(
        *BASE, "--use_moe", "--data_path", data, "--out_dir", tmp_path, "--max_seq_len", 64,
        "--packing", packing, "--batch_size", 4, "--accumulation_steps", 2, "--seed", 5,
        "--learning_rate", 1e-12, "--log_interval", 1000,
    )  # fmt: skip
    torch.manual_seed(5)
    model = MiniMindLM(LMConfig(dim=32, n_layers=2, use_moe=True))
    counts = torch.zeros(2, 4)
    for i, layer in enumerate(model.layers):

        def count(gate, inputs, output, i=i):
            scores = inputs[0] @ gate.weight.T
            counts[i] += scores.topk(2).indices.flatten().bincount(minlength=4)

        layer.feed_forward.gate.register_forward_hook(count)
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([[1, *the_tokenizer()(text)["input_ids"]]]))
    shares = counts / counts.sum(1, keepdim=True)
    (figures,) = metrics(tmp_path, "pretrain_32_moe")
    assert counts.sum() == 2 * 2 * figures["tokens"]
    assert figures["expert_load_min"] == pytest.approx(shares.min().item(), abs=6e-5)
    assert figures["expert_load_max"] == pytest.approx(shares.max().item(), abs=6e-5)
    assert figures["expert_load_min"] < 0.245 < 0.255 < figures["expert_load_max"]


# Memory

OUT_OF_MEMORY = [
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype("f8")),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 524288000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you "
        "tried to allocate 1073741824 bytes."
    ),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB)"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:40])
def test_lack_of_memory_is_explained(error):
    with pytest.raises(UserError) as raised, explain_out_of_memory():
        raise error
    remedies = ["--batch_size", "--accumulation_steps", "--gradient_checkpointing", "--max_seq_len"]
    places = [str(raised.value).index(flag) for flag in remedies]
    assert places == sorted(places)
    assert "\n" not in str(raised.value)
    assert raised.value.every_rank  # it happens on any process, or on one


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("out of memory"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, explain_out_of_memory():
        raise error
    assert raised.value is error


LIMITED = """
import os, resource, runpy, sys
from pathlib import Path
sys.path.insert(0, str(Path.cwd()))
import torch, transformers, training
sys.modules["matplotlib.figure"] = None
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (400 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.argv[0] = "train_pretrain.py"
runpy.run_path("train_pretrain.py", run_name="__main__")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_really_runs_out(run, tmp_path):
    """400 MB are left; the logits alone, 128 rows of 500 and 6,400 numbers each, take 1.6 GB."""
    data = write_lines(tmp_path / "data.jsonl", ["1" * 500] * 256)
    wrapper = tmp_path / "limited.py"
    wrapper.write_text(LIMITED, encoding="utf-8")
    words = [*BASE, "--data_path", data, "--out_dir", tmp_path / "out", "--batch_size", 128]
    done = run(*words, script=wrapper, fresh=True, code=2)
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("train_pretrain.py: error: out of memory; ")
