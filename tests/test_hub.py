"""hf://NAME: data sets of the Hugging Face hub, for which a local server stands."""

import json
import re

import pytest
import torch
from hub_server import serve_hub
from interruptions import SHAPE, write_texts

WORDS = [*SHAPE, "--max_seq_len", 32, "--batch_size", 2, "--epochs", 1]


TEXT = {"text": "One text."}
ASKED, ANSWERED = ({"role": r, "content": r} for r in ("user", "assistant"))
PAIR = {"prompt": "user", "prompt_id": "0", "messages": [ASKED, ANSWERED]}
PAIR |= {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, {**ANSWERED, "content": "no"}]}
# The data sets of docs/data.md as they are published: the file, its split and configuration, a row.
PUBLISHED = {
    "HuggingFaceFW/fineweb-edu": (
        *("sample/10BT/000_00000.parquet", "train", "sample-10BT"),
        {**TEXT, "id": "0", "url": "u", "language": "en", "token_count": 3, "score": 3.1},
    ),
    "Skywork/SkyPile-150B": ("data/2020-40_zh_head_0000.jsonl", "train", "default", TEXT),
    "roneneldan/TinyStories": ("data/train-00000-of-00001.parquet", "train", "default", TEXT),
    "HuggingFaceTB/smoltalk": (
        *("data/all/train-00000-of-00001.parquet", "train", "all"),
        {"messages": [ASKED, ANSWERED], "source": "x"},
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        *("data/train_prefs-00000-of-00001.parquet", "train_prefs", "default"),
        {**PAIR, "score_chosen": 8.0, "score_rejected": 5.5},
    ),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Two data sets, one of JSON Lines and one of Parquet as the hub's own; their folder."""
    pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    folder = tmp_path / "hub"
    for name in ("me/tales", "me/rows/data"):
        (folder / name).mkdir(parents=True)
    for n, name in enumerate(("train", "test"), 1):
        write_texts(folder / "me" / "tales" / f"{name}.jsonl", 9 * n)
    lines = (folder / "me" / "tales" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    table = pyarrow.table({"text": [json.loads(line)["text"] for line in lines]})
    parquet.write_table(table, folder / "me" / "rows" / "data" / "train-00000-of-00001.parquet")
    with serve_hub(folder) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        yield folder


def test_what_is_served_is_trained_on_as_the_file_itself(run, hub, tmp_path):
    """The library reads the server's address when it is imported, so it has a new process."""
    named = ["hf://me/rows:train[:7]", "hf://me/tales:test"]
    first = (hub / "me" / "tales" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:7]
    (tmp_path / "first.jsonl").write_text("\n".join(first), encoding="utf-8")
    files = [tmp_path / "first.jsonl", hub / "me" / "tales" / "test.jsonl"]
    for out, sources in (("served", named), ("local", files)):
        paths = ["--data_path", *sources, "--cache_dir", tmp_path, "--out_dir", tmp_path / out]
        run(*WORDS, *paths, fresh=out == "served")
    served, local = (
        torch.load(tmp_path / out / "pretrain_32.pth", weights_only=True)
        for out in ("served", "local")
    )
    assert served.keys() == local.keys()
    for name, weight in served.items():
        assert torch.equal(weight, local[name]), name


def test_what_is_not_there_is_one_line_each(run, hub, tmp_path):
    sources = {
        "hf://me/nothing": "doesn't exist",
        "hf://me/tales:none": "Bad split: none",
        "hf://me/rows/odd": "'odd' not found",
    }
    words = [*sources, "--cache_dir", tmp_path]
    done = run(*words, script="scripts/check_data.py", fresh=True, code=2)
    errors = [line for line in done.stderr.splitlines() if "hf://" in line]
    for (source, reason), error in zip(sources.items(), errors, strict=True):
        assert f"{source}: " in error and reason in error


def test_the_commands_of_the_documentation(run, root, hub, tmp_path):
    """Their sources, served in the published schema, are for the stage that the command names."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    for name, (path, split, config, row) in PUBLISHED.items():
        file = hub / name / path
        file.parent.mkdir(parents=True)
        if file.suffix == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist([row] * 3), file)
        else:
            file.write_text(f"{json.dumps(row)}\n" * 3, encoding="utf-8")
        configs = f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {path}"
        card = f"---\nconfigs:\n{configs}\n---\n"
        (hub / name / "README.md").write_text(card, encoding="utf-8")
    text = (root / "docs" / "data.md").read_text(encoding="utf-8")
    commands = re.findall(r'`python (\S+) --data_path "?(hf://[^ "`]+)', text)
    assert len(commands) == len(PUBLISHED)
    words = [*(source for _, source in commands), "--cache_dir", tmp_path, "--min_margin", 1]
    done = run(*words, script="scripts/check_data.py", fresh=True)
    for (stage, source), shown in zip(commands, done.stdout.split("══ ")[1:], strict=True):
        assert shown.startswith(f"{source}\n"), shown
        assert "\n3 records: " in shown and f"\nfor {stage}" in shown
