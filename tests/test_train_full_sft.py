"""Instruction tuning as users start it; what it learns is worked out by transformers' Llama."""

import functools
import json
import math
from unittest.mock import ANY

import pytest
import torch
import torch.nn.functional as F
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
from rounding import LOSS, NORM, assert_same_training
from tiny_models import llama_with_weights_of, randomised

from model import LMConfig, MiniMindLM, mean_scores, save_weights, tokenizer_hash
from training import Run

NAME = "full_sft_32"
ROWS = [*SHAPE, "--max_seq_len", 96]
WORDS = ["red", "green", "blue", "一座山", "河流", "stone", "云"]


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def tune(run):
    return functools.partial(run, *ROWS, script="train_full_sft.py")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, tokenizer):
    """pretrain_32.pth, as the first stage leaves it, in a folder of its own."""
    torch.manual_seed(0)
    model = randomised(MiniMindLM(LMConfig(dim=32, n_layers=1)))
    path = tmp_path_factory.mktemp("pretrained") / "pretrain_32.pth"
    save_weights(path, model, model.config, "pretrain", tokenizer_hash(tokenizer))
    return path


def chat(*texts, system=None):
    """Messages of a user and the assistant by turns."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant") * (len(texts) // 2)
    return messages + [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]


def chats(count):
    """Conversations of one to three exchanges with answers of very different lengths."""

    def text(i, j):
        return " ".join(WORDS[i * k % 7] for k in range(1, 2 + (5 * i + j) % 13))

    return [chat(*(text(i, j) for j in range(2 + 2 * (i % 3)))) for i in range(count)]


def known_of(weights):
    """What a weight file's .json says of the conversations that it was trained on."""
    about = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    return about["longest_conversation"], about["examples"]


def test_weights_remember_conversations_and_pass_that_on(tune, run, pretrained, data, tmp_path):
    """The longest of all that they were trained on, and questions of the newest validation data."""
    words = ["--out_dir", tmp_path, "--epochs", 1]
    short = write_chats(tmp_path / "short.jsonl", [chat("one", "two"), chat("three", "four")])
    tune("--data_path", data, "--from_weight", pretrained, *words)
    longest, examples = known_of(tmp_path / "full_sft_32.pth")
    firsts = [messages[0]["content"] for messages in chats(21)]
    assert longest["exchanges"] == 3 and len(examples) == 6 and set(examples) <= set(firsts)
    more = ["--from_weight", "full_sft", "--run_name", "more", "--val_data_path", short]
    tune("--data_path", short, *more, *words)
    assert known_of(tmp_path / "full_sft_32_more.pth") == (longest, ANY)
    assert sorted(known_of(tmp_path / "full_sft_32_more.pth")[1]) == ["one", "three"]
    tune("--data_path", short, *more, *words[:2], "--epochs", 2, "--resume")
    assert known_of(tmp_path / "full_sft_32_more.pth") == (longest, ANY)
    pair = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(f"{json.dumps(pair)}\n" * 2, encoding="utf-8")
    base = tmp_path / "full_sft_32_more.pth"
    run("--data_path", pairs, *SHAPE, "--from_weight", base, *words, script="train_dpo.py")
    assert known_of(tmp_path / "dpo_32.pth") == known_of(tmp_path / "full_sft_32_more.pth")


def write_chats(path, conversations):
    lines = (json.dumps({"messages": m}, ensure_ascii=False) + "\n" for m in conversations)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """21 conversations, each short enough to be used whole."""
    return write_chats(tmp_path_factory.mktemp("data") / "train.jsonl", chats(21))


def llama_of(path):
    """The weights in a file as transformers' Llama."""
    model = MiniMindLM(LMConfig(dim=32, n_layers=1))
    model.load_state_dict(torch.load(path, weights_only=True))
    return llama_with_weights_of(model)


def answer_losses(llama, tokenizer, messages):
    """Of each answer the losses of its tokens and its </s>, by the tokenizer's own template."""

    def encode(some, **options):
        return tokenizer.apply_chat_template(some, tokenize=True, return_dict=False, **options)

    ids = torch.tensor(encode(messages))
    losses = F.cross_entropy(llama(ids[None]).logits[0, :-1], ids[1:], reduction="none")
    answers = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            begin = len(encode(messages[:i], add_generation_prompt=True))
            end = len(encode(messages[: i + 1])) - 1  # without the newline after </s>
            assert ids[end - 1] == tokenizer.eos_token_id
            answers.append(losses[begin - 1 : end - 1])  # losses[i] is that of ids[i + 1]
    return answers


def all_answers(llama, tokenizer, conversations):
    return [a for messages in conversations for a in answer_losses(llama, tokenizer, messages)]


def answer_bytes(conversations):
    texts = [m["content"] for messages in conversations for m in messages]
    answers = [m["content"] for c in conversations for m in c if m["role"] == "assistant"]
    assert 0 < len(answers) < len(texts)
    return sum(len(answer.encode("utf-8")) for answer in answers)


@torch.no_grad()
def scores_by_hand(path, tokenizer, conversations):
    """Mean loss of the answers' tokens, perplexity, bits per byte."""
    losses = torch.cat(all_answers(llama_of(path), tokenizer, conversations)).double()
    mean = losses.mean().item()
    bits = losses.sum().item() / math.log(2) / answer_bytes(conversations)
    return pytest.approx((mean, math.exp(mean), bits), rel=1e-5)


def scores(line, kind="val"):
    return tuple(line[f"{kind}_{unit}"] for unit in ("loss", "perplexity", "bits_per_byte"))


# What it starts from


def test_the_starting_weights_are_scored_first(tune, pretrained, data, tokenizer, tmp_path):
    """Then those after the last step, and the weights are the second stage's."""
    for file in (pretrained, pretrained.with_suffix(".json")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    val = [
        chat("Hi", "Hello 你好", "你是谁？", "我是 MiniMind。", system="Be kind"),
        chat("17 + 4", "21"),
        chat("", "green " * 20),
    ]
    val_path = write_chats(tmp_path / "val.jsonl", val)
    done = tune(
        "--data_path", data, "--val_data_path", val_path, "--out_dir", tmp_path,
        "--batch_size", 2, "--learning_rate", 1e-2, "--log_interval", 1,
    )  # fmt: skip
    first, *others = read_metrics(tmp_path, NAME)
    assert (first["step"], first["tokens"]) == (0, 0)
    assert scores(first) == scores_by_hand(pretrained, tokenizer, val)
    shown = done.stdout
    assert f"  val_loss {first['val_loss']:.4f}  " in shown
    assert shown.index("step 0/") < shown.index("val_loss") < shown.index("step 1/")
    assert scores(others[-1]) == scores_by_hand(tmp_path / f"{NAME}.pth", tokenizer, val)
    assert others[-1]["val_loss"] < first["val_loss"] - 1
    about = json.loads((tmp_path / f"{NAME}.json").read_text(encoding="utf-8"))
    assert about["stage"] == "full_sft"


def test_without_pretrained_weights_it_says_which_are_missing(tune, data, tmp_path):
    done = tune("--data_path", data, "--out_dir", tmp_path, code=2)
    missing = tmp_path / "pretrain_32.pth"
    error = f"--from_weight pretrain: no file {missing}; {tmp_path} holds no weights"
    assert done.stderr == f"train_full_sft.py: error: {error}\n"
    assert not any(tmp_path.glob("*.pth"))


def test_from_scratch(tune, data, tokenizer, tmp_path):
    """The first scores are those of a new model of the seed; no file of weights is read."""
    val = [chat("Hi", "Hello 你好")]
    tune(
        "--data_path", data, "--val_data_path", write_chats(tmp_path / "val.jsonl", val),
        "--out_dir", tmp_path / "out", "--from_weight", "none", "--seed", 7,
    )  # fmt: skip
    torch.manual_seed(7)
    torch.save(MiniMindLM(LMConfig(dim=32, n_layers=1)).state_dict(), tmp_path / "new.pth")
    first = read_metrics(tmp_path / "out", NAME)[0]
    assert first["step"] == 0
    assert scores(first) == scores_by_hand(tmp_path / "new.pth", tokenizer, val)


# What is learnt


@pytest.mark.parametrize("weighting", ["token", "sample"])
def test_loss_weighting_by_hand(tune, pretrained, tokenizer, tmp_path, weighting):
    """Loss and gradient of one step over four answers of 1 to 20 words, one that counts half.

    Scores are means over tokens either way.
    """
    conversations = [
        chat("Hi", "red", "More", "blue stone " * 10),
        chat("你好", "一座山 河流 云", "Bye", "green"),
    ]
    conversations[1][3]["weight"] = 0.5
    path = write_chats(tmp_path / "train.jsonl", conversations)
    val = write_chats(tmp_path / "val.jsonl", [c[:2] for c in conversations])
    tune(
        "--data_path", path, "--val_data_path", val, "--out_dir", tmp_path, "--from_weight",
        pretrained, "--loss_weighting", weighting, "--log_interval", 1,
    )  # fmt: skip
    llama = llama_of(pretrained)
    answers = all_answers(llama, tokenizer, conversations)
    weighted = list(zip(answers, [1, 1, 1, 0.5], strict=True))
    means = {
        "token": sum(w * a.sum() for a, w in weighted) / sum(w * len(a) for a, w in weighted),
        "sample": sum(w * a.mean() for a, w in weighted) / sum(w for _, w in weighted),
    }
    assert abs(means["token"] - means["sample"]) > 0.01
    loss = means[weighting]
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in llama.parameters()]).norm()
    first, step, *_ = read_metrics(tmp_path, NAME)
    assert step["step"] == 1
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert step["grad_norm"] == pytest.approx(norm.item(), rel=NORM)
    assert step["tokens"] == sum(map(len, answers))
    assert scores(first) == scores_by_hand(pretrained, tokenizer, [c[:2] for c in conversations])


@pytest.mark.parametrize("max_turns", [1, 2, 3])
def test_max_turns_by_hand(tune, pretrained, tokenizer, tmp_path, max_turns):
    """The last exchanges alone are read and learnt, after the system message."""
    system, *messages = chat("1", "red", "2", "green 云", "3", "blue " * 5, system="Be kind")
    path = write_chats(tmp_path / "train.jsonl", [[system, *messages]])
    tune(
        "--data_path", path, "--val_data_path", path, "--out_dir", tmp_path, "--from_weight",
        pretrained, "--max_turns", max_turns, "--log_interval", 1,
    )  # fmt: skip
    kept = [[system, *messages[-2 * max_turns :]]]
    losses = torch.cat(all_answers(llama_of(pretrained), tokenizer, kept))
    first, step, *_ = read_metrics(tmp_path, NAME)
    assert scores(first) == scores_by_hand(pretrained, tokenizer, kept)
    assert step["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert step["tokens"] == len(losses)


def test_one_gradient_however_it_is_split(tune, pretrained, data, tmp_path):
    """As 1 process × 8, 1 × 2 × 4 and 2 × 2 × 2; 21 rows, whose targets weigh differently."""
    results = []
    for processes, batch, accumulation in [(1, 8, 1), (1, 2, 4), (2, 2, 2)]:
        out = tmp_path / f"{processes}x{batch}"
        tune(
            "--data_path", data, "--val_data_path", data, "--out_dir", out, "--from_weight",
            pretrained, "--loss_weighting", "sample", "--no-packing", "--epochs", 2,
            "--learning_rate", 1e-3, "--log_interval", 1, "--batch_size", batch,
            "--accumulation_steps", accumulation,
            processes=processes,
        )  # fmt: skip
        results.append(
            (read_metrics(out, NAME), torch.load(out / f"{NAME}.pth", weights_only=True))
        )
    (whole_metrics, whole), *others = results
    assert [line["step"] for line in whole_metrics] == [0, 1, 2, 3, 4, 5, 6, 6]
    start = torch.load(pretrained, weights_only=True)
    assert all((tensor - start[name]).abs().max() > 1e-3 for name, tensor in whole.items())
    for split_metrics, split in others:
        for ours, theirs in zip(split_metrics, whole_metrics, strict=True):
            for name in ("step", "tokens"):
                assert ours[name] == theirs[name]
            for name in ("loss", "val_loss", "val_bits_per_byte"):
                assert ours.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=LOSS)
            # Which AdamW and clipping would make up for if it were a multiple of what it should be.
            assert ours.get("grad_norm", 0) == pytest.approx(theirs.get("grad_norm", 0), rel=NORM)
        assert_same_training(split, whole, [line["lr"] for line in whole_metrics if "lr" in line])


# Going on


@pytest.fixture(scope="module")
def whole(pretrained, data):
    """The words of a run of 12 steps that evaluates, saves and drops out."""
    return [
        "--data_path", data, "--from_weight", pretrained, "--max_turns", 2, "--loss_weighting",
        "sample", "--no-packing", "--epochs", 3, "--batch_size", 2, "--accumulation_steps", 2,
        "--learning_rate", 3e-3, "--dropout", 0.2, "--val_ratio", 0.3, "--save_best",
        "--save_interval", 3, "--eval_interval", 4, "--log_interval", 2, "--max_seq_len", 64,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tune, whole, tmp_path_factory):
    """Folder of that run."""
    out = tmp_path_factory.mktemp("unbroken")
    tune(*whole, "--out_dir", out)
    return out


def test_killed_and_resumed_is_as_not_killed(tune, whole, unbroken, tmp_path):
    """In the first evaluation, between steps, in a window, in an evaluation, after a save."""
    words = [*whole, "--out_dir", tmp_path, "--resume"]
    for n, owner, name, how in [
        (2, MiniMindLM, "forward", {"when": evaluating}),
        (2, Run, "add_step", {}),
        (8, MiniMindLM, "forward", {"when": learning}),
        (6, MiniMindLM, "forward", {"when": evaluating}),
        (1, Run, "save", {"after": True}),
    ]:
        with killed(n, owner, name, **how):
            tune(*words)
    tune(*words)
    assert_same(result(tmp_path, NAME), result(unbroken, NAME))
    steps = [line["step"] for line in read_metrics(tmp_path, NAME) if "val_loss" in line]
    assert steps == [0, 4, 8, 12]


@pytest.mark.parametrize(
    ("flag", "value", "there"),
    [
        ("--max_turns", "1", "2"),
        ("--loss_weighting", "token", "sample"),
        ("--val_ratio", "0.5", "0.3"),
        ("--max_seq_len", "65", "64"),
    ],
)
def test_the_flag_that_may_not_change_is_named_alone(tune, whole, unbroken, flag, value, there):
    """Though it changes what is learnt of the data, they are not blamed."""
    before = snapshot(unbroken)
    done = tune(*whole, "--out_dir", unbroken, "--resume", flag, value, code=2)
    assert done.stderr == (
        f"train_full_sft.py: error: {flag} {value}: {there} in the run to resume, "
        f"{unbroken / NAME}_resume.pth\n"
        "--resume needs the same; without it, a new run starts\n"
    )
    assert snapshot(unbroken) == before


def test_a_resume_file_from_before_these_flags_were_compared(tune, whole, unbroken, tmp_path):
    """It has them among its arguments, and more than the content of the data in its identity."""
    contents = torch.load(unbroken / f"{NAME}_resume.pth", weights_only=True)
    for flag in ("--max_turns", "--loss_weighting"):
        del contents["identity"][flag]
    contents["identity"]["--data_path"] += " train_6 65_2_sample"
    torch.save(contents, tmp_path / f"{NAME}_resume.pth")
    words = [*whole, "--out_dir", tmp_path, "--resume"]
    assert "nothing to do" in tune(*words).stdout
    for flag, value in (("--max_turns", 3), ("--loss_weighting", "token")):
        stderr = tune(*words, flag, value, code=2).stderr
        assert f"error: {flag} {value}: " in stderr and stderr.count("\n") == 2


# What is said of the data


def test_what_is_left_out_is_said_of_every_file(tune, pretrained, tmp_path):
    """Bad lines that are not to be skipped end the run, whichever file has them."""
    good = chat("Hi", "red")
    contents = {
        "data_path": [good, good, "", ""],
        "val_data_path": [good, "", chat("Long", "red " * 100)],
        "test_data_path": [good, chat("Old " * 100, "blue", "New", "red"), good[:1]],
    }
    words = []
    for name, conversations in contents.items():
        lines = [json.dumps({"messages": c}) if c else "bad" for c in conversations]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        words += [f"--{name}", path]
    words += ["--out_dir", tmp_path, "--from_weight", pretrained, "--dry_run"]
    assert "test_data_path.jsonl:3: " in tune(*words, code=2).stderr
    done = tune(*words, "--skip_bad_lines", 0.5)
    said = {
        "training data": ("data_path", [2, "2 bad lines"]),
        "validation data": ("val_data_path", [2, "1 bad lines", "1 last answers cut"]),
        "test data": ("test_data_path", [2, "1 bad lines", "1 turns left out"]),
    }
    for use, (name, (count, *notes)) in said.items():
        start = f"{use} {tmp_path / name}.jsonl: "
        lines = [line for line in done.stdout.splitlines() if line.startswith(start)]
        assert lines[0].startswith(f"{start}{count} documents, ")
        assert len(lines) == 1 + len(notes)
        for line, note in zip(lines[1:], notes, strict=True):
            assert line.startswith(f"{start}{note}")


def test_empty_answers_are_not_scored(tune, pretrained, tokenizer, data, tmp_path):
    """The loss is that of the others, and nothing else of the file is left out."""
    empty, other = [chat("Say nothing", ""), chat("", " \n")], [chat("Hi", "red")]
    mixed = write_chats(tmp_path / "mixed.jsonl", [*empty, *other])
    words = ["--data_path", data, "--from_weight", pretrained, "--learning_rate", 1e-9]
    done = tune(*words, "--val_data_path", mixed, "--out_dir", tmp_path / "out")
    assert f"validation data {mixed}: 2 empty answers not learnt" in done.stdout
    assert scores(read_metrics(tmp_path / "out", NAME)[0]) == scores_by_hand(
        pretrained, tokenizer, other
    )
    nothing = write_chats(tmp_path / "empty.jsonl", empty)
    done = tune(*words, "--val_data_path", nothing, "--out_dir", tmp_path / "none", code=2)
    assert f"{nothing}: nothing to learn" in done.stderr


def test_answers_without_text_have_no_bits_per_byte():
    """Of an answer that is cut after `<think>`, that token is learnt."""
    cut = {"loss": 2.0, "targets": 1.0, "text_bytes": 0.0}
    whole = {"loss": 6.0, "targets": 3.0, "text_bytes": 4.0}
    figures = mean_scores({"cut": cut, "whole": whole}, "val")
    assert figures["val_loss/cut"] == figures["val_loss/whole"] == 2
    assert "val_bits_per_byte/cut" not in figures
    assert figures["val_bits_per_byte/whole"] == pytest.approx(1.5 / math.log(2))
