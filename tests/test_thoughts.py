"""Thoughts and calls of tools, through the terminal, files and scores, of scripted answers."""

import json
import os

import pytest
import torch
from test_train_full_sft import write_chats
from tiny_models import random_model, save_tuned

from dataset import ChatEncoder, SFTDataset, render_chat
from dataset.records import RecordOptions
from inference import ChatModel
from inference.scoring import score
from inference.tools import BUILT_IN
from model import MiniMindLM

QUESTION = {"role": "user", "content": "2 + 3?"}
CALL = {"name": "calculator", "arguments": '{"expression": "2 + 3"}'}
CALLS = {"role": "assistant", "content": "", "reasoning_content": "add", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "5"}
ANSWER = {"role": "assistant", "content": "It is 5.", "reasoning_content": "easy"}
TOOLS = [BUILT_IN["calculator"].schema]
LINE = {"conversations": [QUESTION, CALLS, RESULT, ANSWER], "tools": TOOLS}


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return ChatEncoder(tokenizer)


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("out")
    save_tuned(random_model(), folder, tokenizer)
    return folder


def ids_of(encoder, messages, tools=(), **options):
    return encoder.encode([render_chat(messages, tools, **options)]).ids.tolist()


def answer_ids(encoder, message, enable_thinking=None):
    """The tokens with which a model gives a message, </s> included."""
    prompt = {"add_generation_prompt": True, "enable_thinking": enable_thinking}
    begin = len(ids_of(encoder, [QUESTION], **prompt))
    return ids_of(encoder, [QUESTION, message])[begin:-1]


@pytest.fixture
def scripted(monkeypatch, encoder):
    """Make every model give these answers in turn; returns the prompts that it got."""

    def script(*answers):
        prompts, rest = [], iter(answers)

        def generate(self, ids, **options):
            prompts.append(ids[0].tolist())
            yield from torch.tensor(next(rest))

        def batch_generate(self, prompts_, **options):
            prompts.extend(prompt.tolist() for prompt in prompts_)
            return [torch.tensor(next(rest)[:-1]) for _ in prompts_]

        monkeypatch.setattr(MiniMindLM, "generate", generate)
        monkeypatch.setattr(MiniMindLM, "batch_generate", batch_generate)
        return prompts

    return script


def test_a_conversation_in_the_terminal_is_as_trained(run, scripted, encoder, out_dir, tmp_path):
    """Its prompts are beginnings of what training reads of the file that /save writes."""
    saved = tmp_path / "saved.jsonl"
    second = {"role": "assistant", "content": "Yes.", "reasoning_content": ""}
    scripted_answers = [answer_ids(encoder, m) for m in (CALLS, ANSWER)]
    prompts = scripted(*scripted_answers, answer_ids(encoder, second, False))
    typed = f"{QUESTION['content']}\n/thinking off\nSure?\n/save {saved}\n/quit\n".encode()
    words = ["--out_dir", out_dir, "--tools", "calculator"]
    done = run(*words, script="eval_model.py", typed=typed)
    assert "> It is 5.\n" in done.stdout
    assert "> Yes.\n" in done.stdout
    assert "add" not in done.stdout
    shown = ["add", '→ calculator {"expression": "2 + 3"}', "← 5", "easy"]
    assert done.stderr.splitlines()[-4:] == shown
    messages = [QUESTION, CALLS, RESULT, ANSWER, {"role": "user", "content": "Sure?"}, second]
    line = json.loads(saved.read_text(encoding="utf-8"))
    assert line == {"conversations": messages, "tools": TOOLS}
    whole = ids_of(encoder, messages, TOOLS)
    assert all(whole[: len(prompt)] == prompt for prompt in prompts)
    assert len(prompts) == 3
    shown = run(saved, script="scripts/show_batch.py").stdout
    assert "<tool_call>" in shown


def test_schemas_of_a_file_are_offered_and_not_run(run, scripted, encoder, out_dir, tmp_path):
    schema = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([schema]), encoding="utf-8")
    asks = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather"}]}
    asks["tool_calls"][0]["arguments"] = "{}"
    prompts = scripted(answer_ids(encoder, asks), answer_ids(encoder, ANSWER, True))
    typed = f"/tools {path}\nHi\n/tools off\n/thinking on\nHi\n/thinking maybe\n/tools {path}x\n"
    words = ["--out_dir", out_dir, "--lang", "en"]
    done = run(*words, script="eval_model.py", typed=typed.encode())
    assert "> tools: weather\n" in done.stdout
    assert "tools: none" in done.stdout
    assert "/thinking takes one of on, off, auto" in done.stdout
    assert f"/tools {path}x: " in done.stdout
    assert "(the answer ends with a call that nothing here runs)" in done.stderr
    hi = {"role": "user", "content": "Hi"}
    prompt = {"add_generation_prompt": True}
    assert prompts == [
        ids_of(encoder, [hi], [schema], **prompt),
        ids_of(encoder, [hi, asks, hi], enable_thinking=True, **prompt),
    ]


def test_a_broken_call_is_told(run, scripted, encoder, tokenizer, out_dir):
    text = tokenizer("\nf(1)\n", add_special_tokens=False)["input_ids"]
    tags = tokenizer.convert_tokens_to_ids(["<tool_call>", "</tool_call>", "</s>"])
    scripted([tags[0], *text, *tags[1:]])
    done = run("--out_dir", out_dir, "--prompt", "Hi", script="eval_model.py")
    assert done.stdout == "f(1)\n"
    assert "(a call of a tool that is not valid" in done.stderr


def test_a_file_of_questions_gets_the_parts(run, scripted, encoder, out_dir, tmp_path):
    path, out = write_chats(tmp_path / "q.jsonl", [[QUESTION]] * 2), tmp_path / "out.jsonl"
    prompts = scripted(answer_ids(encoder, ANSWER, True), answer_ids(encoder, CALLS, True))
    words = ["--out_dir", out_dir, "--thinking", "on", "--input_file", path, "--output_file", out]
    run(*words, script="eval_model.py")
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert answers == [
        {"messages": [QUESTION], "answer": "It is 5.", "reasoning_content": "easy"},
        {
            "messages": [QUESTION],
            "answer": "",
            "reasoning_content": "add",
            "tool_calls": [CALL],
        },
    ]
    opened = ids_of(encoder, [QUESTION], add_generation_prompt=True, enable_thinking=True)
    assert prompts == [opened] * 2
    error = run(*words[:-1], tmp_path / "x", "--tools", "clock", script="eval_model.py", code=2)
    assert "--tools" in error.stderr.splitlines()[-1]


def test_scores_compare_contents_and_calls(scripted, encoder, tokenizer, tmp_path, capsys):
    """A perfect model has 100; another gets a call wrong, and calls where none is needed."""
    plain = {"conversations": [QUESTION, {**ANSWER, "reasoning_content": ""}], "tools": TOOLS}
    path = tmp_path / "held_out.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n{json.dumps(plain)}\n", encoding="utf-8")
    chat_model = ChatModel("", random_model(), tokenizer, chats=True, engine="torch")
    perfect = [answer_ids(encoder, m) for m in (CALLS, ANSWER)]
    perfect.append(answer_ids(encoder, plain["conversations"][1], False))
    prompts = scripted(*perfect)
    score(chat_model, path, None, 64, 0.0)
    said = capsys.readouterr().out
    assert "2 greedy answers beside their references: BLEU 100.0, chrF 100.0" in said
    assert (
        "1 answers that must call tools: 100.0% call any by valid JSON, 100.0% the right ones, "
        "100.0% with the very arguments\n2 that need not: 0.0% call one"
    ) in said
    assert prompts[2] == ids_of(
        encoder, [QUESTION], TOOLS, add_generation_prompt=True, enable_thinking=False
    )
    other = {**CALL, "arguments": {"expression": "2 - 3"}}
    wrong = [answer_ids(encoder, {**CALLS, "tool_calls": [other]}), perfect[0], perfect[2]]
    scripted(*wrong)
    score(chat_model, path, None, 64, 0.0)
    said = capsys.readouterr().out
    assert "100.0% the right ones, 0.0% with the very arguments" in said
    assert "2 that need not: 50.0% call one" in said


def test_a_share_of_plain_answers_follows_an_empty_thought(tmp_path, tokenizer, encoder):
    """The same ones each time; answers with a thought keep it."""
    plain = {"role": "assistant", "content": "It is 5."}
    chats = [[{**QUESTION, "content": f"{n}?"}, plain] for n in range(200)]
    path = write_chats(tmp_path / "chats.jsonl", [*chats, [QUESTION, ANSWER]])

    def read(ratio):
        options = {"records": RecordOptions(empty_think_ratio=ratio), "cache_dir": tmp_path}
        dataset = SFTDataset(path, tokenizer, 64, **options)
        return [dataset[i] for i in range(len(dataset))]

    def is_empty(item):
        ids, _, mask = item
        empty = ids_of(encoder, [], add_generation_prompt=True, enable_thinking=False)[-7:]
        begin = int(mask.nonzero()[0]) + 1
        return ids[:begin].tolist()[-7:] == empty

    shares = [sum(map(is_empty, read(ratio))) for ratio in (0.0, 0.3, 1.0)]
    assert shares[0] == 0
    assert 40 <= shares[1] <= 80
    assert shares[2] == 200
    for first, again in zip(read(0.3), read(0.3), strict=True):
        assert all(map(torch.equal, first, again))


@pytest.mark.skipif(os.name == "nt", reason="terminals of POSIX")
def test_thoughts_are_dimmed_in_a_terminal(monkeypatch, capsys):
    from inference.parts import Delta
    from inference.terminal import AnswerPrinter

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    printer = AnswerPrinter()
    for delta in (Delta("reasoning", "hm"), Delta("content", "a\nb")):
        printer.show(delta)
    printer.end_part()
    said = capsys.readouterr()
    assert (said.out, said.err) == ("a\nb\n", "\033[2mhm\033[0m\n")
