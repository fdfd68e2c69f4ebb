"""Scores by lm-evaluation-harness: ours beside its own `hf` model on the same weights."""

import json
import socket
import sys

import numpy as np
import pytest
import torch
from evaluate import TASKS
from tiny_models import random_model, save_tuned

from dataset import ChatEncoder, render_chat
from export.transformers_format import write_transformers
from inference import ChatModel

FACT = "Kaelo lives in Oldharbor."
TEXTS = ["Hello", "你好，世界。\n", FACT, f"{FACT}\n\n {FACT} Ünïcödé 🦙  ", "a", "1234567 + 89 ="]
SHAPE = {"n_layers": 2, "vocab_size": 6400, "max_seq_len": 96}


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def pair(request, tokenizer, tmp_path_factory):
    """A model as we score it, and a folder that transformers loads with the same weights."""
    from inference.harness import HarnessModel

    model = random_model(**SHAPE, use_moe=request.param).eval()
    folder = tmp_path_factory.mktemp("export")
    write_transformers(folder, model.config, model.state_dict(), tokenizer, "")
    return HarnessModel(ChatModel("tiny", model, tokenizer, True, rows=8)), folder


@pytest.fixture
def hf(pair):
    """lm_eval's own model on the folder."""
    from lm_eval.models.huggingface import HFLM

    def load(**options):
        return HFLM(
            str(pair[1]), dtype="float32", device="cpu", batch_size=3, max_length=96, **options
        )

    return load


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, arguments_, i) for i, arguments_ in enumerate(arguments)]


def chat_prompts(model):
    """Prompts of conversations, through the template."""
    return [model.apply_chat_template([{"role": "user", "content": text}]) for text in TEXTS] + [
        model.apply_chat_template([{"role": "assistant", "content": FACT}], False)
    ]


def assert_same_scores(ours, theirs):
    assert len(ours) == len(theirs)
    for (score, greedy), (reference, reference_greedy) in zip(ours, theirs, strict=True):
        assert score == pytest.approx(reference, abs=1e-3)
        assert greedy == reference_greedy


def test_continuations_are_scored_as_by_lm_eval(pair, hf):
    """Contexts with several continuations and with one, empty, longer than the model's, chats."""
    ours, _ = pair
    contexts = [*TEXTS, "", f"{FACT} " * 20, *chat_prompts(ours)]
    pairs = [(context, f" {text}") for context in contexts for text in TEXTS]
    pairs += [("once", " upon a time"), ("山", "水"), ("", FACT)]
    asked = requests("loglikelihood", *pairs)
    assert_same_scores(ours.loglikelihood(asked), hf(add_bos_token=True).loglikelihood(asked))


def test_a_greedy_continuation_is_recognised(pair):
    ours, _ = pair
    ids = ours.tok_encode(FACT)
    with torch.no_grad():
        token = int(ours.model(torch.tensor([ids])).logits[0, -1].argmax())
    scored = ours._loglikelihood_tokens([(None, ids, [token]), (None, ids, [token, 5])])
    assert scored[0][1] and not scored[1][1]


def test_whole_texts_are_scored_as_by_lm_eval(pair, hf):
    """Its `hf` model adds a second <s> here with add_bos_token, so that is left out."""
    ours, _ = pair
    asked = requests("loglikelihood_rolling", *((text,) for text in [*TEXTS, f"{FACT} " * 40]))
    assert ours.loglikelihood_rolling(asked) == pytest.approx(
        hf().loglikelihood_rolling(asked), abs=1e-3
    )


def test_texts_are_generated_as_by_lm_eval(pair, hf):
    ours, _ = pair
    plain = {"max_gen_toks": 20, "do_sample": False}
    full = ours.generate_until(requests("generate_until", *((text, plain) for text in TEXTS)))
    assert all(full)
    # Stop strings that occur, within tokens and across them.
    until = [text[len(text) // 2 :][:3] for text in full]
    stopping = {**plain, "until": [*until, "never to be seen"]}
    contexts = [*TEXTS, f"{FACT} " * 20, *chat_prompts(ours)]
    # lm_eval decides by a batch's first text whether to add <s>: texts and chats apart.
    for group in (contexts[: len(TEXTS) + 1], contexts[len(TEXTS) + 1 :]):
        asked = requests("generate_until", *((c, o) for c in group for o in (plain, stopping)))
        theirs = hf(add_bos_token=True).generate_until(asked)
        assert ours.generate_until(asked) == theirs
        assert len(set(theirs)) > len(group)


def test_a_context_is_computed_once(pair):
    ours, _ = pair
    tokens = 0

    def count(module, args, kwargs):
        nonlocal tokens
        tokens += args[0].numel()

    hook = ours.model.register_forward_pre_hook(count, with_kwargs=True)
    context = ours.tok_encode(f"{FACT} " * 3)
    ours._loglikelihood_tokens([(None, context, [i, i]) for i in range(10, 18)])
    hook.remove()
    assert tokens == len(context) - 1 + 8 * 2


def test_control_tokens_in_a_plain_text_are_ordinary(pair, tokenizer):
    ours, _ = pair
    assert ours.tok_encode("a</s>")[1:] == ours.tok_encode("a</s>", add_special_tokens=False)
    assert tokenizer.eos_token_id not in ours.tok_encode("a</s>")
    assert ours.tok_encode("<s>user\na</s>") == tokenizer.encode("<s>user\na</s>")


def test_settings_that_we_lack_are_refused(pair):
    from common import UserError

    ours, _ = pair
    with pytest.raises(UserError, match="num_beams"):
        ours.generate_until(requests("generate_until", ("a", {"num_beams": 4})))


# The script


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("out")
    save_tuned(random_model(vocab_size=6400), folder, tokenizer)
    return folder


@pytest.fixture
def evaluate(run, out_dir):
    """Start it on a tiny model."""
    return lambda *words, **how: run(
        "--out_dir", out_dir, "--device", "cpu", *words, script="scripts/evaluate.py", **how
    )


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def scores(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    return {(entry["task"], entry["metric"]): entry for entry in found["scores"]}


def test_the_shipped_tasks_run_without_a_network(evaluate, no_network, tmp_path):
    done = evaluate("--limit", 12, "--num_fewshot", 1, "--out", tmp_path / "new" / "s")
    found = scores(tmp_path / "new" / "s.json")
    assert list(found) == [
        ("sample_world_answers", "acc"),
        ("sample_world_choice", "acc"),
        ("sample_world_choice", "acc_norm"),
    ]
    for (task, _), entry in found.items():
        assert entry["questions"] == 12 and entry["num_fewshot"] == 1
        assert 0 <= entry["score"] <= 1 and entry["standard_error"] >= 0
        chance = 0.25 if task == "sample_world_choice" else 1 / 20
        assert entry["chance"] == pytest.approx(chance)
    table = (tmp_path / "new" / "s.md").read_text(encoding="utf-8")
    assert table == done.stdout
    assert "| sample_world_choice | 1 | 12 | acc_norm | 0." in table


def test_a_chat_prompt_is_that_of_score_world(pair, tokenizer):
    ours, _ = pair
    world = [{"conversations": [{"role": "user", "content": text}]} for text in TEXTS]
    prompts = [ours.apply_chat_template(record["conversations"]) for record in world]
    chats = [render_chat(r["conversations"], add_generation_prompt=True) for r in world]
    encoded = ChatEncoder(tokenizer).encode(chats)
    expected = [part.tolist() for part in np.split(encoded.ids, encoded.lengths.cumsum()[:-1])]
    assert [ours.tok_encode(prompt) for prompt in prompts] == expected


def test_the_shipped_questions_have_one_right_answer():
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=TASKS, include_defaults=False).load(["sample_world"])["tasks"]
    answers, choice = tasks["sample_world_answers"], tasks["sample_world_choice"]
    assert len(answers.test_docs()) > 2800 and len(choice.test_docs()) == 600
    asked = {doc["conversations"][0]["content"] for doc in answers.test_docs()}
    for doc in [*answers.test_docs(), *answers.fewshot_docs()]:
        assert answers.process_results(doc, [doc["conversations"][1]["content"]]) == {"acc": 1.0}
        assert answers.process_results(doc, ["Mira, Ivo. 0."]) == {"acc": 0.0}
    for doc in choice.test_docs():
        assert doc["question"] in asked
        assert len(set(doc["choices"])) == 4
    assert {doc["right"] for doc in choice.test_docs()} == {0, 1, 2, 3}
    for task in tasks.values():
        assert len(task.fewshot_docs()) > 20


def test_lm_eval_runs_the_tasks_on_an_exported_folder(pair, no_network, tmp_path):
    """As `lm_eval --model hf` in a terminal; our scores of the same weights are the same."""
    import lm_eval
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import TaskManager

    ours, folder = pair
    if ours.model.config.use_moe:
        pytest.skip("the dense model will do: the command takes seconds to start")
    command = [
        *("lm_eval", "--model", "hf", "--device", "cpu", "--limit", "8", "--batch_size", "4"),
        *("--model_args", f"pretrained={folder},dtype=float32,add_bos_token=True"),
        *("--include_path", str(TASKS), "--tasks", "sample_world", "--apply_chat_template"),
        *("--num_fewshot", "1", "--output_path", str(tmp_path)),
    ]
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(sys, "argv", command)
        cli_evaluate()
    (path,) = tmp_path.glob("**/results_*.json")
    theirs = json.loads(path.read_text(encoding="utf-8"))["results"]
    manager = TaskManager(include_path=TASKS, include_defaults=False)
    options = {"num_fewshot": 1, "limit": 8, "apply_chat_template": True}
    here = lm_eval.simple_evaluate(ours, tasks=["sample_world"], task_manager=manager, **options)
    assert len(theirs) == 2
    for task, values in theirs.items():
        for key, value in values.items():
            if key.startswith("acc"):
                assert here["results"][task][key] == value


OWN = """
task: own_{name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
doc_to_text: ask
"""
MANY = """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_mutual_info}]
"""
WHOLE = """
output_type: loglikelihood_rolling
doc_to_target: ask
metric_list: [{metric: bits_per_byte}]
"""
GROUP = """
group: own
task: [own_many]
aggregate_metric_list: [{metric: acc}]
"""


def test_task_files_of_one_s_own(evaluate, no_network, tmp_path, monkeypatch):
    """A folder of them and a single one, on local data, with groups and different metrics."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    records = [
        {"ask": text, "choices": TEXTS[: 2 + i % 2], "right": 0} for i, text in enumerate(TEXTS)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rest in (("many", MANY), ("whole", WHOLE)):
        text = OWN.format(name=name, data=data) + rest
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    (folder / "group.yaml").write_text(GROUP, encoding="utf-8")

    evaluate("--tasks", folder, "--out", tmp_path / "s")
    found = scores(tmp_path / "s.json")
    assert list(found) == [
        ("own_many", "acc"),
        ("own_many", "acc_mutual_info"),
        ("own_whole", "bits_per_byte"),
    ]
    assert found["own_many", "acc"]["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found["own_whole", "bits_per_byte"]["chance"] is None

    again = ["--tasks", folder / "whole.yaml", "own_many", "--limit", 2, "--out"]
    assert "s.json exists" in evaluate(*again, tmp_path / "s", code=2).stderr
    evaluate(*again, tmp_path / "t")
    assert {task for task, _ in scores(tmp_path / "t.json")} == {"own_whole", "own_many"}
    evaluate("--tasks", folder / "group.yaml", "--out", tmp_path / "u")
    whole = scores(tmp_path / "u.json")["own", "acc"]
    assert whole["score"] == found["own_many", "acc"]["score"]
    assert whole["chance"] == found["own_many", "acc"]["chance"] and whole["questions"] == 6
    data.unlink()
    done = evaluate("--tasks", folder / "whole.yaml", code=2)
    assert done.stderr.count("\n") == 1 and "data.jsonl" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "sample_world_choise"], "no file or folder of tasks; sample_world_choice?"),
        (["--weight", "nothing"], "--weight nothing"),
        (["--limit", "0"], "--limit: must be at least 1"),
    ],
)
def test_mistakes_are_one_line(evaluate, words, message):
    done = evaluate(*words, code=2)
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_without_lm_eval_there_is_one_line(evaluate, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = evaluate(code=2)
    assert "needs lm_eval: pip install -r scripts/requirements-eval.txt" in done.stderr
    assert done.stderr.count("\n") == 1
