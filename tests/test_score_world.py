"""The scorecard: what counts as right, sums by hand, and batches against one question at a time."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import randomised
from transformers import AutoTokenizer

from dataset import tokenizer_hash
from model import LMConfig, MiniMindLM
from training import save_weights

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import score_world  # noqa: E402
from score_world import Question  # noqa: E402

QUESTIONS = [
    Question("facts", "en", "Where does Davor live?", ("Davor lives in Rock.",), 20),
    Question("facts", "zh", "米洛住在哪里？", ("米洛住在古塔。",), 40),
    Question("comparing", "en", "Which is larger, 3 or 5?", ("5.", "5. Glad to help!"), 2),
    Question("declining", "en", "How tall is Davor?", ("I do not know that.",), 2),
    Question("declining", "zh", "米洛有多高？", ("这个我不知道。",), 2),
    Question("identity", "zh", "你叫什么？", ("我叫MiniMind。",), 0),
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def small_model(tokenizer) -> MiniMindLM:
    torch.manual_seed(3)
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    return randomised(MiniMindLM(LMConfig(**shape, vocab_size=len(tokenizer))))


def test_only_spaces_case_width_and_the_last_stop_do_not_count():
    right = Question("facts", "en", "", ("Davor lives in Rock.",), 1)
    for text in ("Davor lives in Rock.", " davor lives\nin Rock", "Ｄavor lives in Rock。"):
        assert right.accepts(text)
    for text in ("", "Rock.", "Davor lives in Rock. Yes.", "Davor lives in Dale.", "."):
        assert not right.accepts(text)
    assert QUESTIONS[2].accepts("5. Glad to help!")
    assert not Question("addition", "en", "", ("1 + 1 = 2.",), 1).accepts("1 + 1 = 2.5")


def test_scores_are_sums_by_hand():
    answers = [
        "Davor lives in Dale.",
        "这个我不知道。",
        "5",
        "I do not know that.",
        "170",
        "MiniMind",
    ]
    assert score_world.score(QUESTIONS, answers) == {
        ("facts", "en"): (0, 1),
        ("facts", "zh"): (0, 1),
        ("facts", "all"): (0, 2),
        ("comparing", "en"): (1, 1),
        ("comparing", "all"): (1, 1),
        ("declining", "en"): (1, 1),
        ("declining", "zh"): (0, 1),
        ("declining", "all"): (0.5, 2),
        ("identity", "zh"): (0, 1),
        ("identity", "all"): (0, 1),
        ("overall", "en"): (2 / 3, 3),
        ("overall", "zh"): (0, 3),
        ("overall", "all"): (1 / 3, 6),
        # A wrong answer is an answer; "I do not know" is none.
        ("answered where it can", "en"): (1, 1),
        ("answered where it can", "zh"): (0, 1),
        ("answered where it can", "all"): (0.5, 2),
    }


def test_chance_is_the_mean_over_the_questions():
    assert score_world.chance(QUESTIONS, "facts", "all") == pytest.approx((1 / 20 + 1 / 40) / 2)
    assert score_world.chance(QUESTIONS, "identity", "zh") == 0
    overall = (1 / 20 + 1 / 40 + 3 * 1 / 2 + 0) / 6
    assert score_world.chance(QUESTIONS, "overall", "all") == pytest.approx(overall)


def test_the_scorecard_has_a_row_for_each_skill_and_a_column_for_each_model():
    right = [question.answers[0] for question in QUESTIONS]
    text = score_world.scorecard(QUESTIONS, {"tuned": right, "fresh": [""] * len(right)})
    lines = text.splitlines()
    assert lines[0] == "| skill | language | questions | chance | tuned | fresh |"
    assert "| facts | English | 1 | 5% | 100% | 0% |" in lines
    assert "| overall | both | 6 | 26% | 100% | 0% |" in lines
    assert "| answered where it can | both | 2 |  | 100% | 100% |" in lines
    assert len(lines) == 2 + 3 * 4 + 2 * 2  # four groups in three languages, two in fewer


def test_examples_show_the_question_and_every_answer():
    text = score_world.examples(QUESTIONS[:2], {"tuned": ["Davor lives\nin Rock.", ""]})
    assert "facts, English: **Where does Davor live?**" in text
    assert "tuned: Davor lives in Rock." in text and "tuned: (nothing)" in text


def test_a_batch_answers_as_each_question_does_alone(tokenizer):
    model = small_model(tokenizer).eval()
    together = score_world.answer(model, tokenizer, QUESTIONS, batch_size=4)
    for question, text in zip(QUESTIONS, together, strict=True):
        chat = f"<s>user\n{question.text}</s>\n<s>assistant\n"
        ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt")["input_ids"]
        alone = model.generate(ids, max_new_tokens=32)[0, ids.shape[1] :]
        assert text == tokenizer.decode(alone, skip_special_tokens=True).strip()
    assert len(set(together)) > 1


def test_a_model_that_knows_all_answers_gets_all_right(tokenizer):
    class Knowing:
        device = torch.device("cpu")

        def eval(self):
            return self

        def generate(self, ids, attention_mask, max_new_tokens, eos_token_id, pad_token_id):
            texts = tokenizer.batch_decode(ids)
            answers = [
                next(q.answers[-1] for q in QUESTIONS if f"user\n{q.text}</s>" in text)
                for text in texts
            ]
            rows = [tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
            written = torch.full((len(rows), max_new_tokens), pad_token_id)
            for row, tokens in zip(written, rows, strict=True):
                row[: len(tokens) + 1] = torch.tensor([*tokens, eos_token_id])
            return torch.cat((ids, written), dim=1)

    answers = score_world.answer(Knowing(), tokenizer, QUESTIONS, batch_size=2)
    assert score_world.score(QUESTIONS, answers)["overall", "all"] == (1, 6)


# The script


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("score") / "test.jsonl"
    records = [
        {
            "skill": question.skill,
            "language": question.language,
            "conversations": [
                {"role": "user", "content": question.text},
                {"role": "assistant", "content": question.answers[0]},
            ],
            "accepted": list(question.answers),
            "choices": question.choices,
        }
        for question in QUESTIONS
    ]
    path.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    return path


def test_the_script_writes_what_it_prints(run, tokenizer, questions_file, tmp_path):
    model = small_model(tokenizer)
    for stage in ("full_sft", "pretrain"):
        path = tmp_path / f"{stage}_32.pth"
        save_weights(path, model, model.config, stage, tokenizer_hash(tokenizer))
    words = ["--dim", 32, "--out_dir", tmp_path, "--data_path", questions_file, "--examples"]
    words += ["--beside", "untrained", "pretrain", "--output", tmp_path / "new" / "card.md"]
    done = run(*words, script="scripts/score_world.py")
    assert (tmp_path / "new" / "card.md").read_text(encoding="utf-8") == done.stdout
    table = done.stdout.splitlines()
    assert table[0].endswith("| full_sft | untrained | pretrain |")
    overall = next(line for line in table if line.startswith("| overall | both"))
    assert overall == "| overall | both | 6 | 26% | 0% | 0% | 0% |"
    assert done.stdout.count("expected:") == 6


def test_what_is_missing_or_wrong_is_told_in_one_line(run, questions_file, tmp_path):
    script = "scripts/score_world.py"
    words = ["--dim", 32, "--out_dir", tmp_path, "--data_path"]
    done = run(*words, questions_file, script=script, code=2)
    assert "full_sft_32.pth" in done.stderr and done.stderr.count("\n") == 1
    done = run(*words, tmp_path / "none.jsonl", script=script, code=2)
    assert "--data_path" in done.stderr and done.stderr.count("\n") == 1
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"skill": "facts"}\n', encoding="utf-8")
    done = run(*words, bad, script=script, code=2)
    assert f"{bad}:1:" in done.stderr and done.stderr.count("\n") == 1
    done = run(*words, questions_file, "--weight", "untrained", script=script, code=2)
    assert "--beside" in done.stderr
