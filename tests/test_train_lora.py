"""Adapters trained as users train them; what they learn is worked out by PEFT."""

import functools
import json
import re

import pytest
import torch
from interruptions import (
    SHAPE,
    assert_same,
    evaluating,
    killed,
    learning,
    read_metrics,
    snapshot,
)
from interruptions import result as whole_result
from rounding import LOSS, NORM, assert_same_training
from test_lora import peft_layout, peft_twin
from test_train_full_sft import all_answers, chat, chats, write_chats
from tiny_models import random_model, save_tuned

from model import LMConfig, MiniMindLM, apply_lora, load_lora
from model.model_lora import TARGETS, lora_state
from training import Run

NAME = "identity_32"
ROWS = [*SHAPE, "--max_seq_len", 96]


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def adapt(run):
    return functools.partial(run, *ROWS, script="train_lora.py")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tokenizer):
    return save_tuned(random_model(), tmp_path_factory.mktemp("tuned"), tokenizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("data") / "train.jsonl", chats(21))


def result(out):
    """As for the other stages; the adapters' folder is a folder of runs."""
    return whole_result(out / "lora", NAME)


def load(path):
    return torch.load(path, weights_only=True)


# What is learnt


def test_steps_are_those_of_peft(adapt, tuned, tokenizer, tmp_path):
    """Three whole-batch steps: losses, gradient norms and the adapter at the end."""
    conversations = [
        chat("Hi", "red", "More", "blue stone " * 8),
        chat("你好", "一座山 河流 云"),
        chat("Bye", "green", system="Be kind"),
    ]
    path = write_chats(tmp_path / "train.jsonl", conversations)
    adapt(
        "--data_path", path, "--val_data_path", path, "--out_dir", tmp_path, "--from_weight", tuned,
        "--lora_rank", 4, "--lora_alpha", 6, "--epochs", 3, "--learning_rate", 1e-2,
        "--lr_decay", "constant", "--warmup_iters", 0, "--log_interval", 1, "--seed", 3,
    )  # fmt: skip
    torch.manual_seed(3)
    model = MiniMindLM(LMConfig(dim=32, n_layers=1))  # draws as the script does
    model.load_state_dict(load(tuned))
    apply_lora(model, 4, 6.0)
    twin, parameters = peft_twin(model, 4, 6.0, TARGETS)
    trained = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    first, *steps = read_metrics(tmp_path / "lora", NAME)
    for step, line in enumerate(line for line in steps if "loss" in line):
        loss = torch.cat(all_answers(twin, tokenizer, conversations)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert line["step"] == step + 1
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=NORM)
    assert first["val_loss"] == pytest.approx(steps[0]["loss"], rel=1e-5)
    assert steps[-1]["val_loss"] < first["val_loss"] - 0.1
    matrices = load(tmp_path / "lora" / f"{NAME}.pth")["weights"]
    found = peft_layout(matrices, model.config)
    assert_same_training(found, {name: parameters[name] for name in found}, [1e-2] * 3)
    assert all(tensor.abs().max() > 1e-3 for tensor in found.values())


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_only_the_adapter_is_trained_and_saved(adapt, data, tokenizer, tmp_path, moe):
    """The base keeps every bit, in its file and in the run; the optimizer knows no more either."""
    name = f"{NAME}_moe" if moe else NAME
    words = ["--use_moe"] if moe else []
    start = save_tuned(random_model(use_moe=moe), tmp_path, tokenizer, f"full_sft_32{'_moe' * moe}")
    before = snapshot(tmp_path)
    done = adapt("--data_path", data, "--out_dir", tmp_path, *words, "--learning_rate", 1e-2)
    assert {path: bytes_ for path, bytes_ in snapshot(tmp_path).items() if path in before} == before
    assert sorted(path.name for path in (tmp_path / "lora").glob("*.pth")) == [
        f"{name}.pth",
        f"{name}_resume.pth",
    ]
    model = random_model(use_moe=moe)
    load_lora(model, tmp_path / "lora" / f"{name}.pth")
    sizes = sorted(t.numel() for t in lora_state(model).values())
    resume = load(tmp_path / "lora" / f"{name}_resume.pth")
    assert sorted(t.numel() for t in resume["model"].values()) == sizes
    moments = [s["exp_avg"].numel() for s in resume["optimizer"]["state"].values()]
    assert sorted(moments) == sizes
    base = load(start)
    count = sum(t.numel() for n, t in base.items() if n != "output.weight")
    assert f", {sum(sizes) / 1e3:.2f} k of them trained\n" in done.stdout
    assert sum(sizes) < count


def test_the_same_with_gradient_checkpointing(adapt, tuned, data, tmp_path):
    """Though the embedding, where the graph would begin, is frozen."""
    words = ["--data_path", data, "--from_weight", tuned, "--learning_rate", 1e-2]
    for flag in ("--no-gradient_checkpointing", "--gradient_checkpointing"):
        adapt(*words, "--out_dir", tmp_path / flag, flag, "--log_interval", 1)
    plain, again = (read_metrics(path / "lora", NAME) for path in sorted(tmp_path.iterdir()))
    assert len(plain) == len(again) > 4
    for ours, theirs in zip(again, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert plain[-1]["loss"] < plain[0]["loss"] - 0.1


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_one_gradient_however_it_is_split(adapt, data, tokenizer, tmp_path, moe):
    """As 1 process × 8, 1 × 2 × 4 and, dense, 2 × 2 × 2; 21 rows."""
    words = ["--use_moe"] if moe else []
    name = f"{NAME}_moe" if moe else NAME
    start = save_tuned(random_model(use_moe=moe), tmp_path, tokenizer, f"full_sft_32{'_moe' * moe}")
    results = []
    for processes, batch, accumulation in [(1, 8, 1), (1, 2, 4), (2, 2, 2)][: 2 if moe else 3]:
        out = tmp_path / f"{processes}x{batch}"
        adapt(
            "--data_path", data, "--val_data_path", data, "--out_dir", out, "--from_weight", start,
            "--no-packing", "--epochs", 2, "--learning_rate", 3e-3, "--log_interval", 1,
            "--batch_size", batch, "--accumulation_steps", accumulation, *words,
            processes=processes,
        )  # fmt: skip
        matrices = load(out / "lora" / f"{name}.pth")["weights"]
        results.append((read_metrics(out / "lora", name), matrices))
    (whole_metrics, whole), *others = results
    assert [line["step"] for line in whole_metrics] == [0, 1, 2, 3, 4, 5, 6, 6]
    for split_metrics, split in others:
        for ours, theirs in zip(split_metrics, whole_metrics, strict=True):
            assert ours["tokens"] == theirs["tokens"]
            for figure in ("loss", "val_loss"):
                assert ours.get(figure, 0) == pytest.approx(theirs.get(figure, 0), rel=LOSS)
            assert ours.get("grad_norm", 0) == pytest.approx(theirs.get("grad_norm", 0), rel=NORM)
        assert_same_training(split, whole, [line["lr"] for line in whole_metrics if "lr" in line])


# Going on


@pytest.fixture(scope="module")
def whole(tuned, data):
    """The words of a run of 12 steps that evaluates, saves and drops out."""
    return [
        "--data_path", data, "--from_weight", tuned, "--lora_dropout", 0.2, "--no-packing",
        "--epochs", 3, "--batch_size", 2, "--accumulation_steps", 2, "--learning_rate", 3e-3,
        "--val_ratio", 0.3, "--save_best", "--save_interval", 3, "--eval_interval", 4,
        "--log_interval", 2, "--max_seq_len", 64,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(adapt, whole, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    adapt(*whole, "--out_dir", out)
    return out


def test_killed_and_resumed_is_as_not_killed(adapt, whole, unbroken, tmp_path):
    words = [*whole, "--out_dir", tmp_path, "--resume"]
    for n, owner, name, how in [
        (2, MiniMindLM, "forward", {"when": evaluating}),
        (2, Run, "add_step", {}),
        (8, MiniMindLM, "forward", {"when": learning}),
        (1, Run, "save", {"after": True}),
    ]:
        with killed(n, owner, name, **how):
            adapt(*words)
    adapt(*words)
    assert_same(result(tmp_path), result(unbroken))


@pytest.mark.parametrize(
    ("words", "blamed"),
    [
        (["--lora_alpha", "4"], "--lora_alpha 4.0: 16.0 in"),
        (["--lora_target", "wv", "wq"], "--lora_target ['wq', 'wv']: "),
        (["--from_weight", "other"], "--from_weight: not what was used by"),
    ],
)
def test_what_may_not_change_is_named(adapt, whole, unbroken, tokenizer, tmp_path, words, blamed):
    if words[0] == "--from_weight":
        words = ["--from_weight", save_tuned(random_model(7), tmp_path, tokenizer)]
    before = snapshot(unbroken)
    done = adapt(*whole, "--out_dir", unbroken, "--resume", *words, code=2)
    assert done.stderr.startswith(f"train_lora.py: error: {blamed}")
    assert snapshot(unbroken) == before


def test_adapters_of_other_names_and_shapes_are_not_overwritten(adapt, whole, unbroken):
    before = snapshot(unbroken)
    done = adapt(*whole, "--out_dir", unbroken, "--lora_rank", 3, code=2)
    assert "identity_32.pth holds another model (layers.0.attention.wq.A is (8, 32)" in done.stderr
    adapt(*whole, "--out_dir", unbroken, "--lora_rank", 3, "--lora_name", "other", "--epochs", 1)
    after = snapshot(unbroken)
    assert {path: after[path] for path in before} == before
    assert (unbroken / "lora" / "other_32.pth").is_file()


def test_the_best_adapter_is_the_one_that_is_tested(adapt, whole, tokenizer, tmp_path):
    """The scores of the file …_best.pth on its base, worked out by transformers."""
    test = [chat("1", "red"), chat("2", "green 云")]
    path = write_chats(tmp_path / "test.jsonl", test)
    adapt(*whole, "--out_dir", tmp_path, "--test_data_path", path, "--learning_rate", 0.1)
    line = read_metrics(tmp_path / "lora", NAME)[-1]
    model = random_model()
    load_lora(model, tmp_path / "lora" / f"{NAME}_best.pth")
    settings = load(tmp_path / "lora" / f"{NAME}_best.pth")["lora"]
    twin, _ = peft_twin(model, settings["rank"], settings["alpha"], TARGETS)
    losses = torch.cat(all_answers(twin, tokenizer, test))
    assert line["test_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


# Using it


def test_chat_with_and_without_the_adapter(adapt, run, data, tokenizer, tmp_path):
    """Without it, the answers are the base's of before."""
    save_tuned(random_model(), tmp_path, tokenizer)
    ask = ["--dim", 32, "--out_dir", tmp_path, "--prompt", "Who?", "--temperature", 0]
    ask += ["--max_new_tokens", 12]
    talk = functools.partial(run, *ask, script="eval_model.py")
    before = talk().stdout
    adapt("--data_path", data, "--out_dir", tmp_path, "--learning_rate", 3e-2, "--epochs", 6)
    assert talk().stdout == before
    adapted = talk("--lora_name", "identity").stdout
    assert adapted != before
    assert talk("--lora_name", tmp_path / "lora" / f"{NAME}.pth").stdout == adapted
    error = talk("--lora_name", "nobody", code=2).stderr
    assert (
        error
        == f"eval_model.py: error: --lora_name nobody: no file {tmp_path}/lora/nobody_32.pth; "
        "there is identity\n"
    )
    save_tuned(random_model(1), tmp_path, tokenizer)
    adapter = tmp_path / "lora" / f"{NAME}.pth"
    error = talk("--lora_name", "identity", code=2).stderr
    assert error == (
        f"eval_model.py: error: {adapter}: the weights that it was trained on are not in "
        f"{tmp_path}; --weight names them\n"
    )
    error = talk("--weight", "full_sft", "--lora_name", "identity", code=2).stderr
    assert error.startswith(f"eval_model.py: error: {adapter}: an adapter of another base")


def test_an_adapter_is_scored_on_its_base(adapt, run, data, tokenizer, tmp_path, sample_dir):
    """It learns one answer by heart, which the test counts; its base never says that."""
    base = save_tuned(random_model(), tmp_path, tokenizer)
    taught = [chat(f"{i}", "I am Pip") for i in range(4)]
    path = write_chats(tmp_path / "train.jsonl", taught)
    adapt(
        "--data_path", path, "--out_dir", tmp_path, "--learning_rate", 3e-2, "--epochs", 60,
        "--no-packing", "--batch_size", 4,
    )  # fmt: skip
    lines = (sample_dir / "lora_test.jsonl").read_text(encoding="utf-8").splitlines()
    english = [line for line in lines if json.loads(line)["language"] == "en"]
    (tmp_path / "test.jsonl").write_text("\n".join(english), encoding="utf-8")
    scores = tmp_path / "scores.json"
    run(
        f"base={base}", f"adapted={base}+{tmp_path / 'lora' / NAME}.pth",
        "--data_path", tmp_path / "test.jsonl", "--json", scores, "--history", 0,
        script="scripts/score_world.py",
    )  # fmt: skip
    found = json.loads(scores.read_text(encoding="utf-8"))
    assert found["base"]["identity"] == 0
    assert found["adapted"]["identity"] == 1


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from_weight", "none"], "--from_weight none: an adapter needs weights to adapt"),
        (["--lora_name", "../x"], "argument --lora_name: '../x': letters, digits, - and _ only"),
        (["--lora_target", "output"], "argument --lora_target: invalid choice: 'output'"),
        (["--lora_rank", 0], "argument --lora_rank: must be at least 1, not 0"),
        (["--lora_dropout", 1], "argument --lora_dropout: must be"),
    ],
)
def test_mistakes_are_one_line(adapt, data, tmp_path, words, message):
    done = adapt("--data_path", data, "--out_dir", tmp_path, *words, code=2)
    assert message in done.stderr
    assert re.match(r"train_lora\.py: error: ", done.stderr.splitlines()[-1])
    assert not any(tmp_path.iterdir())
