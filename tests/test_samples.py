"""--sample_prompts: what the model writes at each validation; the run is the same without."""

import ast
import json
import re

import pytest
import torch
from interruptions import SHAPE, assert_same, killed, result, write_texts
from test_train_full_sft import chats, write_chats
from tiny_models import greedy_answer, random_model, save_tuned

from model import load_lora, use_lora
from training import Run
from training.samples import NEW_TOKENS

WORDS = [*SHAPE, "--max_seq_len", 64, "--batch_size", 4, "--val_ratio", 0.2, "--max_steps", 6]
WORDS += ["--eval_interval", 3, "--save_interval", 3, "--learning_rate", 1e-2, "--dropout", 0.2]
PROMPTS = ["red 云 </s>", "number 1"]

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "train.jsonl", 20)


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("talks") / "train.jsonl", chats(20))


def samples(out, name="pretrain_32"):
    """Step, prompt and text of each sample in the log."""
    log = (out / "logs" / name / "training_log.txt").read_text(encoding="utf-8")
    return re.findall(r"step (\d+)  sample ('.*?'|\".*?\") → (.*)", log)


def test_texts_are_continued_and_the_run_is_the_same(run, texts, tokenizer, tmp_path):
    """Greedily, by the weights of that step; killed and resumed, too."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(["", *PROMPTS, ""]), encoding="utf-8")
    words = [*WORDS, "--data_path", texts]
    run(*words, "--out_dir", tmp_path / "without")
    run(*words, "--out_dir", tmp_path / "with", "--sample_prompts", file, "--keep_every", 3)
    found = samples(tmp_path / "with")
    assert [(int(step), prompt) for step, prompt, _ in found] == [
        (step, repr(prompt)) for step in (3, 6) for prompt in PROMPTS
    ]
    for step, prompt, text in found:
        model = random_model()
        model.load_state_dict(
            torch.load(tmp_path / "with" / f"pretrain_32_step{step}.pth", weights_only=True)
        )
        ids = tokenizer(ast.literal_eval(prompt), split_special_tokens=True)["input_ids"]
        new = model.eval().generate(torch.tensor([[1, *ids]]), max_new_tokens=NEW_TOKENS)
        assert text == repr(tokenizer.decode(new[0, 1 + len(ids) :], skip_special_tokens=True))
    same = [*words, "--out_dir", tmp_path / "killed", "--sample_prompts", *PROMPTS]
    with killed(5, Run, "add_step"):
        run(*same)
    run(*same, "--resume")
    wanted = result(tmp_path / "without")
    for folder in ("with", "killed"):
        ours = result(tmp_path / folder)
        arguments = ours["pretrain_32_resume.pth"]["arguments"]
        assert arguments.pop("sample_prompts") == PROMPTS
        for name in ("pretrain_32.pth", "metrics.jsonl"):
            assert_same(ours[name], wanted[name], name)
        for part in ("state", "optimizer", "random"):
            assert_same(
                ours["pretrain_32_resume.pth"][part], wanted["pretrain_32_resume.pth"][part], part
            )


def test_questions_are_answered_by_the_chat_template(run, talks, tokenizer, tmp_path):
    save_tuned(random_model(), tmp_path, tokenizer, "pretrain_32", "pretrain")
    words = [*WORDS, "--data_path", talks, "--out_dir", tmp_path, "--sample_prompts", *PROMPTS]
    run(*words, script="train_full_sft.py")
    found = samples(tmp_path, "full_sft_32")
    assert [int(step) for step, *_ in found] == [0, 0, 3, 3, 6, 6]  # first the starting weights
    question = [{"role": "user", "content": PROMPTS[1]}]
    answer = greedy_answer(tmp_path / "full_sft_32.pth", tokenizer, question, NEW_TOKENS)
    assert found[-1] == ("6", repr(PROMPTS[1]), repr(answer))


def test_an_adapter_answers_with_its_matrices(run, talks, tokenizer, tmp_path):
    base = save_tuned(random_model(), tmp_path, tokenizer)
    words = [*WORDS, "--data_path", talks, "--out_dir", tmp_path, "--sample_prompts", "Hi"]
    run(*words, script="train_lora.py")
    *_, text = samples(tmp_path / "lora", "identity_32")[-1]
    model = random_model()
    model.load_state_dict(torch.load(base, weights_only=True))
    load_lora(model, tmp_path / "lora" / "identity_32.pth", "identity")
    use_lora(model, "identity")
    messages = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    new = model.eval().generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS)[0, len(ids) :]
    assert text == repr(tokenizer.decode(new, skip_special_tokens=True))


def last_samples(out, name):
    """Prompt and text of each sample at the end."""
    log = (out / "logs" / name / "training_log.txt").read_text(encoding="utf-8")
    return re.findall(r"  sample ('.*?'|\".*?\") → (.*)", re.sub(r"step \d+  sample.*", "", log))


def test_a_run_ends_with_three_samples_and_the_next_command(run, talks, tokenizer, tmp_path):
    """Answers to questions that were held out, by the last weights."""
    save_tuned(random_model(), tmp_path, tokenizer, "pretrain_32", "pretrain")
    words = [*WORDS, "--data_path", talks, "--out_dir", tmp_path]
    done = run(*words, script="train_full_sft.py")
    found = last_samples(tmp_path, "full_sft_32")
    assert len(found) == 3
    questions = {
        message["content"]
        for line in talks.read_text(encoding="utf-8").splitlines()
        for message in json.loads(line)["messages"]
        if message["role"] == "user"
    }
    for question, _ in found:
        asked = ast.literal_eval(question)
        assert any(text.strip().endswith(asked) for text in questions)
    next_command = f"next: python eval_model.py --weight {tmp_path / 'full_sft_32.pth'}\n"
    assert done.stdout.endswith(next_command)


def test_a_question_is_shown_whole_whatever_it_says(run, tokenizer, tmp_path):
    """Also one that looks like a role, and what a tool returned."""
    asked = "Is every\nuser\nassistant\nhere?"
    call = {"name": "look", "arguments": {}}
    used = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": "", "weight": 0, "tool_calls": [call]},
        {"role": "tool", "content": "a user\nof it"},
    ]
    talks = [[{"role": "user", "content": asked}]] * 10 + [used] * 10
    answer = {"role": "assistant", "content": "Yes."}
    data = tmp_path / "talks.jsonl"
    lines = (json.dumps({"messages": [*talk, answer]}) + "\n" for talk in talks)
    data.write_text("".join(lines), encoding="utf-8")
    save_tuned(random_model(), tmp_path, tokenizer, "pretrain_32", "pretrain")
    words = [*SHAPE, "--max_seq_len", 64, "--batch_size", 4, "--max_steps", 1]
    run(*words, "--data_path", data, "--out_dir", tmp_path, script="train_full_sft.py")
    shown = {ast.literal_eval(prompt) for prompt, _ in last_samples(tmp_path, "full_sft_32")}
    assert shown == {asked, "a user\nof it"}


def test_a_text_s_beginning_is_continued_at_the_end(run, texts, tokenizer, tmp_path):
    """Each prompt is the beginning of a text, and the weights that were saved continue it so."""
    done = run(*WORDS, "--data_path", texts, "--out_dir", tmp_path)
    found = last_samples(tmp_path, "pretrain_32")
    assert len(found) == 3
    documents = [json.loads(line)["text"] for line in texts.read_text("utf-8").splitlines()]
    for prompt, _ in found:
        assert any(text.startswith(ast.literal_eval(prompt)) for text in documents)
    assert f"next: python eval_model.py --weight {tmp_path / 'pretrain_32.pth'}\n" in done.stdout
    assert "next: python train_full_sft.py --from_weight " in done.stdout
