"""Distillation as users start it; what is learnt is worked out by hand on transformers' Llama."""

import functools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from interruptions import (
    SHAPE,
    assert_same,
    evaluating,
    killed,
    learning,
    read_metrics,
    result,
    snapshot,
)
from rounding import LOSS, NORM, assert_equal_to_rounding, assert_same_training, loss_sums, rounding
from test_train_full_sft import chat, chats, scores, scores_by_hand, write_chats
from tiny_models import llama_with_weights_of, random_model

import train_distillation
from dataset import PackedRows, PaddedRows, SFTDataset, TeacherTopK, collate_with_teacher
from model import LMConfig, MiniMindLM, save_weights, tokenizer_hash
from training import Run, find_processes

NAME = "distill_32"
ROWS = [*SHAPE, "--max_seq_len", 96]
TEACHER = {"dim": 48, "n_layers": 2}


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def distill(run):
    return functools.partial(run, *ROWS, script="train_distillation.py")


def save(model, path, tokenizer, stage="pretrain"):
    path.parent.mkdir(exist_ok=True)
    save_weights(path, model, model.config, stage, tokenizer_hash(tokenizer))
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer):
    """A larger model than the student, with another number of heads."""
    path = tmp_path_factory.mktemp("teacher") / "full_sft_48.pth"
    return save(random_model(9, **TEACHER, n_heads=4), path, tokenizer, "full_sft")


@pytest.fixture(scope="module")
def student(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("student") / "pretrain_32.pth"
    return save(random_model(), path, tokenizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("data") / "train.jsonl", chats(21))


def load(path):
    return torch.load(path, weights_only=True)


def llama(path, **shape):
    model = MiniMindLM(LMConfig(**shape))
    model.load_state_dict(load(path))
    return llama_with_weights_of(model)


# By hand


def answer_logits(model, tokenizer, messages):
    """Logits at every token of the answers and their </s>, and those tokens."""

    def encode(some, **options):
        return tokenizer.apply_chat_template(some, tokenize=True, return_dict=False, **options)

    ids = torch.tensor(encode(messages))
    places = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            begin = len(encode(messages[:i], add_generation_prompt=True))
            places += range(begin, len(encode(messages[: i + 1])) - 1)
    places = torch.tensor(places)
    return model(ids[None]).logits[0, places - 1], ids[places]


@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 2.0), (0.2, 3.5), (0.0, 1.0), (1.0, 2.0)])
def test_a_step_by_hand(distill, teacher, student, tokenizer, tmp_path, alpha, temperature):
    """Loss, its parts and the gradient's norm, over two conversations, one at half weight."""
    conversations = [chat("Hi", "red", "More", "blue stone " * 6), chat("你好", "一座山 河流 云")]
    conversations[1][1]["weight"] = 0.5
    path = write_chats(tmp_path / "train.jsonl", conversations)
    distill(
        "--data_path", path, "--val_data_path", path, "--out_dir", tmp_path, "--from_weight",
        student, "--teacher_weight", teacher, "--alpha", alpha, "--temperature", temperature,
        "--log_interval", 1,
    )  # fmt: skip
    ours, theirs = llama(student, dim=32, n_layers=1), llama(teacher, **TEACHER, n_heads=4)
    totals = {"loss": 0, "cross_entropy": 0, "kl": 0}
    weights = 0
    for weight, messages in zip((1, 0.5), conversations, strict=True):
        logits, ids = answer_logits(ours, tokenizer, messages)
        with torch.no_grad():
            wanted, _ = answer_logits(theirs, tokenizer, messages)
        p = (wanted.double() / temperature).softmax(-1)
        q = (logits.double() / temperature).softmax(-1)
        kl = (p * (p / q).log()).sum(-1)
        cross_entropy = -logits.double().softmax(-1)[torch.arange(len(ids)), ids].log()
        loss = alpha * cross_entropy + (1 - alpha) * temperature**2 * kl
        for name, values in (("loss", loss), ("cross_entropy", cross_entropy), ("kl", kl)):
            totals[name] = totals[name] + weight * values.sum()
        weights += weight * len(ids)
    (totals["loss"] / weights).backward()
    norm = torch.stack([p.grad.norm() for p in ours.parameters()]).norm()
    _, step, *_ = read_metrics(tmp_path, NAME)
    assert step["step"] == 1
    for name, total in totals.items():
        assert step[name] == pytest.approx((total / weights).item(), rel=1e-5), name
    assert step["grad_norm"] == pytest.approx(norm.item(), rel=NORM)
    assert step["kl"] > 0.1
    if alpha == 1:
        assert step["loss"] == step["cross_entropy"]


def test_scores_are_those_of_the_other_stages(distill, teacher, student, data, tokenizer, tmp_path):
    val = [chat("Hi", "Hello 你好", "你是谁？", "我是 MiniMind。"), chat("17 + 4", "21")]
    distill(
        "--data_path", data, "--val_data_path", write_chats(tmp_path / "val.jsonl", val),
        "--out_dir", tmp_path, "--from_weight", student, "--teacher_weight", teacher,
        "--learning_rate", 1e-2,
    )  # fmt: skip
    first, *_, last = read_metrics(tmp_path, NAME)
    assert scores(first) == scores_by_hand(student, tokenizer, val)
    assert scores(last) == scores_by_hand(tmp_path / f"{NAME}.pth", tokenizer, val)
    about = json.loads((tmp_path / f"{NAME}.json").read_text(encoding="utf-8"))
    assert about["stage"] == "distill"


def test_the_student_becomes_the_teacher(distill, teacher, student, data, tokenizer, tmp_path):
    """With nothing else to learn from, their divergence falls; the teacher is as it was."""
    before = snapshot(teacher.parent)
    distill(
        "--data_path", data, "--out_dir", tmp_path, "--from_weight", student, "--teacher_weight",
        teacher, "--alpha", 0, "--temperature", 1, "--epochs", 10, "--learning_rate", 2e-2,
        "--batch_size", 8,
    )  # fmt: skip
    lines = read_metrics(tmp_path, NAME)
    assert lines[-1]["kl"] < 0.75 * lines[0]["kl"]
    assert snapshot(teacher.parent) == before


# The cache


def random_logits(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_of_the_likeliest_tokens_by_hand(temperature):
    """All others are one token more; with all tokens named it is the whole divergence."""
    student, teacher = random_logits(5, 40), random_logits(5, 40, seed=1)
    p, q = ((x.double() / temperature).softmax(-1) for x in (teacher, student))
    whole = (p * (p / q).log()).sum(-1)
    ours = train_distillation.divergence(student, teacher, temperature)
    assert_equal_to_rounding(ours, whole, sums=3 * 40)  # two softmaxes and the sum over tokens
    before, close = torch.zeros(5), rounding(3 * 40)
    for top in (1, 4, 16, 40):
        logps, ids = (teacher / temperature).log_softmax(-1).topk(top)
        ours = train_distillation.divergence(student, (ids, logps), temperature)
        for i in range(5):
            named = [(p[i, j], q[i, j]) for j in ids[i]]
            rest = [1 - sum(a for a, _ in named), 1 - sum(b for _, b in named)]
            pairs = [*named, *([rest] if top < 40 else [])]
            expected = sum(a * math.log(a / b) for a, b in pairs)
            assert ours[i].item() == pytest.approx(float(expected), rel=close)
        assert (ours >= before * (1 - close)).all()
        before = ours
    assert_equal_to_rounding(before, whole, sums=3 * 40)


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_with_all_tokens_kept_training_is_the_same(
    distill, teacher, student, data, tmp_path, packing
):
    words = ["--data_path", data, "--from_weight", student, "--teacher_weight", teacher]
    words += ["--learning_rate", 3e-3, "--log_interval", 1, "--epochs", 2, "--batch_size", 4]
    words += ["--cache_dir", tmp_path / "cache", packing]
    for out, more in (("asked", []), ("kept", ["--cache_teacher", 6400])):
        distill(*words, "--out_dir", tmp_path / out, *more)
    asked, kept = (read_metrics(tmp_path / out, NAME) for out in ("asked", "kept"))
    assert len(asked) == len(kept) > 5
    for ours, theirs in zip(kept, asked, strict=True):
        for name in ("loss", "kl", "cross_entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=LOSS)
    rates = [line["lr"] for line in asked if "lr" in line]
    start = load(student)
    asked, kept = (load(tmp_path / out / f"{NAME}.pth") for out in ("asked", "kept"))
    assert_same_training(kept, asked, rates)
    assert all((tensor - start[name]).abs().max() > 2e-3 for name, tensor in asked.items())


@pytest.mark.parametrize("kind", [PackedRows, PaddedRows])
def test_what_is_kept_of_a_row_is_what_the_teacher_says_of_its_targets(
    teacher, tokenizer, data, tmp_path, kind
):
    """For batches in any order; of each row its own targets, and none of another row."""
    dataset = SFTDataset(data, tokenizer, 97, cache_dir=tmp_path)
    rows = kind(dataset, 96) if kind is PackedRows else kind(dataset)
    model = MiniMindLM(LMConfig(**TEACHER, n_heads=4)).eval()
    model.load_state_dict(load(teacher))
    with pytest.MonkeyPatch.context() as patches:
        words = ["--teacher_weight", str(teacher), "--cache_teacher", "3", "--batch_size", "2"]
        patches.setattr(sys, "argv", ["train_distillation.py", *words, "--max_seq_len", "96"])
        args = train_distillation.parse_args()
    world = find_processes("cpu", ddp=False)
    ask = functools.partial(train_distillation.score_rows, model, rows, args, world, torch.float32)
    taught = TeacherTopK(rows, "key", 3, ask)
    assert len(taught) == len(rows) > 5
    batch = collate_with_teacher([taught[i] for i in (4, 0, 2)])
    with torch.no_grad():
        logits = model(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
        ).logits[batch["loss_mask"] > 0]
    expected = (logits / 2).log_softmax(-1).topk(3)
    sums = loss_sums(model.config, 96)
    assert_equal_to_rounding(batch["teacher_logps"], expected.values, sums)
    assert (batch["teacher_ids"] == expected.indices).float().mean() > 0.99
    assert (
        TeacherTopK(rows, "key", 3, lambda: pytest.fail("asked again"))[1].keys()
        == taught[1].keys()
    )
    assert "teacher_ids" not in collate_with_teacher([])


def test_the_teacher_is_asked_once(distill, teacher, student, data, tokenizer, tmp_path):
    words = ["--data_path", data, "--from_weight", student, "--cache_dir", tmp_path / "cache"]
    words += ["--out_dir", tmp_path / "out", "--cache_teacher", 8]

    def asked(*more):
        return "teacher: scored " in distill(*words, *more).stdout

    assert asked("--teacher_weight", teacher)
    assert not asked("--teacher_weight", teacher, "--learning_rate", 1e-3, "--alpha", 0.1)
    assert asked("--teacher_weight", teacher, "--temperature", 3)
    other = save(random_model(4, **TEACHER), tmp_path / "other" / "t.pth", tokenizer)
    assert asked("--teacher_weight", other)


# However it is split, and going on


@pytest.mark.parametrize("cached", [False, True], ids=["asked", "kept"])
def test_one_gradient_however_it_is_split(distill, teacher, student, data, tmp_path, cached):
    """As 1 process × 8, 1 × 2 × 4 and 2 × 2 × 2; 21 rows, so that some are left with none."""
    results = []
    shapes = [(1, 8, 1), (1, 2, 4), (2, 2, 2)]
    for processes, batch, accumulation in shapes[:1] + shapes[2:] if cached else shapes:
        out = tmp_path / f"{processes}x{batch}"
        distill(
            "--data_path", data, "--val_data_path", data, "--out_dir", out, "--from_weight",
            student, "--teacher_weight", teacher, "--no-packing", "--epochs", 2,
            "--learning_rate", 1e-3, "--log_interval", 1, "--batch_size", batch,
            "--accumulation_steps", accumulation, "--cache_dir", out,
            *(["--cache_teacher", 10] if cached else []),
            processes=processes,
        )  # fmt: skip
        results.append((read_metrics(out, NAME), load(out / f"{NAME}.pth")))
    (whole_metrics, whole), *others = results
    assert [line["step"] for line in whole_metrics] == [0, 1, 2, 3, 4, 5, 6, 6]
    for split_metrics, split in others:
        for ours, theirs in zip(split_metrics, whole_metrics, strict=True):
            assert ours["tokens"] == theirs["tokens"]
            for figure in ("loss", "val_loss", "kl", "cross_entropy"):
                assert ours.get(figure, 0) == pytest.approx(theirs.get(figure, 0), rel=1e-5)
            assert ours.get("grad_norm", 0) == pytest.approx(theirs.get("grad_norm", 0), rel=NORM)
        assert_same_training(split, whole, [line["lr"] for line in whole_metrics if "lr" in line])


@pytest.fixture(scope="module")
def whole(teacher, student, data):
    """The words of a run of 12 steps that evaluates, saves and drops out."""
    return [
        "--data_path", data, "--from_weight", student, "--teacher_weight", teacher, "--no-packing",
        "--epochs", 3, "--batch_size", 2, "--accumulation_steps", 2, "--learning_rate", 3e-3,
        "--dropout", 0.2, "--val_ratio", 0.3, "--save_best", "--save_interval", 3,
        "--eval_interval", 4, "--log_interval", 2, "--max_seq_len", 64, "--cache_teacher", 5,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(distill, whole, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    distill(*whole, "--out_dir", out)
    return out


def test_killed_and_resumed_is_as_not_killed(distill, whole, unbroken, data, tmp_path):
    """While the teacher is asked, between steps, in a window, in an evaluation, after a save."""
    copy = tmp_path / "data" / data.name
    copy.parent.mkdir()
    copy.write_bytes(data.read_bytes())
    out = tmp_path / "out"
    words = [*whole, "--data_path", copy, "--out_dir", out, "--resume"]
    for n, owner, name, how in [
        (2, MiniMindLM, "forward", {"when": evaluating}),  # the teacher's
        (3, Run, "add_step", {}),
        (8, MiniMindLM, "forward", {"when": learning}),
        (4, MiniMindLM, "forward", {"when": evaluating}),
        (1, Run, "save", {"after": True}),
    ]:
        with killed(n, owner, name, **how):
            distill(*words)
    distill(*words)
    assert_same(result(out, NAME), result(unbroken, NAME))


@pytest.mark.parametrize(
    ("words", "blamed"),
    [
        (["--alpha", "0.4"], "--alpha 0.4: 0.5 in"),
        (["--temperature", "1"], "--temperature 1.0: 2.0 in"),
        (["--cache_teacher", "6"], "--cache_teacher 6: 5 in"),
        (["--teacher_weight", "other"], "--teacher_weight: not what was used by"),
    ],
)
def test_what_may_not_change_is_named(distill, whole, unbroken, tokenizer, tmp_path, words, blamed):
    if words[0] == "--teacher_weight":
        path = save(random_model(7, **TEACHER), tmp_path / "t" / "t.pth", tokenizer)
        words = ["--teacher_weight", path]
    before = snapshot(unbroken)
    done = distill(*whole, "--out_dir", unbroken, "--resume", *words, code=2)
    assert done.stderr.startswith(f"train_distillation.py: error: {blamed}")
    assert snapshot(unbroken) == before


def test_a_mixture_of_experts_teaches_and_learns(distill, student, data, tokenizer, tmp_path):
    moe = save(
        random_model(3, use_moe=True),
        tmp_path / "pretrain_32_moe.pth",
        tokenizer,
    )
    words = ["--data_path", data, "--out_dir", tmp_path, "--batch_size", 4]
    words += ["--learning_rate", 1e-2, "--log_interval", 1]
    distill(*words, "--from_weight", student, "--teacher_weight", moe)
    distill(*words, "--use_moe", "--teacher_weight", student)
    for name, with_aux in ((NAME, False), (f"{NAME}_moe", True)):
        lines = read_metrics(tmp_path, name)
        assert lines[-1]["kl"] < lines[0]["kl"]
        assert ("aux_loss" in lines[0]) == with_aux


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--teacher_weight"),
        (["--teacher_weight", "nowhere.pth"], "--teacher_weight nowhere.pth: no file nowhere.pth"),
        (["--teacher_weight", "TEACHER", "--alpha", 1.5], "argument --alpha: must be at least 0"),
        (
            ["--teacher_weight", "TEACHER", "--temperature", 0],
            "argument --temperature: must be above 0",
        ),
        (
            ["--teacher_weight", "TEACHER", "--cache_teacher", 7000],
            "--cache_teacher 7000: there are 6400",
        ),
        (["--teacher_weight", "OTHER"], "trained with another tokenizer"),
        (["--teacher_weight", "SHORT"], "--max_seq_len 96 is above the model's context of 64"),
    ],
)
def test_mistakes_are_one_line(
    distill, teacher, student, data, tokenizer, tmp_path, words, message
):
    short = save(
        random_model(0, **TEACHER, max_seq_len=64), tmp_path / "in" / "short.pth", tokenizer
    )
    other = tmp_path / "in" / "other.pth"
    model = random_model(0, **TEACHER)
    save_weights(other, model, model.config, "full_sft", "of another tokenizer")
    files = {"TEACHER": teacher, "OTHER": other, "SHORT": short}
    words = [files.get(word, word) for word in words]
    out = tmp_path / "out"
    done = distill("--data_path", data, "--out_dir", out, "--from_weight", student, *words, code=2)
    assert message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train_distillation.py: error: ")
    assert not out.exists() or not any(Path(out).rglob("*.pth"))


def test_a_dry_run_asks_nobody(distill, teacher, student, data, tmp_path):
    shown = distill(
        "--data_path", data, "--out_dir", tmp_path / "out", "--from_weight", student,
        "--teacher_weight", teacher, "--cache_teacher", 4, "--cache_dir", tmp_path / "cache",
        "--dry_run",
    ).stdout  # fmt: skip
    size = sum(t.numel() for n, t in load(teacher).items() if n != "output.weight")
    assert f"teacher {teacher}: {size / 1e6:.2f} M parameters" in shown
    assert not list((tmp_path / "cache").rglob("teacher_*"))
