"""hf://NAME: data sets of the Hugging Face hub, for which a local server stands."""

import json

import pytest
import torch
from hub_server import serve_hub
from interruptions import SHAPE, write_texts

WORDS = [*SHAPE, "--max_seq_len", 32, "--batch_size", 2, "--epochs", 1]


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
