"""scripts/show_batch.py and scripts/analyze_loss.py, against what is worked out by hand."""

import json
import re
import runpy

import pytest
import torch
import torch.nn.functional as F
from rounding import LOSS
from tiny_models import randomised
from transformers import AutoTokenizer

from model import LMConfig, MiniMindLM, save_weights, tokenizer_hash
from sample_world import build_world, history_questions

CHATS = [
    [("user", "Hi"), ("assistant", "Hello 你好"), ("user", "Bye</s>"), ("assistant", "Ciao")],
    [("system", "Be kind"), ("user", "你是谁？"), ("assistant", "我是 MiniMind。")],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_dir):
    """Conversations, texts, and the weights of a tiny untrained model."""
    folder = tmp_path_factory.mktemp("inside")
    lines = [
        json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}, ensure_ascii=False)
        for chat in CHATS
    ]
    (folder / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "texts.jsonl").write_text('{"text": "春天来了"}\n{"text": "Hello"}', encoding="utf-8")
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(dim=32, n_layers=1))
    digest = tokenizer_hash(AutoTokenizer.from_pretrained(tokenizer_dir))
    save_weights(folder / "full_sft_32.pth", model, model.config, "full_sft", digest)
    return folder


def show(run, path, *words):
    return run(path, *words, script="scripts/show_batch.py").stdout


def test_what_is_learnt_stands_in_brackets(run, folder):
    shown = show(run, folder / "chats.jsonl")
    legend, title, text = shown.split("\n", 2)
    assert "⟦learnt⟧" in legend and "│ between tokens" in legend
    assert "chats.jsonl:1: " in title
    assert text.replace("│", "") == (
        "<s>user\nHi</s>\n<s>assistant\n⟦Hello 你好</s>⟧\n"
        "<s>user\nBye</s></s>\n<s>assistant\n⟦Ciao</s>⟧\n"
    )


def test_borders_stand_between_tokens(run, folder, tmp_path, tokenizer):
    """Except between those that are parts of one character, as of 鳧 here."""
    tokens = tokenizer("a 鳧b 你好", add_special_tokens=False)["input_ids"]
    alone = [tokenizer.decode([token]) for token in tokens]
    assert "�" in alone and "鳧" not in alone
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a 鳧b 你好"}\n', encoding="utf-8")
    halves = [i for i, text in enumerate(alone) if "�" in text]
    expected = [*alone[: halves[0]], "鳧", *alone[halves[-1] + 1 :]]
    assert f"<s>⟦{'│'.join(expected)}│</s>⟧" in show(run, path)


def test_a_packed_row_shows_its_documents_and_padding(run, folder):
    shown = show(run, folder / "chats.jsonl", "--packed", "--max_seq_len", 96)
    heads = re.findall(r"── document (\d) of 2, \S+chats.jsonl:(\d): (\d+) tokens", shown)
    assert [head[:2] for head in heads] == [("1", "1"), ("2", "2")]
    used = sum(int(tokens) - 1 for *_, tokens in heads)
    assert f"{96 - used} of 96 positions are padding" in shown


def test_all_but_the_start_of_a_text_is_learnt(run, folder):
    assert "<s>⟦春天来了</s>⟧" in show(run, folder / "texts.jsonl").replace("│", "")


def test_an_index_that_is_not_there_is_told(run, folder):
    done = run(folder / "texts.jsonl", "--index", 2, script="scripts/show_batch.py", code=2)
    assert "--index 2" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [('{"text": ""}', '"text" is empty'), ('{"id": 1, "text": "a', "JSON ends too early")],
)
def test_a_bad_first_line_is_told_as_the_text_that_it_is(run, tmp_path, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + '\n{"text": "good"}\n', encoding="utf-8")
    done = run(path, script="scripts/show_batch.py", code=2)
    assert f"{path}:1: {reason}" in done.stderr


def analyse(run, folder, name, *words):
    out = folder / f"loss_{name}"
    words = [folder / "full_sft_32.pth", folder / name, "--out_dir", out, *words]
    done = run(*words, script="scripts/analyze_loss.py")
    return json.loads((out / "loss.json").read_text(encoding="utf-8")), done.stdout, out


def losses_by_hand(folder, tokenizer_dir, chat):
    """Loss of each token of a conversation, and the role of the message that it is in."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model = MiniMindLM(LMConfig(dim=32, n_layers=1)).eval()
    model.load_state_dict(torch.load(folder / "full_sft_32.pth", weights_only=True))
    ids, roles = [], []
    for role, content in chat:
        text = tokenizer(content, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        head = tokenizer(f"{role}\n", add_special_tokens=False)["input_ids"]
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        message = [1, *head, *text, 2, *newline]
        ids += message
        roles += [role] * len(message)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"), roles[1:]


def test_losses_by_role_are_those_worked_out_by_hand(run, folder, tokenizer_dir):
    shown, printed, _ = analyse(run, folder, "chats.jsonl")
    losses, roles = [], []
    for chat in CHATS:
        more, theirs = losses_by_hand(folder, tokenizer_dir, chat)
        losses.append(more)
        roles += theirs
    losses = torch.cat(losses)
    for role in ("system", "user", "assistant"):
        mine = losses[[r == role for r in roles]]
        assert shown["role"][role]["tokens"] == len(mine)
        assert shown["role"][role]["mean"] == pytest.approx(mine.mean().item(), rel=LOSS)
        median = mine.double().quantile(0.5).item()
        assert shown["role"][role]["p50"] == pytest.approx(median, rel=LOSS)
    assert "user, learnt" not in shown["role"]
    learnt, read = shown["all"]["learnt"]["tokens"], shown["all"]["only read"]["tokens"]
    assert learnt + read == len(losses)
    assert sum(row["tokens"] for row in shown["position"].values()) == learnt
    assert sum(row["tokens"] for row in shown["language"].values()) == learnt
    assert len(shown["worst"]) == 2 and "chats.jsonl:2" in printed


def test_what_is_printed_fits_eighty_columns(run, folder, tmp_path):
    """Chinese characters take two; the worst samples end where the terminal does."""
    path = tmp_path / "long.jsonl"
    chat = [{"role": "user", "content": "你好" * 40}, {"role": "assistant", "content": "我在" * 40}]
    path.write_text(json.dumps({"messages": chat}, ensure_ascii=False), encoding="utf-8")
    printed = run(folder / "full_sft_32.pth", path, script="scripts/analyze_loss.py").stdout
    wide = [len(line) + len(re.findall("[\u4e00-\u9fff]", line)) for line in printed.splitlines()]
    assert wide[-1] in (79, 80) and max(wide) == 80
    for row in ("only read", "by position", "ppl", "p95"):
        assert re.search(rf"^{row}: |{row} is |{row}: ", printed, flags=re.MULTILINE), row


def test_a_picture_is_drawn_of_texts_too(run, folder):
    pytest.importorskip("matplotlib")
    shown, _, out = analyse(run, folder, "texts.jsonl", "--max_samples", 1)
    assert list(shown["language"]) == ["Chinese"]
    assert list(shown["role"]) == ["text"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_question_of_the_world_comes_after_the_models_own_answers(root, tokenizer):
    """Worked out one conversation at a time; the beginnings are shared in turn."""
    world = runpy.run_path(str(root / "scripts" / "score_world.py"))
    model = randomised(MiniMindLM(LMConfig(dim=32, n_layers=1, max_seq_len=600))).eval()
    questions = [f"What is {i}?" for i in range(world["HISTORIES"] + 1)]
    records = [{"conversations": [{"role": "user", "content": q}]} for q in questions]
    alone, later = world["answer"](model, records, tokenizer, "torch", (0, 2))

    def answer(messages):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=96, eos_token_id=tokenizer.eos_token_id
        )
        return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)

    first = history_questions(build_world(2024), 2024, 2)
    for i, earlier in (0, first[0]), (1, first[1]), (world["HISTORIES"], first[0]):
        messages = []
        for question in [*earlier[:2], questions[i]]:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer(messages)})
        assert later[i][-1]["content"] == messages[-1]["content"]
        assert alone[i][-1]["content"] == answer(records[i]["conversations"])


def test_scores_after_more_exchanges_are_columns_of_the_last_model(
    run, folder, tmp_path, sample_dir
):
    lines = (sample_dir / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    words = [f"a={folder / 'full_sft_32.pth'}", f"b={folder / 'full_sft_32.pth'}"]
    words += ["--data_path", tmp_path / "few.jsonl", "--json", tmp_path / "s.json"]
    done = run(*words, "--history", 0, 1, script="scripts/score_world.py")
    columns = ["untrained", "a", "b", "b, after 1"]
    assert list(json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))) == columns
    assert done.stdout.startswith(
        f"| skill | language | questions | chance | {' | '.join(columns)} |\n"
    )
    assert "| overall | both | 4 | " in done.stdout and "0 % (0–49)" in done.stdout


@pytest.mark.parametrize("first", ["", "  \t", "\r"])
def test_a_blank_first_line_does_not_make_texts_conversations(run, tmp_path, first):
    path = tmp_path / "texts.jsonl"
    path.write_text(first + '\n\n{"text": "Hello"}\n', encoding="utf-8", newline="")
    shown = show(run, path)
    assert f"{path}:3: " in shown and "<s>⟦Hello</s>⟧" in shown.replace("│", "")


def test_losses_without_bad_lines(run, folder, tmp_path):
    """They are those of the file without them."""
    path, weights = tmp_path / "some_bad.jsonl", folder / "full_sft_32.pth"
    text = (folder / "chats.jsonl").read_text(encoding="utf-8")
    path.write_text("bad\n" + text.replace("\n", "\n{}\n"), encoding="utf-8")
    done = run(weights, path, script="scripts/analyze_loss.py", code=2)
    assert f"{path}:3: " in done.stderr and "--skip_bad_lines" in done.stderr
    note, *figures = run(
        weights, path, "--skip_bad_lines", 0.5, script="scripts/analyze_loss.py"
    ).stdout.splitlines()
    assert note == f"{path}: 2 bad lines of the file left out"
    expected = run(weights, folder / "chats.jsonl", script="scripts/analyze_loss.py").stdout
    table = expected[: expected.index("the worst samples")].splitlines()
    assert figures[: len(table)] == table


@pytest.mark.parametrize("below", ["", "below"])
def test_an_out_dir_that_is_a_file_is_found_before_anything_else(run, tmp_path, below):
    """Before the weights, even, which are not there."""
    pytest.importorskip("matplotlib")
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    out = tmp_path / "mine" / below
    words = [tmp_path / "missing.pth", tmp_path / "missing.jsonl", "--out_dir", out]
    done = run(*words, script="scripts/analyze_loss.py", code=2)
    assert f"--out_dir {out}: " in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("script", "words", "named"),
    [
        ("analyze_loss.py", ["missing.pth", "texts.jsonl"], "missing.pth: no such file"),
        ("analyze_loss.py", ["full_sft_32.pth", "missing.jsonl"], "missing.jsonl: no such file"),
        (
            "analyze_loss.py",
            ["full_sft_32.pth", "texts.jsonl", "--max_seq_len", "8193"],
            "--max_seq_len 8193 is above the model's context of 8192",
        ),
        ("score_world.py", ["missing.pth"], "missing.pth: no such file"),
        ("score_world.py", ["a=full_sft_32.pth", "a=full_sft_32.pth"], "two models are named a"),
        ("score_world.py", ["untrained=full_sft_32.pth"], "two models are named untrained"),
        ("score_world.py", ["full_sft_32.pth", "--out", "nowhere/x.md"], "--out nowhere/x.md: "),
        ("score_world.py", ["full_sft_32.pth", "--data_path", "texts.jsonl"], "texts.jsonl:1: "),
    ],
)
def test_mistakes_are_one_line(run, folder, script, words, named):
    words = [
        re.sub(r"[a-z_0-9]+\.(pth|jsonl)$", lambda file: str(folder / file[0]), word)
        for word in words
    ]
    done = run(*words, script=f"scripts/{script}", code=2)
    assert named in done.stderr and done.stderr.count("\n") == 1


def test_colours_mark_what_is_learnt(root, tokenizer_dir):
    """On a terminal: learnt text is green, the rest grey, control tokens inverted besides."""
    script = runpy.run_path(str(root / "scripts" / "show_batch.py"), run_name="show_batch")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    ids = torch.tensor([1, *tokenizer("Hi", add_special_tokens=False)["input_ids"], 2])
    learnt = torch.tensor([False, *[True] * (len(ids) - 1)])
    painted = "".join(script["painted"](ids, learnt, tokenizer, True))
    border = "\033[36m│\033[0m"
    shown = ["\033[90m\033[7m<s>\033[0m", "\033[32mH\033[0m", "\033[32mi\033[0m"]
    assert painted == border.join([*shown, "\033[32m\033[7m</s>\033[0m"])
