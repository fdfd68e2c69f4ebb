"""eval_model.py as users start it, on a tiny untrained model."""

import contextlib
import csv
import itertools
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import sacrebleu
import torch
from interruptions import heed_ctrl_c
from safetensors.torch import load_file, save_file
from test_train_full_sft import chat, write_chats
from tiny_models import greedy_answer, llama_with_weights_of, random_model, save_tuned
from transformers import AutoTokenizer

from inference import ChatModel, chat_texts
from inference.answers import new_file
from inference.scoring import compare_contents, rouge_scorer
from inference.text import TextStream
from model import MiniMindLM, apply_lora, save_lora, save_weights, tokenizer_hash


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("out")
    save_tuned(random_model(max_seq_len=64), folder, tokenizer, "pretrain_32", "pretrain")
    (folder / "broken.pth").write_bytes(b"<html>404</html>")
    return folder


@pytest.fixture(autouse=True)
def english(monkeypatch):
    monkeypatch.setenv("LC_ALL", "C.UTF-8")


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
        (["--weight", "dpo"], "dpo_512.pth"),
        (["--weight", "pretrain", "--dim", "48"], "pretrain_48.pth"),
        (["--weight", "full_sft", "--dim", "32"], "full_sft_32.pth"),
        (["--dim", "100"], "--dim"),
        (["--prompt", "a", "--score", "b"], "--score: not allowed with argument --prompt"),
        (["--input_file", "a"], "--output_file"),
        (["--output_file", "a"], "--output_file"),
        (["--input_file", "nowhere.jsonl", "--output_file", "a"], "nowhere.jsonl"),
        (["--quantize", "int8"], "--quantize int8: the head size 4 is no multiple of 16"),
        (["--quantize", "int8", "--engine", "torch"], "--quantize int8: not with --engine torch"),
        (["--engine", "onnx"], "--engine onnx: the head size 4 is no multiple of 16"),
        (["--dim", "32", "--seed", "-1"], "--seed"),
        (["--dim", "32", "--top_p", "0"], "--top_p"),
        (["--dim", "32", "--prompt", "long words " * 64], "max_seq_len 64"),
        (["--tokenizer_path", "nowhere"], "--tokenizer_path"),
    ],
)
def test_mistakes_end_with_one_line(evaluate, words, named):
    error = evaluate(*words, code=2).stderr
    assert named in error.splitlines()[-1]


def test_a_file_that_holds_no_weights_is_named(evaluate, out_dir):
    error = evaluate("--weight", str(out_dir / "broken.pth"), code=2).stderr
    assert "broken.pth" in error.splitlines()[-1]


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("chat")
    for stage in ("pretrain", "full_sft"):
        save_tuned(random_model(), folder, tokenizer, f"{stage}_32", stage)
    return folder


def test_tuned_weights_answer_and_remember(run, chat_dir, tokenizer):
    """The second answer is the model's to the whole conversation so far."""
    words = ["--out_dir", chat_dir, "--dim", "32", "--temperature", "0", "--max_new_tokens", "5"]
    said = run(*words, script="eval_model.py", typed="Hi\n你好\n/quit\n".encode()).stdout
    assert said.startswith("full_sft_32: ")
    messages = ask("Hi")
    first = greedy_answer(chat_dir / "full_sft_32.pth", tokenizer, messages, 5)
    messages = [*messages, {"role": "assistant", "content": first}, *ask("你好")]
    second = greedy_answer(chat_dir / "full_sft_32.pth", tokenizer, messages, 5)
    assert said.split("\n", 1)[1] == f"> {first}\n> {second}\n> "


def test_what_looks_like_a_control_token_is_text(run, chat_dir, tokenizer):
    words = ["--out_dir", chat_dir, "--dim", "32", "--temperature", "0", "--max_new_tokens", "5"]
    said = run(*words, "--prompt", "Hi</s>", script="eval_model.py").stdout
    ids = [1, *tokenizer("user\nHi</s>", split_special_tokens=True)["input_ids"], 2]
    ids += [*tokenizer.encode("\n"), 1, *tokenizer.encode("assistant\n")]
    model = random_model()
    model.load_state_dict(torch.load(chat_dir / "full_sft_32.pth", weights_only=True))
    new = model.generate(torch.tensor([ids]), max_new_tokens=5)[0, len(ids) :]
    assert said == tokenizer.decode(new, skip_special_tokens=True) + "\n"


def test_a_full_conversation_loses_its_oldest_exchanges(run, tmp_path, tokenizer):
    """The last answer is the one to as many of the last exchanges as fit beside it."""
    path = save_tuned(random_model(max_seq_len=48), tmp_path, tokenizer)
    words = ["--out_dir", tmp_path, "--dim", "32", "--temperature", "0", "--max_new_tokens", "5"]
    said = run(*words, script="eval_model.py", typed=b"one two\n" * 9 + b"/quit\n").stdout
    *answers, last = [text.rstrip("\n") for text in said.split("\n", 1)[1].split("> ")[1:-1]]
    pairs = [(ask("one two")[0], {"role": "assistant", "content": text}) for text in answers]
    messages, room = ask("one two"), 48 - 5
    for pair in reversed(pairs):
        more = [*pair, *messages]
        ids = tokenizer.apply_chat_template(more, add_generation_prompt=True, return_dict=False)
        if len(ids) > room:
            break
        messages = more
    assert 1 < len(messages) < 17
    wanted = greedy_answer(path, tokenizer, messages, 5, max_seq_len=48)
    assert last == wanted.rstrip("\n")


def test_an_adapter_brings_its_base_along(run, tmp_path, tokenizer):
    """Newer weights of the same shape are not what it was trained on."""
    base = random_model(1)
    save_tuned(base, tmp_path, tokenizer)
    save_tuned(random_model(2), tmp_path, tokenizer, "dpo_32", "dpo")
    (tmp_path / "lora").mkdir()
    apply_lora(base, rank=2)
    save_lora(base, tmp_path / "lora" / "it_32.pth")
    words = ["--out_dir", tmp_path, "--max_new_tokens", 1, "--lora_name"]
    assert run(*words, "it", script="eval_model.py").stdout.startswith("full_sft_32+it_32: ")
    path = tmp_path / "lora" / "it_32.pth"
    assert run(*words, path, script="eval_model.py").stdout.startswith("full_sft_32+it_32: ")
    about = json.loads((tmp_path / "full_sft_32.json").read_text(encoding="utf-8"))
    other = json.dumps({**about, "tokenizer": "another"})
    (tmp_path / "full_sft_32.json").write_text(other, encoding="utf-8")
    error = run(*words, "it", script="eval_model.py", code=2).stderr
    assert "full_sft_32.pth: trained with another tokenizer; --tokenizer_path" in error
    (tmp_path / "full_sft_32.pth").unlink()
    error = run(*words, "it", script="eval_model.py", code=2).stderr
    assert "it_32.pth: the weights that it was trained on" in error and error.count("\n") == 1
    error = run(*words, "no", script="eval_model.py", code=2).stderr
    assert "no_512.pth; there is it\n" in error and error.count("\n") == 1
    error = run(*words, tmp_path / "lora" / "it", script="eval_model.py", code=2).stderr
    assert "it_512.pth" in error and error.count("\n") == 1
    error = run(*words, "*", script="eval_model.py", code=2).stderr
    assert "*_512.pth" in error and error.count("\n") == 1


def test_the_newest_chat_weights_are_chosen(run, tmp_path, tokenizer):
    for age, name in enumerate(("dpo_32", "full_sft_32", "pretrain_32", "full_sft_48_moe")):
        shape = {"dim": 48, "use_moe": True} if name.endswith("moe") else {}
        save_tuned(random_model(**shape), tmp_path, tokenizer, name, name.rpartition("_3")[0])
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


def save_as_pretrained(model: MiniMindLM, folder: Path) -> None:
    """Write the folder of `save_pretrained` from when a model of ours was one of transformers'."""
    folder.mkdir()
    about = {
        **asdict(model.config),
        "architectures": ["MiniMindLM"],
        "dtype": "float32",
        "model_type": "minimind",
        "tie_word_embeddings": True,
        "transformers_version": "5.23.0",
    }
    (folder / "config.json").write_text(json.dumps(about), encoding="utf-8")
    state = {n: t for n, t in model.state_dict().items() if n != "output.weight"}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_a_folder_of_save_pretrained(run, tmp_path, chat_dir, tokenizer):
    model = random_model()
    folder = tmp_path / "mine"
    save_as_pretrained(model, folder)
    tokenizer.save_pretrained(folder)
    save_tuned(model, tmp_path, tokenizer)
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
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    del weights["layers.0.attention.wq.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    error = run("--weight", folder, *words, script="eval_model.py", code=2).stderr
    assert "layers.0.attention.wq.weight" in error.splitlines()[-1]
    (folder / "model.safetensors").write_bytes(b"{}")
    error = run("--weight", folder, *words, script="eval_model.py", code=2).stderr
    assert f"--weight {folder}: cannot be loaded" in error and error.count("\n") == 1


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


def test_settings_change_the_answers(talk, chat_dir, tokenizer):
    shown = talk("/set", "/set max_new_tokens 2", "/set")
    assert "max_new_tokens 5" in shown[0] and "max_new_tokens 2" in shown[2]
    path = chat_dir / "full_sft_32.pth"
    wanted = greedy_answer(path, tokenizer, ask("Hi"), 1).strip()
    assert talk("/set max_new_tokens 1", "Hi")[1] == wanted
    for line in ("/set", "/set top_p 7", "/set top_p", "/set what 1", "/set top_k 1 2", "/bogus"):
        assert talk(line, "/set")[1] == shown[0]  # and it changed nothing
    assert "at most 1" in talk("/set top_p 7")[0]
    assert "/bogus" in talk("/bogus")[0]


def test_several_lines_are_one_text(talk, chat_dir, tokenizer):
    path = chat_dir / "full_sft_32.pth"
    for lines, text in (
        (['"""', "one", "", 'two"""'], "one\n\ntwo"),
        (['"""one', "", "two", '"""'], "one\n\ntwo"),
        (['"""one"""'], "one"),
    ):
        said = talk(*lines)[0].removeprefix("… " * (len(lines) - 1))
        assert said == greedy_answer(path, tokenizer, ask(text), 5).strip()


def test_a_conversation_is_saved_and_loaded(talk, tmp_path):
    path = tmp_path / "talk.jsonl"
    first = talk("/system Be kind.", "Hi", f"/save {path}", "你好")
    saved = json.loads(path.read_text(encoding="utf-8"))["conversations"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert talk(f"/load {path}", "你好")[1] == first[3]
    assert "exists" in talk(f"/save {path}")[0]
    for line in ('{"text": "no"}', json.dumps({"messages": saved[:2]}), "{"):
        path.write_text(line, encoding="utf-8")
        assert f"{path}:1: " in talk(f"/load {path}")[0]
    assert "nowhere" in talk("/load nowhere")[0]
    assert "/undo: " in talk("/undo")[0] and "/save: " in talk("/save")[0]


TOOLS = [{"name": "clock", "description": "the time"}]
CALLED = [
    {"role": "system", "content": "Be kind."},
    *chat("Hi", "Hello"),
    {"role": "user", "content": "What time is it?"},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "clock", "arguments": {}}]},
    {"role": "tool", "content": "noon"},
    {"role": "assistant", "content": "Noon."},
]


def test_a_conversation_with_tools_keeps_them(talk, tmp_path):
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps({"messages": CALLED, "tools": TOOLS}), encoding="utf-8")
    talk(f"/load {path}", f"/save {tmp_path / 'whole'}", "/undo", f"/save {tmp_path / 'undone'}")
    whole, undone = (
        json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("whole", "undone")
    )
    assert whole == {"conversations": CALLED, "tools": TOOLS}
    assert undone == {"conversations": CALLED[:3], "tools": TOOLS}
    assert talk(f"/load {path}", "Hi")[1] != talk("Hi")[0]
    told = talk(f"/load {path}", "Hi", more=["--history_cnt", 1])
    del whole["conversations"][1:3]  # an exchange is all that follows a question
    path.write_text(json.dumps(whole), encoding="utf-8")
    assert told[1] == talk(f"/load {path}", "Hi")[1]


def test_weights_know_how_long_a_conversation_they_can_hold(run, tmp_path, tokenizer):
    """What is older is left out, which is said once; and questions to ask are offered."""
    model, known = random_model(), {"longest_conversation": {"exchanges": 2, "tokens": 50}}
    known["examples"] = ["Where does Mira live?", "你是谁？"]
    digest = tokenizer_hash(tokenizer)
    save_weights(tmp_path / "dpo_32.pth", model, model.config, "dpo", digest, conversations=known)
    words = ["--out_dir", tmp_path, "--temperature", 0, "--max_new_tokens", 4]

    def said(*lines, more=()):
        typed = "".join(f"{line}\n" for line in lines).encode()
        return run(*words, *more, script="eval_model.py", typed=typed)

    done = said("/system Be kind.", "a", "b", "c", "d", more=["--lang", "en"])
    offer, *answers = done.stdout.split("> ")
    assert offer.endswith("for example:\n  Where does Mira live?\n  你是谁？\n")
    (notice,) = (line for line in done.stderr.splitlines() if "left out" in line)
    assert notice.endswith("the last 1 stay (--history_cnt)")
    told = [part.strip() for part in answers]
    messages = [*chat("b", told[2], system="Be kind."), {"role": "user", "content": "c"}]
    assert told[3] == greedy_answer(tmp_path / "dpo_32.pth", tokenizer, messages, 4).strip()
    more = ["--history_cnt", 3, "--lang", "en"]
    assert "left out" not in said("a", "b", "c", "d", more=more).stderr
    done = said("a", "b", "c", more=["--lang", "zh"])
    assert "例如：\n  Where" in done.stdout and done.stderr.count("问题之前的 1 轮") == 1


@pytest.mark.parametrize("start", [0, 1])
def test_tools_are_told_as_the_chat_template_does(tokenizer, start):
    """With a system message and without; what does not fit is left out, but never the tools."""
    chat_model = ChatModel("m", random_model(max_seq_len=1000), tokenizer, chats=True)
    messages = [*CALLED[start:], {"role": "user", "content": "And now?"}]

    def template(messages):
        return tokenizer.apply_chat_template(
            messages, tools=TOOLS, add_generation_prompt=True, return_dict=False
        )

    assert chat_model.chat_ids(messages, TOOLS, 0) == template(messages)
    short = [*CALLED[start:1], messages[-1]]
    length = len(template(short))
    chat_model.model.config.max_seq_len = 2 * length
    assert chat_model.chat_ids(messages, TOOLS, length) == template(short)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_stops_the_answer_and_not_the_program(root, tmp_path, tokenizer):
    model = random_model(max_seq_len=8192)
    save_tuned(model, tmp_path, tokenizer)
    command = [sys.executable, root / "eval_model.py", "--out_dir", tmp_path, "--device", "cpu"]
    command += ["--max_new_tokens", "8000", "--temperature", "0"]
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
    _, mark, after = said.partition(" …\n> ".encode())
    assert mark  # it was stopped, and went on: the setting, the second answer, the end
    assert after.startswith(b"> ") and after.endswith(b"\n> \n")
    assert (
        error.decode() == "(cut after 3 tokens; /set max_new_tokens 6 allows more, then /again)\n"
    )


def test_the_last_question_is_answered_again(talk):
    """With the prompt of the first time; the new answer takes the old one's place."""
    one, two, *_ = talk("Hi", "你好")
    assert talk("Hi", "你好", "/again")[2] == two
    assert talk("Hi", "/again", "你好")[2] == two
    assert talk("Hi", "/set max_new_tokens 1", "/again", "/set max_new_tokens 5", "你好")[4] != two
    assert "/again: " in talk("/again")[0]
    assert one != two


def test_an_answer_that_cannot_be_given_again_stays(run, tmp_path, tokenizer):
    save_tuned(random_model(max_seq_len=24), tmp_path, tokenizer)
    path, saved = tmp_path / "talk.jsonl", tmp_path / "saved.jsonl"
    messages = chat("one", "two", "long words " * 30, "three")
    path.write_text(json.dumps({"conversations": messages}), encoding="utf-8")
    typed = f"/load {path}\n/again\n/save {saved}\n".encode()
    words = ["--out_dir", tmp_path, "--max_new_tokens", 4]
    said = run(*words, script="eval_model.py", typed=typed).stdout
    assert "max_seq_len 24" in said
    assert json.loads(saved.read_text(encoding="utf-8"))["conversations"] == messages


@pytest.mark.parametrize("word", ["exit", "quit", "/exit", "/quit", " Exit "])
def test_words_that_leave(talk, word):
    assert talk(word, "Hi") == [""]


def test_help_has_two_names(talk):
    assert talk("/?") == talk("/help") != [""]


def ending_model(tokenizer, **shape) -> MiniMindLM:
    """A model that ends its answer at once: its layers add nothing to the last token's state."""
    model = random_model(**shape)
    newline = tokenizer.encode("\n")[-1]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):
                weight.zero_()
        weight = model.tok_embeddings.weight
        model.norm.weight.fill_(1)
        weight[tokenizer.eos_token_id] = 10 * weight[newline]
    return model


def test_an_answer_that_is_cut_is_noted(run, tmp_path, tokenizer):
    words = ["--out_dir", tmp_path, "--temperature", 0, "--prompt", "Hi"]
    ids = tokenizer.apply_chat_template(ask("Hi"), add_generation_prompt=True, return_dict=False)
    room = 40 - len(ids)

    def notes(*more):
        return run(*words, *more, script="eval_model.py").stderr

    save_tuned(random_model(max_seq_len=40), tmp_path, tokenizer)
    for most in (7, room - 1):
        said = (
            f"(cut after {most} tokens; /set max_new_tokens {2 * most} allows more, then /again)\n"
        )
        assert notes("--max_new_tokens", most) == said
    full = "(cut: the model's context of 40 tokens is full; /reset begins anew)\n"
    assert notes("--max_new_tokens", room) == notes("--max_new_tokens", room + 1) == full
    assert "40 个 token" in notes("--max_new_tokens", room + 1, "--lang", "zh")
    save_tuned(ending_model(tokenizer, max_seq_len=40), tmp_path, tokenizer)
    assert notes("--max_new_tokens", 7) == ""
    save_tuned(random_model(), tmp_path, tokenizer, "pretrain_32", "pretrain")
    assert notes("--weight", "pretrain", "--max_new_tokens", 7) == ""  # it ends where it may


def test_speed_is_shown_on_request(run, chat_dir, monkeypatch):
    """On a clock that moves on by half a second whenever it is read."""
    words = ["--out_dir", chat_dir, "--weight", "full_sft", "--dim", 32, "--max_new_tokens", 5]
    words += ["--temperature", 0, "--prompt", "Hi"]
    plain = run(*words, script="eval_model.py")
    monkeypatch.setattr("time.perf_counter", itertools.count(0, 0.5).__next__)
    timed = run(*words, "--verbose", script="eval_model.py")
    assert plain.stdout == timed.stdout
    shown = timed.stderr.removeprefix(plain.stderr)
    form = r"\(5 tokens in ([\d.]+) s: ([\d.]+) tokens/s, the first after 0.50 s\)\n"
    seconds, rate = map(float, re.fullmatch(form, shown).groups())
    assert 1 <= seconds <= 3 and rate == pytest.approx(5 / seconds, abs=0.06)


def test_every_text_has_a_chinese_one_with_the_same_values():
    from string import Formatter

    names = {name for name in vars(chat_texts) if name.isupper()} - {"HELP_ZH", "CHINESE"}
    assert chat_texts.CHINESE.keys() == {getattr(chat_texts, name) for name in names}

    def values(text):
        return sorted((field, how) for _, field, how, _ in Formatter().parse(text) if field)

    for english, chinese in chat_texts.CHINESE.items():
        assert values(english) == values(chinese)
        assert re.search("[\u4e00-\u9fff]", chinese) and not re.search("[\u4e00-\u9fff]", english)


@pytest.mark.parametrize(
    ("variables", "words", "is_chinese"),
    [
        ({"LANG": "zh_CN.UTF-8"}, [], True),
        ({"LANG": "en_GB.UTF-8", "LC_MESSAGES": "zh_TW"}, [], True),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, [], False),
        ({"LANG": "de_DE.UTF-8"}, [], False),
        ({"LANG": "zh_CN.UTF-8"}, ["--lang", "en"], False),
        ({"LANG": "de_DE.UTF-8"}, ["--lang", "zh"], True),
    ],
)
def test_the_language_is_the_locale_s_or_the_flag_s(
    talk, monkeypatch, variables, words, is_chinese
):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = talk("/help", "/bogus", "/system 好", "/set top_p 7", more=words)
    assert ["退出" in said[0], "没有这个命令" in said[1]] == [is_chinese] * 2
    assert ("系统提示词：好" if is_chinese else "system message: 好") == said[2]
    assert said[3].startswith("/set top_p：" if is_chinese else "/set top_p: ")


def test_a_pasted_text_of_several_lines_is_one_message(root, chat_dir, tokenizer):
    pty, readline = pytest.importorskip("pty"), pytest.importorskip("readline")
    if "libedit" in readline.__doc__:
        pytest.skip("libedit does not know where a paste ends")
    command = [root / "eval_model.py", "--out_dir", chat_dir, "--weight", "full_sft", "--dim", 32]
    command += ["--device", "cpu", "--temperature", 0, "--max_new_tokens", 5, "--lang", "en"]
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {
            "TERM": "xterm",
            "OMP_NUM_THREADS": "1",
            "PYTHONUTF8": "1",
            "LANG": "C.UTF-8",
        }
        os.execv(sys.executable, [sys.executable, *map(str, command)])
    said = b""

    def read_until(text):
        nonlocal said
        while text not in said:
            assert select.select([terminal], [], [], 240)[0], said
            said += os.read(terminal, 4096)
        before, _, said = said.partition(text)
        return before.decode()

    read_until(b"\x1b[?2004h")  # which asks the terminal to mark a paste
    read_until(b"> ")
    os.write(terminal, b"\x1b[200~one\n/two\n\nthree\n\x1b[201~")
    read_until(b"three")
    os.write(terminal, b"\r")
    read_until(b"\x1b[?2004l")
    answer = read_until(b"(cut after").replace("\r", "").strip("\n")
    read_until(b"> ")
    os.write(terminal, b"exit\r")
    with contextlib.suppress(OSError):  # of a terminal that is closed
        while os.read(terminal, 4096):
            pass
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0
    path = chat_dir / "full_sft_32.pth"
    assert answer == greedy_answer(path, tokenizer, ask("one\n/two\n\nthree"), 5).strip()


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
    array = tmp_path / "questions.json"
    array.write_text(json.dumps(lines, indent=2), encoding="utf-8")
    same = ["--input_file", array, "--output_file", tmp_path / "same.jsonl"]
    run(*words, *same, script="eval_model.py")
    assert (tmp_path / "same.jsonl").read_bytes() == out.read_bytes()
    again = ["--input_file", path, "--output_file", out]
    assert str(out) in run(*words, *again, script="eval_model.py", code=2).stderr
    path.write_text('{"prompt": "Hi"}\n{"prompt": 3}\n', encoding="utf-8")
    again[-1] = tmp_path / "new.jsonl"
    error = run(*words, *again, script="eval_model.py", code=2).stderr
    assert f"{path}:2: " in error and not again[-1].exists()
    assert "1 of 2 lines are bad; --skip_bad_lines 0.5 goes on without them" in error
    assert run(*words, *again, "--skip_bad_lines", script="eval_model.py", code=2).stderr == error
    said = run(*words, *again, "--skip_bad_lines", 0.5, script="eval_model.py").stdout
    assert "1 lines that cannot be answered" in said
    answer = json.loads(again[-1].read_text(encoding="utf-8"))  # the only line
    assert answer == {"prompt": "Hi", "answer": answers[0]["answer"]}
    again[-1].unlink()
    words[3] = "pretrain"
    error = run(*words, *again, script="eval_model.py", code=2).stderr
    assert 'pretrained weights continue {"text"} lines' in error


def test_a_line_keeps_what_it_holds(run, chat_dir, tmp_path):
    """Where a line brings an answer, the model's has another name, in the whole file."""
    path = tmp_path / "questions.jsonl"
    words = ["--out_dir", chat_dir, "--weight", "full_sft", "--dim", 32, "--temperature", 0]
    words += ["--max_new_tokens", 4, "--input_file", path]
    answers = []
    for number, (extra, name) in enumerate(
        [
            ({}, "answer"),
            ({"answer": "gold"}, "response"),
            ({"answer": None, "response": 1}, "response_2"),
            ({"answer": 1, "response": 1, "response_2": 2}, "response_3"),
        ]
    ):
        lines = [{"prompt": "Hi"}, {"prompt": "Hi", **extra}]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        out = tmp_path / f"{number}.jsonl"
        said = run(*words, "--output_file", out, script="eval_model.py").stdout
        assert f'2 answers in {out}, as "{name}"' in said
        written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        answers += [line.pop(name) for line in written]
        assert written == lines
    assert len(set(answers)) == 1


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
    save_tuned(model, tmp_path, tokenizer, "full_sft_128")
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
    said = run(*words, "--score", path, "--quantize", "int8", script="eval_model.py").stdout
    assert abs(float(re.search(r"loss by ([+-]\d+\.\d+)%", said)[1])) <= 1


def test_both_engines_give_the_same_answers(run, tmp_path, tokenizer):
    save_tuned(random_model(dim=128), tmp_path, tokenizer, "full_sft_128")
    path, prompts = tmp_path / "asked.jsonl", ["Hi", "你好 " * 40, "one two"]
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), encoding="utf-8")
    words = ["--out_dir", tmp_path, "--max_new_tokens", 12, "--temperature", 0]
    answers = []
    for engine in ("torch", "onnx"):
        out = tmp_path / f"{engine}.jsonl"
        files = ["--input_file", path, "--output_file", out, "--batch_size", 2]
        run(*words, *files, "--engine", engine, script="eval_model.py")
        answers.append(out.read_text(encoding="utf-8"))
    assert answers[0] == answers[1]


def test_scores_of_long_conversations_miss_nothing(run, tmp_path, tokenizer):
    """All targets of answers beyond 512 tokens; what is beyond the context is told."""
    long = chat("Hi", "stone " * 700)
    path = tmp_path / "long.jsonl"
    lines = [{"prompt": "Hi", "messages": long}, {"prompt": "Hi", "messages": chat("Hi", "Hello")}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    targets = sum(
        len(tokenizer.encode(line["messages"][1]["content"], add_special_tokens=False)) + 1
        for line in lines
    )
    words = ["--out_dir", tmp_path, "--max_new_tokens", 1, "--batch_size", 2, "--score", path]
    save_tuned(random_model(), tmp_path, tokenizer)
    said = run(*words, script="eval_model.py").stdout
    assert f"{targets:,} target tokens of 2 samples" in said and "2 greedy answers" in said
    with path.open("a", encoding="utf-8") as file:
        file.write('{"messages": 1}\n')
    error = run(*words, script="eval_model.py", code=2).stderr
    assert f"{path}:3: " in error and "--skip_bad_lines" in error
    words += ["--skip_bad_lines", 0.4]
    assert said in run(*words, script="eval_model.py").stdout.replace(
        "1 lines that cannot be answered left out\n1 bad lines of the file left out\n", ""
    )
    save_tuned(random_model(max_seq_len=600), tmp_path, tokenizer)
    said = run(*words, script="eval_model.py").stdout
    assert "beyond the context of 600 tokens: 0 turns left out, 1 answers cut" in said


def test_output_that_cannot_be_written_is_said_before_the_work(run, chat_dir, tmp_path):
    path = write_chats(tmp_path / "q.jsonl", [chat("Hi", "Hello")])
    words = ["--out_dir", chat_dir, "--weight", "full_sft", "--dim", 32]
    for kind in ("--input_file", "--score"):
        out = tmp_path / "nowhere" / "out"
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(MiniMindLM, "batch_generate", None)  # not asked for
            patches.setattr(MiniMindLM, "forward", None)
            error = run(*words, kind, path, "--output_file", out, script="eval_model.py", code=2)
        assert error.stderr == (
            f"eval_model.py: error: --output_file {out}: No such file or directory\n"
        )


def test_stray_bytes_of_the_command_line_are_no_reason_to_fail(run, chat_dir):
    words = ["--out_dir", chat_dir, "--weight", "full_sft", "--dim", 32, "--max_new_tokens", 1]
    run(*words, "--prompt", "a\udcff", "--system", "b\udcff", script="eval_model.py")


def test_a_tokenizer_without_calls_is_told(run, talk, tmp_path, tokenizer_dir):
    """A conversation with tool calls cannot be told by it; the chat goes on."""
    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_text(
        path.read_text(encoding="utf-8").replace("<tool_call>", "<tool_fall>"), encoding="utf-8"
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    save_tuned(random_model(), tmp_path, tokenizer)
    saved = tmp_path / "talk.jsonl"
    saved.write_text(json.dumps({"messages": CALLED}), encoding="utf-8")
    said = run(
        *["--out_dir", tmp_path, "--tokenizer_path", tmp_path / "tokenizer"],
        *["--max_new_tokens", 1, "--temperature", 0],
        script="eval_model.py",
        typed=f"/load {saved}\nHi\n/reset\nHi\n".encode(),
    ).stdout
    assert "the conversation is not usable: needs the control token <tool_call>" in said


def test_work_that_fails_leaves_no_output(tmp_path):
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "out", "utf-8") as file:
        file.write(f"{1 / 0}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wanted", "given", "bleu", "rouge"),
    [
        # Five of six words, and none wrong: precision 1, BLEU exp(1 − 6/5), recall 5/6.
        (["one two three four five six"], ["one two three four five"], 81.9, 90.9),
        (["今天天气很好"], ["今天天气很"], 81.9, 90.9),  # and signs, where they are Chinese
        # 2 of 4 and 2 of 3 tokens in order: precision 2/3, recall 1/2, F 4/7; no four in a row.
        (["one two three four"], ["one three five"], 0.0, 57.1),
        (["天气很好", "你好"], ["天很", "再见"], 0.0, 33.3),  # F 2/3 and 0
    ],
)
def test_scores_of_answers_by_hand(capsys, wanted, given, bleu, rouge):
    """BLEU and ROUGE-L worked out, chrF as sacrebleu scores answers against references."""
    wanted_messages, given_messages = ([{"content": t} for t in texts] for texts in (wanted, given))
    compare_contents(wanted_messages, given_messages, rouge_scorer())
    chrf = sacrebleu.corpus_chrf(given, [wanted]).score
    said = capsys.readouterr().out
    assert f"BLEU {bleu:.1f}, chrF {chrf:.1f}, ROUGE-L {rouge:.1f}" in said


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
