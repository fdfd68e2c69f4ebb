"""Shape and tokenizer that weights bring along, and weights one folder below."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from interruptions import FLOAT32, SHAPE, killed, write_texts
from tiny_models import random_model, save_tuned
from transformers import AutoTokenizer

from inference import WeightSpec, describe_weights, load_trained
from inference.pool import ModelPool
from model import keep_tokenizer, list_weights, load_tokenizer, save_weights, tokenizer_hash
from model.tokenizer import find_tokenizer, kept_tokenizer
from training import Run

WORDS = ["--max_seq_len", 64, "--max_steps", 1, "--device", "cpu"]
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "train.jsonl", 8)


@pytest.fixture(scope="module")
def own_tokenizer(tokenizer_dir, tmp_path_factory):
    """A folder of the shipped tokenizer with two of its entries exchanged: other ids."""
    folder = shutil.copytree(tokenizer_dir, tmp_path_factory.mktemp("own") / "tokenizer")
    path = folder / "tokenizer.json"
    parts = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = parts["model"]["vocab"]
    first, second = [token for token, id_ in vocabulary.items() if id_ in (100, 101)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8")
    return folder


def config(out, name="pretrain_48"):
    return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))["config"]


def save_start(out, tokenizer, name="pretrain_48", **shape):
    shape = {"dim": 48, "n_layers": 1, "n_heads": 4, "n_kv_heads": 1, "rope_theta": 1e4, **shape}
    return save_tuned(random_model(**shape), out, tokenizer, name, "pretrain")


@pytest.mark.parametrize("by_path", [False, True])
def test_the_weights_to_start_from_give_the_shape(run, texts, tokenizer, tmp_path, by_path):
    start = save_start(tmp_path, tokenizer, hidden_dim=80)
    words = ["--from_weight", start if by_path else "pretrain", "--data_path", texts, *WORDS]
    done = run(*words, "--out_dir", tmp_path, "--run_name", "next")
    there = config(tmp_path, "pretrain_48_next")
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "rope_theta")
    assert [there[name] for name in names] == [48, 1, 4, 1, 80, 1e4]
    assert f"--from_weight: {start}\n" in done.stdout


@pytest.mark.parametrize("flag", [["--dim", 32], ["--n_kv_heads", 2], ["--size", "2m"]])
def test_a_flag_of_another_shape_is_an_error(run, texts, tokenizer, tmp_path, flag):
    start = save_start(tmp_path, tokenizer)
    words = ["--from_weight", start, "--data_path", texts, "--out_dir", tmp_path, *WORDS]
    error = run(*words, *flag, code=2).stderr
    assert f"{start} has " in error and "gives the shape" in error and error.count("\n") == 1
    run(*words, "--n_layers", 1, "--dry_run")


def test_weights_that_are_not_there_are_told_with_those_that_are(run, texts, tokenizer, tmp_path):
    words = ["--data_path", texts, "--out_dir", tmp_path, *WORDS, "--from_weight"]
    error = run(*words, "full_sft", code=2).stderr
    assert f"no file {tmp_path / 'full_sft_512.pth'}; {tmp_path} holds no weights" in error
    save_start(tmp_path, tokenizer)
    error = run(*words, "full_sft", code=2).stderr
    assert f"no file {tmp_path / 'full_sft_512.pth'}; {tmp_path} has pretrain_48.pth" in error


def test_a_run_keeps_its_tokenizer_and_what_follows_finds_it(
    run, texts, own_tokenizer, tokenizer_dir, tmp_path
):
    words = [*SHAPE, "--data_path", texts, "--out_dir", tmp_path, *WORDS]
    run(*words, "--tokenizer_path", own_tokenizer)
    wanted = tokenizer_hash(load_tokenizer(own_tokenizer))
    folder = kept_tokenizer(tmp_path, wanted)
    assert [path.name for path in folder.parent.iterdir()] == [wanted]
    assert (
        tokenizer_hash(load_tokenizer(folder))
        == wanted
        != tokenizer_hash(load_tokenizer(tokenizer_dir))
    )
    run(*words[4:], "--from_weight", "pretrain", "--run_name", "next")
    about = json.loads((tmp_path / "pretrain_32_next.json").read_text(encoding="utf-8"))
    assert about["tokenizer"] == wanted
    run("--out_dir", tmp_path, "--prompt", "red", "--max_new_tokens", 2, script="eval_model.py")


def test_where_a_tokenizer_is_found(own_tokenizer, tokenizer_dir, tmp_path):
    own = load_tokenizer(own_tokenizer)
    hash_ = tokenizer_hash(own)
    lora = tmp_path / "out" / "lora"
    lora.mkdir(parents=True)
    assert find_tokenizer(lora, hash_) is None
    assert find_tokenizer(lora, tokenizer_hash(load_tokenizer(tokenizer_dir))) == tokenizer_dir
    beside = shutil.copytree(own_tokenizer, tmp_path / "out" / "tokenizer")
    assert find_tokenizer(lora, hash_) == beside
    keep_tokenizer(own, tmp_path / "out", hash_)
    assert find_tokenizer(lora, hash_) == kept_tokenizer(tmp_path / "out", hash_)
    assert find_tokenizer(tmp_path / "out" / "replaced" / "x", hash_) is not None


def test_a_tokenizer_is_found_by_its_file_alone(own_tokenizer, tokenizer, tmp_path, monkeypatch):
    """Hashed as ever: what tokenizer.json holds, without what is not used, with sorted names."""
    own = load_tokenizer(own_tokenizer)
    hashes = [tokenizer_hash(own), tokenizer_hash(tokenizer)]
    parts = json.loads((own_tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    for name in ("padding", "truncation", "post_processor"):
        del parts[name]
    text = json.dumps(parts, sort_keys=True)
    assert hashlib.sha256(text.encode("utf-8")).hexdigest() == hashes[0]
    keep_tokenizer(own, tmp_path, hashes[0])
    monkeypatch.setattr("model.tokenizer.load_tokenizer", None)  # slow
    assert find_tokenizer(tmp_path, hashes[0]) == kept_tokenizer(tmp_path, hashes[0])
    assert find_tokenizer(tmp_path, hashes[1]) is not None  # the shipped one


def test_a_tokenizer_that_older_versions_wrote_is_found(own_tokenizer, tmp_path):
    """They wrote a merge as one text."""
    folder = shutil.copytree(own_tokenizer, tmp_path / "tokenizer")
    path = folder / "tokenizer.json"
    parts = json.loads(path.read_text(encoding="utf-8"))
    parts["model"]["merges"] = [" ".join(pair) for pair in parts["model"]["merges"]]
    path.write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8")
    assert find_tokenizer(tmp_path, tokenizer_hash(load_tokenizer(own_tokenizer))) == folder


def save_at(path, tokenizer, when, stage="full_sft"):
    path.parent.mkdir(parents=True, exist_ok=True)
    model = random_model(seed=when)
    save_weights(path, model, model.config, stage, tokenizer_hash(tokenizer))
    os.utime(path, (when, when))


@pytest.fixture
def nested(tokenizer, own_tokenizer, tmp_path):
    """Weights in a folder and one below, the newest there; two below they do not count."""
    save_at(tmp_path / "full_sft_32.pth", tokenizer, 1_000_000_000)
    save_at(tmp_path / "a" / "full_sft_32.pth", AutoTokenizer.from_pretrained(own_tokenizer), 2e9)
    save_at(tmp_path / "a" / "pretrain_32.pth", tokenizer, 1_500_000_000, "pretrain")
    save_at(tmp_path / "a" / "b" / "full_sft_32.pth", tokenizer, 3e9)
    shutil.copytree(own_tokenizer, tmp_path / "a" / "tokenizer")
    return tmp_path


def test_the_newest_weights_one_folder_below_are_taken(nested):
    assert load_trained(WeightSpec(nested)).path == nested / "a" / "full_sft_32.pth"
    assert load_trained(WeightSpec(nested, weight="pretrain")).path.parent == nested / "a"
    title, *lines = describe_weights(nested)
    assert "newest first" in title
    found = [line.split() for line in lines]
    assert [words[0] for words in found] == [
        str(nested / name) for name in ("a/full_sft_32.pth", "a/pretrain_32.pth", "full_sft_32.pth")
    ]
    size = sum(p.numel() for p in random_model().parameters())
    assert found[0][1:4] == [f"{size / 1e3:.2f}", "k", "full_sft"]
    assert found[2][4].startswith("2001-09-0")


def test_the_server_offers_them_by_folder_and_name(nested):
    pool = ModelPool(WeightSpec(nested), CPU, "torch", 1, 1, 2)
    try:
        cards = pool.cards()
        assert list(cards) == ["a/full_sft_32", "full_sft_32", "a/pretrain_32"]
        assert [card.chats for card in cards.values()] == [True, True, False]
        models = [pool.get(name).chat_model for name in cards]
        hashes = [tokenizer_hash(model.tokenizer) for model in models]
        assert hashes[0] != hashes[1] == hashes[2]
    finally:
        pool.close()
    assert describe_weights(nested / "a" / "b") == []


def test_the_server_looks_for_each_tokenizer_where_the_weights_are(
    own_tokenizer, tokenizer, tmp_path, monkeypatch
):
    """In another folder it does not count; what was not found is looked for again once it comes."""
    own = load_tokenizer(own_tokenizer)
    for folder in ("a", "b"):
        save_at(tmp_path / folder / "full_sft_32.pth", own, 1_000_000_000)
    save_at(tmp_path / "a" / "dpo_32.pth", tokenizer, 1_000_000_000)
    shutil.copytree(own_tokenizer, tmp_path / "a" / "tokenizer")
    looked = []
    monkeypatch.setattr(
        "inference.pool.find_tokenizer", lambda *key: looked.append(key) or find_tokenizer(*key)
    )
    pool = ModelPool(WeightSpec(tmp_path), CPU, "torch", 1, 1, 2)
    try:
        for _ in range(2):
            assert set(pool.cards()) == {"a/full_sft_32", "a/dpo_32"}
            assert len(looked) == 3
        shutil.copytree(own_tokenizer, tmp_path / "b" / "tokenizer")
        assert set(pool.cards()) == {"a/full_sft_32", "a/dpo_32", "b/full_sft_32"}
        assert len(looked) == 4
    finally:
        pool.close()


def test_a_resumed_run_keeps_its_own_configuration(run, texts, tokenizer, tmp_path):
    """Though the weights that it started from are gone: what the flags do not tell, as well."""
    start = save_start(tmp_path, tokenizer, hidden_dim=80)
    shape = ["--dim", 48, "--n_layers", 1, "--n_heads", 4, "--n_kv_heads", 1]
    words = ["--from_weight", start, "--data_path", texts, *WORDS, "--run_name", "next", *shape]
    run(*words, "--out_dir", tmp_path)
    for path in (start, start.with_suffix(".json")):
        path.unlink()
    words[words.index("--max_steps") + 1] = 2
    run(*words, "--out_dir", tmp_path, "--resume")
    there = config(tmp_path, "pretrain_48_next")
    assert (there["hidden_dim"], there["rope_theta"]) == (80, 1e4)


def test_two_runs_that_keep_a_tokenizer_at_once(tokenizer, tmp_path, monkeypatch):
    """The other one is faster, after the look whether it is there."""
    kept, save = kept_tokenizer(tmp_path, "abc"), type(tokenizer).save_pretrained

    def save_twice(self, folder):
        save(self, kept)
        return save(self, folder)

    monkeypatch.setattr(type(tokenizer), "save_pretrained", save_twice)
    keep_tokenizer(tokenizer, tmp_path, "abc")
    assert [path.name for path in kept.parent.iterdir()] == ["abc"]
    assert (kept / "tokenizer.json").is_file()


def test_a_folder_that_is_in_the_way_of_a_tokenizer(tokenizer, tmp_path):
    kept = kept_tokenizer(tmp_path, "abc")
    (kept / "notes").mkdir(parents=True)
    with pytest.raises(OSError):
        keep_tokenizer(tokenizer, tmp_path, "abc")


def start_and_kill(run, texts, out, *words):
    """A run that was broken off, whose shape only the weights that it began with told."""
    words = ["--data_path", texts, *WORDS, "--out_dir", out, "--run_name", "next", *words]
    words[words.index("--max_steps") + 1] = 4
    with killed(3, Run, "add_step"):
        run(*words, "--save_interval", 1)
    return words


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_a_run_is_resumed_in_its_own_shape(run, texts, tokenizer, tmp_path, what):
    """Without flags of the shape, whatever has become of the weights that it started from."""
    start = save_start(tmp_path, tokenizer, hidden_dim=80)
    words = start_and_kill(run, texts, tmp_path, "--from_weight", "pretrain")
    for path in (start, start.with_suffix(".json")):
        path.unlink()
    if what == "changed":
        save_start(tmp_path, tokenizer, "pretrain_64", dim=64)
    done = run(*words, "--resume")
    assert "--resume: going on after step 2" in done.stdout
    there = config(tmp_path, "pretrain_48_next")
    assert (there["dim"], there["n_layers"], there["hidden_dim"]) == (48, 1, 80)


def test_of_several_runs_the_one_that_the_command_began_is_resumed(run, texts, tokenizer, tmp_path):
    start = save_start(tmp_path, tokenizer)
    words = start_and_kill(run, texts, tmp_path, "--from_weight", start)
    start_and_kill(run, texts, tmp_path, "--from_weight", "none", *SHAPE)
    done = run(*words, "--resume")
    assert f"saved {tmp_path / 'pretrain_48_next.pth'}" in done.stdout
    assert "--resume: going on after step 2" in done.stdout


def test_weights_are_looked_for_once(run, texts, tokenizer, tmp_path, monkeypatch):
    save_start(tmp_path, tokenizer)
    looks = []
    monkeypatch.setattr(
        "model.weights.list_weights",
        lambda *where, **how: looks.append(where) or list_weights(*where, **how),
    )
    words = ["--from_weight", "pretrain", "--run_name", "next", "--data_path", texts, *WORDS]
    run(*words, "--out_dir", tmp_path)
    assert len(looks) == 1


ELSEWHERE = """
import os, runpy, sys
if os.environ["RANK"] == "1":
    sys.argv[sys.argv.index("--out_dir") + 1] += "/of_the_other_host"
sys.argv[0] = "train_pretrain.py"
runpy.run_path("train_pretrain.py", run_name="__main__")
"""


def test_only_the_main_process_needs_the_weights(run, texts, tokenizer, tmp_path):
    """Those of a second host, which has another folder, get shape and weights from it."""
    start = save_start(tmp_path, tokenizer, hidden_dim=80)
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE, encoding="utf-8")
    words = ["--from_weight", "pretrain", "--run_name", "next", "--data_path", texts, *WORDS]
    done = run(*words, *FLOAT32, "--out_dir", tmp_path, script=script, processes=2)
    assert f"--from_weight: {start}\n" in done.stdout
    there = config(tmp_path, "pretrain_48_next")
    assert (there["dim"], there["hidden_dim"]) == (48, 80)
