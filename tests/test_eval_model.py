"""eval_model.py as users start it, on a tiny untrained model."""

import pytest
import torch
from transformers import AutoTokenizer

from dataset import tokenizer_hash
from model import LMConfig, MiniMindLM
from training import save_weights


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, tokenizer_dir):
    folder = tmp_path_factory.mktemp("out")
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(dim=32, n_layers=1, max_seq_len=64))
    digest = tokenizer_hash(AutoTokenizer.from_pretrained(tokenizer_dir))
    save_weights(folder / "pretrain_32.pth", model, model.config, "pretrain", digest)
    (folder / "broken.pth").write_bytes(b"<html>404</html>")
    return folder


@pytest.fixture
def evaluate(run, out_dir):
    """Start it on the tiny model's folder."""
    return lambda *words, **how: run("--out_dir", out_dir, *words, script="eval_model.py", **how)


def test_a_seed_repeats_the_text(evaluate):
    words = ["--dim", "32", "--prompt", "山", "--max_new_tokens", "12", "--seed"]
    first, again, other = (evaluate(*words, seed).stdout for seed in ("5", "5", "6"))
    assert first == again != other
    assert first.startswith("山")


def test_each_typed_line_is_continued_until_an_empty_one(evaluate):
    typed = "one\n二\n".encode() + b"\xff stray byte\n\nnot read\n"
    done = evaluate("--dim", "32", "--max_new_tokens", "3", "--temperature", "0", typed=typed)
    said = done.stdout
    assert said.count("> ") == 4
    assert "> one" in said
    assert "> 二" in said
    assert "not read" not in said


def test_a_text_beyond_the_context_is_refused_and_the_next_one_taken(evaluate):
    typed = ("long words " * 64 + "\nshort\n").encode()
    done = evaluate("--dim", "32", "--max_new_tokens", "2", typed=typed)
    said = done.stdout
    assert "max_seq_len 64" in said
    assert "> short" in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "pretrain_512.pth"),
        (["--weight", "full_sft", "--dim", "32"], "full_sft_32.pth"),
        (["--dim", "100"], "--dim"),
        (["--dim", "32", "--seed", "-1"], "--seed"),
        (["--dim", "32", "--top_p", "0"], "--top_p"),
        (["--dim", "32", "--prompt", "long words " * 64], "max_seq_len 64"),
        (["--tokenizer_path", "nowhere"], "--tokenizer_path"),
    ],
)
def test_mistakes_end_with_one_line(evaluate, words, named):
    error = evaluate(*words, code=2).stderr
    assert named in error.splitlines()[-1]
    assert "Traceback" not in error


def test_a_file_that_holds_no_weights_is_named(evaluate, out_dir):
    error = evaluate("--weight", str(out_dir / "broken.pth"), code=2).stderr
    assert "broken.pth" in error.splitlines()[-1]
    assert "Traceback" not in error


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory, tokenizer_dir):
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(dim=32, n_layers=1))
    digest = tokenizer_hash(AutoTokenizer.from_pretrained(tokenizer_dir))
    for stage in ("pretrain", "full_sft"):
        save_weights(folder / f"{stage}_32.pth", model, model.config, stage, digest)
    return folder


def test_tuned_weights_answer_and_remember(run, chat_dir, tokenizer_dir):
    """The second answer is the model's to the whole conversation so far."""
    words = ["--out_dir", chat_dir, "--dim", "32", "--temperature", "0", "--max_new_tokens", "5"]
    said = run(*words, script="eval_model.py", typed="Hi</s>\n你好\n\n".encode()).stdout
    assert "full_sft_32.pth" in said
    said = said.split("\n", 1)[1]

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model = MiniMindLM(LMConfig(dim=32, n_layers=1)).eval()
    model.load_state_dict(torch.load(chat_dir / "full_sft_32.pth", weights_only=True))

    def encode(text):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def answer(ids):
        new = model.generate(torch.tensor([ids]), max_new_tokens=5)[0, len(ids) :]
        return tokenizer.decode(new, skip_special_tokens=True)

    def message(role, content):
        return [1, *encode(f"{role}\n"), *encode(content), 2, *encode("\n")]

    head = [1, *encode("assistant\n")]
    ids = message("user", "Hi</s>")
    first = answer(ids + head)
    ids += message("assistant", first) + message("user", "你好")
    assert said == f"> {first}\n> {answer(ids + head)}\n> "


def test_a_full_conversation_loses_its_oldest_exchanges(run, tmp_path, tokenizer_dir):
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(dim=32, n_layers=1, max_seq_len=48))
    digest = tokenizer_hash(AutoTokenizer.from_pretrained(tokenizer_dir))
    save_weights(tmp_path / "full_sft_32.pth", model, model.config, "full_sft", digest)
    words = ["--out_dir", tmp_path, "--dim", "32", "--temperature", "0", "--max_new_tokens", "5"]
    said = run(*words, script="eval_model.py", typed=b"one two\n" * 9 + b"\n").stdout
    assert said.count("> ") == 10 and "max_seq_len" not in said
