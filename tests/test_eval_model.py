"""eval_model.py as users start it, on a tiny untrained model."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from interruptions import heed_ctrl_c
from test_train_full_sft import chat, write_chats
from tiny_models import llama_with_weights_of, random_model
from transformers import AutoTokenizer

from dataset import tokenizer_hash
from inference import TextStream
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


def test_each_typed_line_is_continued_until_the_user_leaves(evaluate):
    typed = "one\n\n二\n".encode() + b"\xff stray byte\n/quit\nnot read\n"
    done = evaluate("--dim", "32", "--max_new_tokens", "3", "--temperature", "0", typed=typed)
    said = done.stdout
    assert said.count("> ") == 5
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
        (["--dim", "48"], "no weights of --dim 48"),
        (["--use_moe"], "no weights of --use_moe True"),
        (["--weight", "pretrain"], "pretrain_512.pth"),
        (["--weight", "full_sft", "--dim", "32"], "full_sft_32.pth"),
        (["--dim", "100"], "--dim"),
        (["--prompt", "a", "--score", "b"], "--prompt and --score"),
        (["--input_file", "a"], "--output_file"),
        (["--output_file", "a"], "--output_file"),
        (["--input_file", "nowhere.jsonl", "--output_file", "a"], "nowhere.jsonl"),
        (["--quantize", "int8"], "no multiple of 16"),
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
def chat_dir(tmp_path_factory, tokenizer):
    folder, model = tmp_path_factory.mktemp("chat"), random_model()
    for stage in ("pretrain", "full_sft"):
        path = folder / f"{stage}_32.pth"
        save_weights(path, model, model.config, stage, tokenizer_hash(tokenizer))
    return folder


def test_tuned_weights_answer_and_remember(run, chat_dir, tokenizer_dir):
    """The second answer is the model's to the whole conversation so far."""
    words = ["--out_dir", chat_dir, "--dim", "32", "--temperature", "0", "--max_new_tokens", "5"]
    said = run(*words, script="eval_model.py", typed="Hi</s>\n你好\n/quit\n".encode()).stdout
    assert said.startswith("full_sft_32: ")
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
    said = run(*words, script="eval_model.py", typed=b"one two\n" * 9 + b"/quit\n").stdout
    assert said.count("> ") == 10 and "max_seq_len" not in said


def test_the_newest_chat_weights_are_chosen(run, tmp_path, tokenizer):
    digest = tokenizer_hash(tokenizer)
    model = random_model()
    for age, name in enumerate(("dpo_32", "full_sft_32", "pretrain_32", "full_sft_48_moe")):
        shape = {"dim": 48, "use_moe": True} if name.endswith("moe") else {}
        made = random_model(**shape) if shape else model
        save_weights(tmp_path / f"{name}.pth", made, made.config, name.rpartition("_3")[0], digest)
        os.utime(tmp_path / f"{name}.pth", (1e9 - age, 1e9 - age))
    (tmp_path / "dpo_32_resume.pth").write_bytes(b"")

    def said(*words):
        words = ["--out_dir", tmp_path, "--max_new_tokens", 1, *words]
        return run(*words, script="eval_model.py").stdout.partition(":")[0]

    assert said() == "dpo_32"
    assert said("--use_moe") == "full_sft_48_moe"
    assert said("--dim", "48") == "full_sft_48_moe"
    (tmp_path / "dpo_32.pth").unlink()
    assert said("--dim", "32") == "full_sft_32"
    (tmp_path / "full_sft_32.pth").unlink()
    assert said("--dim", "32") == "pretrain_32"


def test_a_folder_in_transformers_format(run, tmp_path, chat_dir, tokenizer):
    model = random_model()
    folder = tmp_path / "mine"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_weights(
        tmp_path / "full_sft_32.pth", model, model.config, "full_sft", tokenizer_hash(tokenizer)
    )
    words = ["--prompt", "Hi", "--temperature", "0", "--max_new_tokens", "9"]
    said = [
        run(*which, *words, script="eval_model.py").stdout
        for which in (["--weight", folder], ["--out_dir", tmp_path])
    ]
    assert said[0] == said[1] != "\n"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "llama"}), encoding="utf-8"
    )
    error = run("--weight", folder, *words, script="eval_model.py", code=2).stderr
    assert str(folder) in error and "llama" in error and error.count("\n") == 1


# Commands


@pytest.fixture
def talk(run, chat_dir):
    """What is said to typed lines, after the first line of all."""
    words = ["--out_dir", chat_dir, "--weight", "full_sft", "--dim", 32, "--temperature", 0]
    words += ["--max_new_tokens", 5]

    def say(*lines, more=()):
        typed = "".join(f"{line}\n" for line in lines).encode()
        said = run(*words, *more, script="eval_model.py", typed=typed).stdout
        return [part.strip() for part in said.split("\n", 1)[1].split("> ")[1:]]

    return say


def test_commands_change_what_the_model_is_told(talk):
    one, two, *_ = talk("Hi", "你好")
    alone = talk("你好")[0]
    assert len({one, two, alone}) == 3  # an untrained model's answers tell prompts apart
    assert talk("Hi", "/reset", "你好")[2] == alone
    assert talk("Hi", "/undo", "你好")[2] == alone
    assert talk("Hi", "你好", "/undo", "你好")[3] == two
    assert talk("Hi", "你好", more=["--history_cnt", 0])[1] == alone
    told = talk("/system Be kind.", "你好")[1]
    assert told != alone
    assert talk("你好", more=["--system", "Be kind."])[0] == told
    assert talk("/system Be kind.", "/system", "你好")[2] == alone
    assert "/undo" in talk("/help")[0]


def test_settings_change_the_answers(talk):
    shown = talk("/set", "/set max_new_tokens 2", "/set")
    assert "max_new_tokens 5" in shown[0] and "max_new_tokens 2" in shown[2]
    long, short = talk("Hi")[0], talk("/set max_new_tokens 1", "Hi")[1]
    assert short != long and long.startswith(short)
    for line in ("/set", "/set top_p 7", "/set top_p", "/set what 1", "/set top_k 1 2", "/bogus"):
        assert "Traceback" not in talk(line)[0]
    assert "at most 1" in talk("/set top_p 7")[0]
    assert "/bogus" in talk("/bogus")[0]


def test_several_lines_are_one_text(talk, chat_dir, tokenizer):
    assert talk('"""', "one", "", 'two"""')[0].startswith("… … … ")
    model = random_model()
    model.load_state_dict(torch.load(chat_dir / "full_sft_32.pth", weights_only=True))
    messages = [{"role": "user", "content": "one\n\ntwo"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    new = model.generate(torch.tensor([ids]), max_new_tokens=5)[0, len(ids) :]
    answer = tokenizer.decode(new, skip_special_tokens=True).strip()
    assert talk('"""one', "", "two", '"""')[0].removeprefix("… … … ") == answer


def test_a_conversation_is_saved_and_loaded(talk, tmp_path):
    path = tmp_path / "talk.jsonl"
    first = talk("/system Be kind.", "Hi", f"/save {path}", "你好")
    saved = json.loads(path.read_text(encoding="utf-8"))["conversations"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert talk(f"/load {path}", "你好")[1] == first[3]
    assert "exists" in talk(f"/save {path}")[0]
    path.write_text('{"text": "no"}', encoding="utf-8")
    assert str(path) in talk(f"/load {path}")[0]
    assert "nowhere" in talk("/load nowhere")[0]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_stops_the_answer_and_not_the_program(root, tmp_path, tokenizer):
    model = random_model(max_seq_len=8192)
    save_weights(
        tmp_path / "full_sft_32.pth", model, model.config, "full_sft", tokenizer_hash(tokenizer)
    )
    command = [sys.executable, root / "eval_model.py", "--out_dir", tmp_path, "--device", "cpu"]
    command += ["--max_new_tokens", "8000", "--temperature", "1", "--seed", "1"]
    process = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        preexec_fn=heed_ctrl_c,
    )
    process.stdin.write(b"Hi\n")
    process.stdin.flush()
    process.stdout.readline()
    process.stdout.read(40)  # the answer has begun
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(b"/set max_new_tokens 3\nAgain\n", timeout=120)
    assert process.returncode == 0, error
    assert b" \xe2\x80\xa6\n> " in said and said.count(b"> ") == 3
    assert b"Traceback" not in error


# Files


def ask(question):
    return [{"role": "user", "content": question}]


def test_a_file_of_questions_is_answered_as_each_alone(run, chat_dir, tmp_path):
    lines = [
        {"prompt": "Hi", "id": 7},
        {"messages": chat("one", "two", "three", "reference")},
        {"conversations": ask("你好")},
        {"instruction": "Say", "input": "it"},
    ]
    path, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    words = ["--out_dir", chat_dir, "--weight", "full_sft", "--dim", 32, "--temperature", 0]
    words += ["--max_new_tokens", 6]
    run(*words, "--input_file", path, "--output_file", out, script="eval_model.py")
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [{**answer, "answer": None} for answer in answers] == [
        {**line, "answer": None} for line in lines
    ]
    for answer, prompt in ((answers[0], "Hi"), (answers[2], "你好"), (answers[3], "Say\nit")):
        alone = run(*words, "--prompt", prompt, script="eval_model.py").stdout
        assert alone == answer["answer"] + "\n"
    again = ["--input_file", path, "--output_file", out]
    assert str(out) in run(*words, *again, script="eval_model.py", code=2).stderr
    path.write_text('{"prompt": "Hi"}\n{"prompt": 3}\n', encoding="utf-8")
    again[-1] = tmp_path / "new.jsonl"
    error = run(*words, *again, script="eval_model.py", code=2).stderr
    assert f"{path}:2: " in error and not again[-1].exists()


def test_scores_are_those_of_llama(run, chat_dir, tmp_path, tokenizer):
    """Loss of texts: of every token after the first, in rows that begin as in training."""
    model = random_model()
    model.load_state_dict(torch.load(chat_dir / "pretrain_32.pth", weights_only=True))
    llama = llama_with_weights_of(model)
    texts = ["red green", "一座山 blue", "stone " * 40]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    nats, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([[1, *tokenizer.encode(text, add_special_tokens=False), 2]])
        with torch.no_grad():
            nats += llama(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    words = ["--out_dir", chat_dir, "--weight", "pretrain", "--dim", 32, "--score", path]
    said = run(*words, script="eval_model.py").stdout
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    loss, perplexity, per_byte = map(float, re.findall(r"\d+\.\d+", said))
    assert (loss, per_byte) == pytest.approx((nats / tokens, bits), abs=1e-4)
    assert perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert f"{tokens} target tokens of 3 samples" in said


def test_answers_beside_references(run, tmp_path, tokenizer):
    """A table for a person to rate, with the model's own answers as references: all scores 100."""
    model = random_model(dim=128)
    save_weights(
        tmp_path / "full_sft_128.pth", model, model.config, "full_sft", tokenizer_hash(tokenizer)
    )
    questions = write_chats(tmp_path / "q.jsonl", [ask("Hi"), ask("one two"), ask("你好")])
    words = ["--out_dir", tmp_path, "--temperature", 0, "--max_new_tokens", 12]
    out = tmp_path / "answers.jsonl"
    run(*words, "--input_file", questions, "--output_file", out, script="eval_model.py")
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    own = [[*a["messages"], {"role": "assistant", "content": a["answer"]}] for a in answers]
    path = write_chats(tmp_path / "own.jsonl", own)
    table = tmp_path / "rate.csv"
    said = run(*words, "--score", path, "--output_file", table, script="eval_model.py").stdout
    assert "BLEU 100.0, chrF 100.0, ROUGE-L 100.0" in said
    with table.open(encoding="utf-8-sig", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == [
        "input",
        "reference",
        "answer",
        *["relevance", "accuracy", "fluency", "completeness"],
    ]
    assert [row[0] for row in rows] == ["Hi", "one two", "你好"]
    assert all(row[1] == row[2] and row[3:] == [""] * 4 for row in rows)
    other = write_chats(tmp_path / "other.jsonl", [chat("Hi", "xyz"), chat("one two", "云")])
    said = run(*words, "--score", other, script="eval_model.py").stdout
    assert "ROUGE-L 0.0" in said
    said = run(*words, "--score", path, "--quantize", "int8", script="eval_model.py").stdout
    assert abs(float(re.search(r"loss by ([+-]\d+\.\d+)%", said)[1])) <= 1


# Text as it comes


def test_pieces_are_whole_characters_and_add_up(tokenizer):
    text = "Hi 你好 🎉 naïve\n\ncafé 龘"
    stream = TextStream(tokenizer)
    pieces = [stream.add(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces) + stream.finish() == text
    assert all("\ufffd" not in piece for piece in pieces)
    half = tokenizer.encode("龘", add_special_tokens=False)[:-1]
    assert half  # of several bytes that the vocabulary lacks as a whole
    stream = TextStream(tokenizer)
    assert "".join(stream.add(i) for i in half) == ""
    assert stream.finish() == tokenizer.decode(half)


@pytest.mark.parametrize(
    ("stop", "given"),
    [
        (["two"], "one "),
        (["o t", "two three"], "one tw"),
        (["ee f", "three"], "one two "),
        (["four"], "one two three "),
        (["fours"], "one two three four"),
        ([" "], "one"),
        (["one"], ""),
    ],
)
def test_text_ends_before_a_stop_string(tokenizer, stop, given):
    text = "one two three four"
    stream = TextStream(tokenizer, stop)
    shown = ""
    for character in text:  # tokens that end within stop strings
        for i in tokenizer.encode(character, add_special_tokens=False):
            shown += stream.add(i)
        assert given.startswith(shown)
    assert shown + stream.finish() == given
    assert stream.stopped == (given != text)
