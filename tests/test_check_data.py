"""What scripts/check_data.py says of small files, by hand."""

import json

import pytest

USER, ANSWER = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
CHAT = {"messages": [USER, ANSWER]}
EMPTY = {"messages": [USER, {**ANSWER, "content": ""}]}


@pytest.fixture
def check(run, tmp_path):
    """Write files, check them, and return what is printed of each."""

    def check(files, *words, code=0):
        paths = [tmp_path / name for name in files]
        for path, content in zip(paths, files.values(), strict=True):
            if not isinstance(content, str):
                content = "".join(json.dumps(record) + "\n" for record in content)
            path.write_text(content, encoding="utf-8")
        done = run(*paths, *words, script="scripts/check_data.py", code=code)
        shown = done.stdout.replace("│", "")  # what stands between tokens
        return shown.split("══ ")[1:], done.stderr

    return check


def test_what_is_learnt_dropped_repeated_and_bad(check, tmp_path):
    files = {
        "chats.jsonl": [CHAT, CHAT, {"messages": [USER, USER, ANSWER, USER]}, EMPTY, {"a": 1}],
        "texts.txt": "One text.\n\nAnd more.",
        "pairs.jsonl": [{"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."}],
        "prompts.jsonl": [EMPTY],
    }
    (chats, texts, pairs, prompts), error = check(files, "--batch_size", 2, "--examples", 1)
    assert error == ""
    for line in (
        "5 records: conversation (4), a shape that is not known (1)",
        "1 bad lines of the file left out",
        f'{tmp_path}/chats.jsonl:5: no conversation: its fields are "a"; nearest: ',
        "1 messages joined to the one before, of the same role",
        "1 last turns left out: they have no answer",
        "1 empty answers not learnt",
        "1 conversations left out: nothing to learn",
        "1 records are repeated",
        "1 rows of 512: 1 steps of 2 in an epoch",
        "<s>user\nHi?</s>\n<s>assistant\n⟦Hello.</s>⟧",
    ):
        assert line in chats
    assert "for train_pretrain.py" in texts and "English 100%" in texts
    assert "1 pairs: 1 steps of 2" in pairs and "⟦No.</s>⟧" in pairs
    assert "prompts for reinforcement learning" in prompts and "<s>assistant\n" in prompts


def test_flags_that_say_what_a_text_is(check):
    (shown,), _ = check(
        {"a.jsonl": [{"body": "text", "head": "Title"}]},
        *["--text_template", r"{head}\n{body}", "--examples", 1],
    )
    assert "<s>⟦Title\ntext</s>⟧" in shown


def test_nothing_usable_is_exit_status_2(check, tmp_path):
    files = {"bad.jsonl": [{"a": 1}], "good.jsonl": [CHAT]}
    (bad, good), error = check(files, "--examples", 0, code=2)
    assert "1 records: conversation (1)" in good and "records" not in bad
    assert f"{tmp_path}/bad.jsonl: not one good line in 1" in error


def test_a_label_of_what_is_not_judged(check):
    """Conversations and texts that have such a column are what they are without it."""
    ((chats,), _) = check({"chats.jsonl": [{**CHAT, "label": 1}] * 3})
    assert "3 records: conversation (3)" in chats
    ((pairs,), _) = check(
        {"pairs.jsonl": [{"prompt": "a", "completion": w, "label": w == "x"} for w in "xy"]}
    )
    assert "1 records: " in pairs
