"""Preference training as users start it; what it learns is worked out by TRL."""

import functools
import json
import math
import random
import re
import signal
import sys

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from interruptions import (
    SHAPE,
    assert_same,
    at_call,
    evaluating,
    killed,
    learning,
    read_metrics,
    result,
    snapshot,
)
from rounding import LOSS, NORM, assert_same_training, gradient_sums, rounding
from tiny_models import (
    as_llama,
    assert_same_gradients,
    gradients,
    llama_with_weights_of,
    random_model,
    save_tuned,
)
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

import train_dpo
from dataset import DPODataset, PairRows, collate_pairs
from diagnosis.report import find_all
from model import LMConfig, MiniMindLM
from training import Run

NAME = "dpo_32"
ROWS = [*SHAPE, "--max_seq_len", 96]
LOSSES = {"sigmoid_norm": 0.5, "sigmoid": 0.1, "ipo": 0.1}  # with the default betas


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def prefer(run):
    return functools.partial(run, *ROWS, script="train_dpo.py")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tokenizer):
    """full_sft_32.pth, as the second stage leaves it, in a folder of its own."""
    return save_tuned(random_model(0), tmp_path_factory.mktemp("tuned"), tokenizer)


def pairs(count):
    """Replies of very different lengths to prompts of one or three messages."""
    found = []
    for i in range(count):
        prompt = [{"role": "user", "content": "blue 云 " * (1 + i % 4)}]
        if i % 3 == 0:
            hello = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "?"}]
            prompt = [*hello, *prompt]
        replies = ("yes " * (1 + 5 * i % 7), "不 no " * (1 + 3 * i % 5))
        sides = [[{"role": "assistant", "content": reply}] for reply in replies]
        found.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    return found


def write_pairs(path, records):
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs(21))


# TRL

# The project's template without the newline after the last message, which nothing learns.
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '</s>' }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def trl_trainer(model, reference, records, tokenizer_dir, folder, **settings):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = TEMPLATE
    config = DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        max_length=None,
        gradient_checkpointing=False,
        per_device_train_batch_size=len(records),
        adam_beta2=0.95,
        max_grad_norm=0.5,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        **settings,
    )
    return DPOTrainer(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradients_equal_trl(tokenizer_dir, tokenizer, tmp_path, loss_type):
    """On a reference of other weights than the model's; with the default beta."""
    records = pairs(6)
    ours, reference = random_model(1), random_model(2)
    dataset = DPODataset(write_pairs(tmp_path / "pairs.jsonl", records), tokenizer, 48, 48)
    batch = collate_pairs([PairRows(dataset)[i] for i in range(6)])
    with torch.no_grad():
        batch["reference"], *_ = train_dpo.reply_logps(reference, batch)
    words = ["train_dpo.py", "--loss_type", loss_type]
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(sys, "argv", words)
        args = train_dpo.parse_args()
    losses, *_ = train_dpo.pair_losses(ours, batch, args)
    losses.mean().backward()

    llama, frozen = llama_with_weights_of(ours), llama_with_weights_of(reference)
    trainer = trl_trainer(
        llama,
        frozen,
        records,
        tokenizer_dir,
        tmp_path,
        loss_type=[loss_type],
        beta=LOSSES[loss_type],
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(llama, inputs)
    loss.backward()
    assert losses.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    assert abs(loss.item() - (0.25 if loss_type == "ipo" else math.log(2))) > 1e-3
    expected = gradients(llama)
    assert all(gradient.any() for gradient in expected.values())
    found = as_llama(gradients(ours), ours.config)
    assert_same_gradients(found, expected, gradient_sums(ours.config, 96, rows=12))


def test_three_steps_are_those_of_trl(prefer, tuned, tokenizer_dir, tmp_path):
    """Loss, gradient norm, rewards and log-probabilities of every step, and the last weights."""
    records = pairs(8)
    prefer(
        "--data_path", write_pairs(tmp_path / "pairs.jsonl", records), "--out_dir", tmp_path,
        "--from_weight", tuned, "--loss_type", "sigmoid", "--beta", 0.3, "--epochs", 3,
        "--learning_rate", 1e-3, "--lr_decay", "constant", "--warmup_iters", 0,
        "--log_interval", 1,
    )  # fmt: skip
    ours = read_metrics(tmp_path, NAME)
    llama, frozen = (llama_with_weights_of(random_model(0)) for _ in range(2))
    trainer = trl_trainer(
        llama, frozen, records, tokenizer_dir, tmp_path, loss_type=["sigmoid"], beta=0.3,
        learning_rate=1e-3, num_train_epochs=3,
    )  # fmt: skip
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2, 3]
    names = {
        "loss": "loss",
        "grad_norm": "grad_norm",
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
        "margin": "rewards/margins",
        "chosen_logp": "logps/chosen",
        "rejected_logp": "logps/rejected",
    }
    for our_line, their_line in zip(ours, theirs, strict=True):
        # Rewards and log-odds are small differences of large sums, with the rounding of these.
        close = {"rel": NORM, "abs": rounding(1) * abs(their_line["logps/chosen"])}
        for name, their_name in names.items():
            assert our_line[name] == pytest.approx(their_line[their_name], **close), name
        log_odds = their_line["logps/chosen"] - their_line["logps/rejected"]
        assert our_line["log_odds"] == pytest.approx(log_odds, **close)
    assert ours[0]["accuracy"] == 0.5  # of ties, which TRL counts as wrong
    assert ours[2]["accuracy"] == theirs[2]["rewards/accuracies"] > 0.9
    model = random_model(0)
    start = model.state_dict()
    model.load_state_dict(torch.load(tmp_path / f"{NAME}.pth", weights_only=True))
    found, expected = as_llama(model.state_dict(), model.config), llama.state_dict()
    assert_same_training(found, {name: expected[name] for name in found}, [1e-3] * 3)
    assert all((t - random_model(0).state_dict()[n]).abs().max() > 1e-3 for n, t in start.items())


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_label_smoothing_by_hand(loss_type):
    """The loss of a pair the right way round and of the same one the wrong way round, weighted."""
    logps, reference = torch.tensor([-3.0, -8.0]), torch.tensor([-4.0, -5.0])
    lengths = torch.tensor([2.0, 4.0])
    losses, figures = train_dpo.preference_losses(logps, reference, lengths, loss_type, 0.7, 0.2)
    gain = {"sigmoid": 1 + 3, "sigmoid_norm": 1 / 2 + 3 / 4}[loss_type]

    def loss(gain):
        return math.log(1 + math.exp(-0.7 * gain))

    assert losses.tolist() == pytest.approx([0.8 * loss(gain) + 0.2 * loss(-gain)])
    assert figures["margin"].tolist() == pytest.approx([0.7 * gain])


# The first evaluation, by hand


def reply_logp(llama, tokenizer, prompt, reply):
    """Log-probability of a reply by the tokenizer's own template, and the number of its tokens."""

    def encode(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)

    ids = torch.tensor(encode([*prompt, *reply])[:-1])  # without the newline
    begin = len(encode(prompt, add_generation_prompt=True))
    with torch.no_grad():
        logits = llama(ids[None]).logits[0, begin - 1 : -1]
    return -F.cross_entropy(logits, ids[begin:], reduction="sum").item(), len(ids) - begin


def test_the_starting_weights_are_scored_first(prefer, tuned, data, tokenizer, tmp_path):
    val = pairs(5)
    prefer(
        "--data_path", data, "--val_data_path", write_pairs(tmp_path / "val.jsonl", val),
        "--test_data_path", tmp_path / "val.jsonl", "--out_dir", tmp_path, "--from_weight", tuned,
        "--learning_rate", 3e-3, "--log_interval", 1,
    )  # fmt: skip
    first, *_, test = read_metrics(tmp_path, NAME)
    llama = llama_with_weights_of(random_model(0))
    means = {
        side: [
            total / length
            for total, length in (reply_logp(llama, tokenizer, p["prompt"], p[side]) for p in val)
        ]
        for side in ("chosen", "rejected")
    }
    assert (first["step"], first["val_accuracy"], first["val_margin"]) == (0, 0.5, 0)
    assert first["val_loss"] == pytest.approx(math.log(2), rel=1e-6)
    for side, values in means.items():
        assert first[f"val_{side}_logp"] == pytest.approx(sum(values) / 5, rel=1e-5)
        assert first[f"val_{side}_reward"] == 0
    log_odds = first["val_chosen_logp"] - first["val_rejected_logp"]
    close = rounding(5) * abs(first["val_chosen_logp"])
    assert first["val_log_odds"] == pytest.approx(log_odds, abs=close)
    trained = MiniMindLM(LMConfig(dim=32, n_layers=1))
    trained.load_state_dict(torch.load(tmp_path / f"{NAME}_best.pth", weights_only=True))
    llama = llama_with_weights_of(trained)
    rewards = [
        0.5 * (total / length - before)
        for side, befores in means.items()
        for p, before in zip(val, befores, strict=True)
        for total, length in [reply_logp(llama, tokenizer, p["prompt"], p[side])]
    ]
    assert test["test_chosen_reward"] == pytest.approx(sum(rewards[:5]) / 5, rel=NORM)
    assert test["test_rejected_reward"] == pytest.approx(sum(rewards[5:]) / 5, rel=NORM)
    margins = [a - b for a, b in zip(rewards[:5], rewards[5:], strict=True)]
    assert test["test_accuracy"] == sum(m > 0 for m in margins) / 5 == 1
    assert test["test_margin"] == pytest.approx(sum(margins) / 5, rel=NORM)
    about = json.loads((tmp_path / f"{NAME}.json").read_text(encoding="utf-8"))
    assert about["stage"] == "dpo"


def test_a_reference_of_other_batches_leaves_ties(prefer, tuned, data, tmp_path):
    """A model that is the reference prefers nothing, though rounding differs between batches."""
    words = ["--data_path", data, "--val_data_path", data, "--from_weight", tuned]
    words += ["--eval_interval", 100, "--cache_dir", tmp_path]
    for batch_size in (7, 1, 2, 3):  # the first fills the store
        out = tmp_path / f"{batch_size}"
        prefer(*words, "--out_dir", out, "--batch_size", batch_size)
        assert read_metrics(out, NAME)[0]["val_accuracy"] == 0.5


# However it is split, and going on


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_one_gradient_however_it_is_split(prefer, tuned, data, tokenizer, tmp_path, moe):
    """As 1 process × 8, 1 × 2 × 4 and, dense, 2 × 2 × 2; 21 pairs, so that some rows are empty."""
    words, start = ["--from_weight", tuned], tuned
    if moe:
        start = save_tuned(random_model(0, use_moe=True), tmp_path, tokenizer, "full_sft_32_moe")
        words = ["--from_weight", start, "--use_moe"]
    name = f"{NAME}_moe" if moe else NAME
    results = []
    for processes, batch, accumulation in [(1, 8, 1), (1, 2, 4), (2, 2, 2)][: 2 if moe else 3]:
        out = tmp_path / f"{processes}x{batch}"
        prefer(
            "--data_path", data, "--val_data_path", data, "--out_dir", out, *words,
            "--cache_dir", out, "--epochs", 2, "--learning_rate", 1e-3, "--log_interval", 1,
            "--batch_size", batch, "--accumulation_steps", accumulation,
            processes=processes,
        )  # fmt: skip
        weights = torch.load(out / f"{name}.pth", weights_only=True)
        results.append((read_metrics(out, name), weights))
    (whole_metrics, whole), *others = results
    assert [line["step"] for line in whole_metrics] == [0, 1, 2, 3, 4, 5, 6, 6]
    before = torch.load(start, weights_only=True)
    for tensor_name, tensor in whole.items():  # an expert may get no token of so few
        assert (tensor - before[tensor_name]).abs().max() > 1e-3 or "experts" in tensor_name
    close = {"rel": LOSS, "abs": 10 * rounding(16)}  # differences of 8 pairs' logps of about -10
    for split_metrics, split in others:
        for ours, theirs in zip(split_metrics, whole_metrics, strict=True):
            for figure in ("step", "tokens", "accuracy", "val_accuracy"):
                assert ours.get(figure) == theirs.get(figure)
            for figure in ("loss", "val_loss", "margin", "log_odds", "chosen_reward"):
                assert ours.get(figure, 0) == pytest.approx(theirs.get(figure, 0), **close)
            assert ours.get("grad_norm", 0) == pytest.approx(theirs.get("grad_norm", 0), rel=NORM)
        assert_same_training(split, whole, [line["lr"] for line in whole_metrics if "lr" in line])


@pytest.fixture(scope="module")
def whole(tuned, data):
    """The words of a run of 12 steps that evaluates, saves and drops out."""
    return [
        "--data_path", data, "--from_weight", tuned, "--epochs", 3, "--batch_size", 2,
        "--accumulation_steps", 2, "--learning_rate", 1e-3, "--dropout", 0.2, "--val_ratio", 0.3,
        "--save_best", "--save_interval", 3, "--eval_interval", 4, "--log_interval", 2,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(prefer, whole, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    prefer(*whole, "--out_dir", out)
    return out


def test_killed_and_resumed_is_as_not_killed(prefer, whole, unbroken, data, tmp_path):
    """In the reference pass, between steps, in a window, in an evaluation, after a save."""
    copy = tmp_path / "data" / data.name
    copy.parent.mkdir()
    copy.write_bytes(data.read_bytes())
    out = tmp_path / "out"
    words = [*whole, "--data_path", copy, "--out_dir", out, "--resume"]
    for n, owner, name, how in [
        (3, MiniMindLM, "forward", {"when": evaluating}),
        (2, Run, "add_step", {}),
        (8, MiniMindLM, "forward", {"when": learning}),
        (6, MiniMindLM, "forward", {"when": evaluating}),
        (1, Run, "save", {"after": True}),
    ]:
        with killed(n, owner, name, **how):
            prefer(*words)
    prefer(*words)
    assert_same(result(out, NAME), result(unbroken, NAME))
    steps = [line["step"] for line in read_metrics(out, NAME) if "val_loss" in line]
    assert steps == [0, 4, 8, 12]


def test_the_reference_is_that_of_the_starting_weights_on_going_on_too(
    prefer, whole, unbroken, data, tmp_path
):
    """Though what was kept of it is gone, and the model has moved."""
    words = [*whole, "--cache_dir", tmp_path / "cache", "--out_dir", tmp_path / "out", "--resume"]
    with killed(2, Run, "save", after=True):
        prefer(*words)
    kept = list((tmp_path / "cache").rglob("reference_*"))
    assert kept
    words[words.index("--cache_dir") + 1] = tmp_path / "another"
    shown = prefer(*words).stdout
    assert shown.count("reference on ") == 2
    ours, theirs = (result(out, NAME) for out in (tmp_path / "out", unbroken))
    for left in (ours, theirs):
        del left[f"{NAME}_resume.pth"]["arguments"]["cache_dir"]
    assert_same(ours, theirs)


def test_the_reference_is_scored_once(prefer, tuned, tokenizer, data, tmp_path):
    """Later runs on the same data read it, whatever their flags; not those of other weights."""
    words = ["--data_path", data, "--cache_dir", tmp_path / "cache", "--val_ratio", 0.2]

    def scored(*more):
        shown = prefer(*words, "--out_dir", tmp_path / "out", *more).stdout
        return re.findall(r"^reference on .*: (\d+) pairs in ", shown, re.MULTILINE)

    assert scored("--from_weight", tuned) == ["17", "4"]
    same = ["--loss_type", "ipo", "--beta", 0.2, "--learning_rate", 1e-4, "--epochs", 2]
    assert scored("--from_weight", tuned, *same) == []
    other = save_tuned(random_model(5), tmp_path, tokenizer)
    assert scored("--from_weight", other) == ["17", "4"]
    assert scored("--from_weight", tuned, "--val_ratio", 0.5) == ["11", "10"]


def test_a_signal_in_the_reference_pass_ends_the_run_before_its_first_step(
    prefer, tuned, data, tmp_path
):
    words = ["--data_path", data, "--from_weight", tuned, "--out_dir", tmp_path / "out"]
    words += ["--cache_dir", tmp_path / "cache", "--val_ratio", 0.2]
    with at_call(2, MiniMindLM, "forward", lambda: signal.raise_signal(signal.SIGTERM)):
        shown = prefer(*words, code=143).stdout
    assert "stopped by SIGTERM at step 0" in shown
    start = torch.load(tuned, weights_only=True)
    assert_same(dict(torch.load(tmp_path / "out" / f"{NAME}.pth", weights_only=True)), dict(start))
    shown = prefer(*words, "--resume").stdout
    assert shown.count("reference on ") == 2
    assert read_metrics(tmp_path / "out", NAME)[-1]["step"] == 3


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from_weight", "none"], "--from_weight none: a preference needs a model to compare"),
        (["--label_smoothing", 0.5], "--label_smoothing 0.5: must be below 0.5"),
        (["--loss_type", "ipo", "--label_smoothing", 0.1], "--label_smoothing: ipo has none"),
        (["--beta", 0], "argument --beta: must be above 0, not 0"),
        (
            ["--max_prompt_length", 96],
            "--max_prompt_length 96 and --max_completion_length 0 do not",
        ),
        (["--max_completion_length", 200], "--max_completion_length 200 do not share a row"),
        (
            ["--max_prompt_length", 50, "--max_completion_length", 50],
            "do not share a row of --max_seq_len 96",
        ),
        (["--packing"], "unknown argument --packing"),
    ],
)
def test_mistakes_are_one_line(prefer, data, tmp_path, words, message):
    done = prefer("--data_path", data, "--out_dir", tmp_path, *words, code=2)
    assert message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train_dpo.py: error: ")
    assert not any(tmp_path.iterdir())


def test_missing_weights_are_named(prefer, data, tmp_path):
    done = prefer("--data_path", data, "--out_dir", tmp_path, code=2)
    missing = tmp_path / "full_sft_32.pth"
    said = f"--from_weight full_sft: no file {missing}; {tmp_path} holds no weights"
    assert done.stderr == f"train_dpo.py: error: {said}\n"


@pytest.mark.parametrize(
    ("words", "blamed"),
    [
        (["--beta", "0.2"], "--beta 0.2: 0.5 in"),
        (["--loss_type", "sigmoid"], "--loss_type sigmoid: sigmoid_norm in"),
        (
            ["--max_prompt_length", "40", "--max_completion_length", "48"],
            "--max_prompt_length 40: 48",
        ),
        (["--from_weight", "other"], "--from_weight: not what was used by"),
    ],
)
def test_what_may_not_change_is_named(prefer, whole, unbroken, tokenizer, tmp_path, words, blamed):
    if words[0] == "--from_weight":
        words = ["--from_weight", save_tuned(random_model(7), tmp_path, tokenizer)]
    before = snapshot(unbroken)
    done = prefer(*whole, "--out_dir", unbroken, "--resume", *words, code=2)
    assert done.stderr.startswith(f"train_dpo.py: error: {blamed}")
    assert snapshot(unbroken) == before


# The report


def lines_of(margins, interval=1, **more):
    """Training lines with those margins, of so many steps each."""
    about = {"loss": 0.6, "chosen_reward": 0.1, **more}
    return [
        {"step": interval * i, "tokens": 100 * interval * i, "margin": margin, **about}
        for i, margin in enumerate(margins, 1)
    ]


def evaluation(step, accuracy, reward=0.1, margin=0.5):
    return {
        "step": step, "tokens": 100 * step, "val_loss": 0.6, "val_accuracy": accuracy,
        "val_chosen_reward": reward, "val_margin": margin,
    }  # fmt: skip


NOISE = [0.02, -0.03, 0.01, 0.03, -0.02, 0.0, -0.01] * 10
GROWING = [0.02 * i + NOISE[i] for i in range(30)]


@pytest.mark.parametrize(
    ("metrics", "alarm", "text"),
    [
        (lines_of(GROWING), False, "The log-odds of the chosen replies grow"),
        (lines_of(NOISE[:30]), True, "The log-odds stall"),
        (lines_of([0.5, 0.5, 0.0, 0.0] * 8, 10), True, "The log-odds swing"),
        (lines_of(([0.5] * 10 + [0.0] * 10) * 8), True, "The log-odds swing"),
        (
            [*lines_of(GROWING), evaluation(0, 0.5), evaluation(30, 0.9)],
            False,
            "The validation accuracy: 50.0% at the start, 90.0% at best, 90.0% at the end",
        ),
        (
            [*lines_of(GROWING), *(evaluation(i, a) for i, a in enumerate((0.5, 0.9, 0.8)))],
            True,
            "The validation accuracy falls: 50.0% at the start, 90.0% at best, 80.0% at the end",
        ),
        (
            [*lines_of(GROWING), evaluation(0, 0.5), evaluation(30, 0.9, reward=-2, margin=1.5)],
            True,
            "The log-probability of the chosen replies collapses",
        ),
        (
            lines_of(GROWING, chosen_reward=-3.0),
            True,
            "The log-probability of the chosen replies collapses",
        ),
        (lines_of(GROWING), False, "The chosen replies keep their log-probability"),
        (
            [*lines_of(GROWING), evaluation(30, 0.9, reward=-1e-6, margin=1e-7)],
            False,
            "The chosen replies keep their log-probability",
        ),
        (
            [*lines_of(GROWING), evaluation(30, 1.0, reward=-5, margin=6)],
            True,
            "The log-probability of the chosen replies collapses",
        ),
        (
            [*lines_of(GROWING), evaluation(30, 1.0, reward=-1, margin=6)],
            False,
            "The chosen replies lose some log-probability, the rejected more",
        ),
        (
            lines_of([3 * (1 - math.exp(-i)) for i in range(60)]),
            False,
            "The log-odds of the chosen replies have grown early and hold",
        ),
        (
            lines_of([3 * (1 - math.exp(-i)) - 0.04 * i for i in range(60)]),
            True,
            "The log-odds fall again",
        ),
    ],
)
def test_the_report_reads_the_curves(metrics, alarm, text):
    findings = find_all(metrics)
    found = [finding for finding in findings if finding.text.startswith(text)]
    assert [finding.stands_out for finding in found] == [alarm]


@pytest.mark.parametrize(
    ("margins", "alarm", "text"),
    [
        ([0.01], True, "stall, from a margin of 0 at the start to 0.010 at the end"),
        ([0.4], False, "of the chosen replies grow"),
        ([0.02, 0.05], True, "stall"),
        ([0.02, 0.05, 0.09], False, "of the chosen replies grow"),  # in order, 0 at the start too
        ([0.02, 0.09, 0.05], True, "stall"),
        ([0.1, 0.5, 0.8], False, "of the chosen replies grow"),
        ([-0.01, -0.04, -0.09], True, "fall, from a margin of -0.010"),
        ([-0.2], True, "fall, from a margin of 0 at the start to -0.200 at the end"),
        ([0.2, 0.6, 0.4], False, "of the chosen replies have grown early and hold"),
        ([0.2, 0.6, 0.29], True, "fall again"),
        (NOISE[:11], True, "stall"),
        ([0.02 * i + NOISE[i] for i in range(11)], False, "of the chosen replies grow"),
    ],
)
def test_few_lines_are_read_too(margins, alarm, text):
    for interval in (1, 10, 100):
        findings = find_all(lines_of(margins, interval))
        (found,) = (finding for finding in findings if finding.text.startswith("The log-odds"))
        assert found.text.startswith(f"The log-odds {text}") and found.stands_out is alarm


def test_batches_that_scatter_are_no_finding():
    """Of 4 pairs each, whose margins differ by more than all that is gained."""
    for seed in range(100):
        dice = random.Random(seed)
        n = dice.choice([30, 60, 200])
        gains = [1.5 * (1 - math.exp(-2 * i / n)) for i in range(n)]
        margins = [sum(dice.gauss(gain, 1) for _ in range(4)) / 4 for gain in gains]
        losses = [
            sum(math.log1p(math.exp(-dice.gauss(gain, 1))) for _ in range(4)) / 4 for gain in gains
        ]
        metrics = lines_of(margins)
        for line, loss in zip(metrics, losses, strict=True):
            line["loss"] = loss
        metrics[0]["loss"] = math.log(2)
        found = [finding.text for finding in find_all(metrics) if finding.stands_out]
        assert found == [], seed


def test_pairs_that_end_worse_than_they_began_come_first():
    rising = {"loss": 0.9}
    worse = [evaluation(0, 0.5) | {"val_loss": 0.693}, evaluation(30, 0.5) | {"val_loss": 0.8}]
    first, *others = find_all([*lines_of(NOISE[:30]), *worse])
    assert first.stands_out and "0.800" in first.text and "0.693" in first.text
    assert any(finding.text.startswith("The log-odds stall") for finding in others)
    metrics = lines_of(NOISE[:29], **rising)
    metrics.insert(0, {**metrics[0], "step": 0, "loss": 0.693})
    first, *_ = find_all(metrics)
    assert first.text.startswith("The loss rose from 0.693 up to step 0 to 0.900")


@pytest.mark.parametrize(("share", "alarm"), [(0.81, False), (0.79, True)])
def test_a_test_far_below_validation(share, alarm):
    metrics = [*lines_of(GROWING), evaluation(0, 0.5), evaluation(30, 0.9) | {"val_loss": 0.5}]
    findings = find_all([*metrics, {"test_loss": 0.5, "test_accuracy": share}])
    (found,) = (finding for finding in findings if "test accuracy" in finding.text)
    assert found.stands_out is alarm and f"{share:.1%}, that of validation 90.0%" in found.text


def test_a_run_of_thirty_steps_has_its_log_odds_read(prefer, tuned, data, tmp_path):
    """With the default of --log_interval, which notes every step."""
    prefer(
        "--data_path", data, "--out_dir", tmp_path, "--from_weight", tuned, "--epochs", 3,
        "--batch_size", 2, "--learning_rate", 3e-3,
    )  # fmt: skip
    assert [line["step"] for line in read_metrics(tmp_path, NAME)] == list(range(1, 34))
    report = (tmp_path / "logs" / NAME / "report.md").read_text(encoding="utf-8")
    assert "The log-odds of the chosen replies grow, from a margin of " in report
    assert "training lines on" not in report


def test_the_report_tells_accuracy_and_margin(unbroken):
    report = (unbroken / "logs" / NAME / "report.md").read_text(encoding="utf-8")
    best = min(
        (m for m in read_metrics(unbroken, NAME) if "val_loss" in m), key=lambda m: m["val_loss"]
    )
    assert f"accuracy {best['val_accuracy']:.1%}, margin {best['val_margin']:.3f}" in report
