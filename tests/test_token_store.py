import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_records import BAD_LINES
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common import UserError
from dataset import fields, reader, token_store
from dataset.records import RecordOptions, parse_text
from dataset.text import PIECE_CHARS, TextEncoder, TextTokenizer
from dataset.token_store import Encoded, TokenStore


class ByteEncoder:
    """One id for each byte of a text, weighted by its place in the text, which is one message.

    It counts spaces.
    """

    key = "bytes"
    dtype = np.dtype("<u4")
    is_chat = True
    counted = ("bytes", "spaces")
    options = RecordOptions()
    prepare = staticmethod(TextTokenizer.prepare)

    def parse(self, line):
        text = parse_text(line).encode("utf-8")
        return text, (len(text), text.count(b" "))

    def encode(self, records):
        ids = np.frombuffer(b"".join(records), np.uint8).astype(np.uint32) + 100_000
        weights = np.concatenate([np.linspace(0, 1, len(r)) for r in records] or [np.empty(0)])
        encoded = Encoded(ids, np.array([len(r) for r in records], np.int64), weights)
        roles = np.full(len(records), 2, np.uint8)
        return encoded._replace(messages=encoded.offsets[:-1], roles=roles)


class NoBuild(ByteEncoder):
    """The same store, but to build it is an error."""

    def parse(self, line):
        raise AssertionError("the store is built again")


@pytest.fixture
def data(tmp_path) -> Path:
    """Thirty lines: text, escapes and Chinese."""
    path = tmp_path / "data.jsonl"
    write_lines(path, [f"text {n} 中文\n" * (n % 5 + 1) for n in range(30)])
    return path


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")


def stores(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(".tokens"))


def leftovers(folder):
    return [p for p in folder.rglob("*") if p.name.endswith(".tmp")]


def snapshot(folder):
    """Everything by which a write would show."""
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


# ---- content


@pytest.mark.parametrize("batch_bytes", [1, 100, 1 << 20])
def test_store_holds_every_document_with_its_line(tmp_path, batch_bytes, monkeypatch):
    monkeypatch.setattr(token_store, "BATCH_BYTES", batch_bytes)
    lines = [b'{"text": "o e"}', b"{]", '{"text": "二"}'.encode(), b"", b'{"text": "3\\n"}']
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(lines))
    store = TokenStore.open_or_build(path, ByteEncoder(), skip_bad_lines=True)
    ids = np.frombuffer(b"o e" + "二".encode() + b"3\n", np.uint8).astype(int) + 100_000
    assert store.ids.dtype == np.uint32
    assert store.ids.tolist() == ids.tolist()
    assert store.offsets.tolist() == [0, 3, 6, 8]
    assert store.lines.tolist() == [1, 3, 5]
    np.testing.assert_allclose(store.arrays["weights"], [0, 0.5, 1, 0, 0.5, 1, 0, 1])
    assert store.arrays["bytes"].sum() == 8
    assert store.arrays["spaces"].tolist() == [1, 0, 0]
    assert store.arrays["messages"].tolist() == [0, 3, 6]
    last = store.read(1, 3)
    assert last.ids.tolist() == ids.tolist()[3:] and last.lengths.tolist() == [3, 2]
    assert last.messages.tolist() == [0, 3] and last.roles.tolist() == [2, 2]
    assert (store.bad_lines.count, store.bad_lines.total) == (1, 4)  # a blank line is none


def test_an_array_is_the_same_as_its_lines(tmp_path, data):
    """But for where the documents begin."""
    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    path = tmp_path / "array.json"
    path.write_text(json.dumps(records, indent=2), encoding="utf-8")
    array, lines = (TokenStore.open_or_build(p, ByteEncoder()) for p in (path, data))
    assert array.content == lines.content
    assert array.lines.tolist() == [2 + 3 * n for n in range(30)]


def test_store_pickles_as_a_path(data):
    store = TokenStore.open_or_build(data, ByteEncoder())
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).ids.tolist() == store.ids.tolist()


def test_lines_longer_than_the_read_buffer(tmp_path):
    path = tmp_path / "data.jsonl"
    texts = ["x" * (3 << 20), "short", "y" * (2 << 20)]
    write_lines(path, texts)
    store = TokenStore.open_or_build(path, ByteEncoder())
    assert np.diff(store.offsets).tolist() == [len(t) for t in texts]
    assert store.lines.tolist() == [1, 2, 3]


def test_a_line_without_end_is_left_out(tmp_path, monkeypatch):
    for module in (reader, fields):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 100)
    path = tmp_path / "data.jsonl"
    write_lines(path, ["a", "b" * 88, "c" * 87, "d" * 1000, "e"])  # and 13 bytes around each
    store = TokenStore.open_or_build(path, ByteEncoder(), skip_bad_lines=True)
    assert store.lines.tolist() == [1, 3, 5]
    assert [line for _, line, _ in store.bad_lines.first] == [2, 4]
    assert "longer than 100 bytes" in store.bad_lines.first[0][2]


# ---- tokens


def test_ids_are_those_of_the_tokenizer(tmp_path, tokenizer_dir):
    texts = [
        "Hello, world.\n\n\tA tab",
        "你好，世界。\n",
        "a</s>b<s>\n<pad>",
        "12 345",
        "🙂 e\u0301",
    ]
    path = tmp_path / "data.jsonl"
    write_lines(path, texts)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    store = TokenStore.open_or_build(path, TextEncoder(tokenizer))
    reference = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    reference.encode_special_tokens = True
    for document, text in enumerate(texts):
        ids = store.ids[store.offsets[document] : store.offsets[document + 1]].tolist()
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert ids[1:-1] == reference.encode(text, add_special_tokens=False).ids
        assert not set(ids[1:-1]) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(ids[1:-1], clean_up_tokenization_spaces=False) == text
    assert store.ids.dtype == np.uint16
    assert store.arrays["bytes"].tolist() == [len(text.encode("utf-8")) for text in texts]


def test_long_texts_are_cut_without_changing_a_token(tokenizer_dir):
    line = "第一行 and some words, 123 of them; "
    texts = ["".join(f"{line * (n % 7)}\n" for n in range(4000)), "short", "no newline " * 20_000]
    assert min(len(texts[0]), len(texts[2])) > 2 * PIECE_CHARS
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    encoded = TextTokenizer(tokenizer).encode_batch(texts)
    for ids, text in zip(encoded[:2], texts[:2], strict=True):
        expected = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert ids.tolist() == expected
    assert tokenizer.decode(encoded[2], clean_up_tokenization_spaces=False) == texts[2]


def test_a_large_vocabulary_takes_four_bytes():
    vocab = {f"word{n}": n for n in range(65_536)}
    for extra, size in [({}, 2), ({"rare": 65_536}, 4)]:
        backend = Tokenizer(models.WordLevel(vocab | extra, unk_token="word0"))
        tokenizer = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
        assert tokenizer.dtype.itemsize == size
    assert tokenizer.encode_batch(["rare"])[0].tolist() == [65_536]


def test_settings_of_the_tokenizer_do_not_reach_the_store(tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    plain = TextTokenizer(tokenizer)
    tokenizer(["one two three four five six", "seven"], truncation=True, max_length=3, padding=True)
    used = TextTokenizer(tokenizer)
    assert used.hash == plain.hash
    assert len(used.encode_batch(["one two three four five six"])[0]) > 3


# ---- bad lines


@pytest.mark.parametrize("batch_bytes", [1, 64, 1 << 20])
def test_every_kind_of_bad_line_is_reported_with_its_number(tmp_path, batch_bytes, monkeypatch):
    monkeypatch.setattr(token_store, "BATCH_BYTES", batch_bytes)
    for name, (bad, reason) in BAD_LINES.items():
        path = tmp_path / f"{name.replace(' ', '_')}.jsonl"
        good = b'{"text": "fine"}\n'
        path.write_bytes(b"\xef\xbb\xbf" + good * 7 + bad + b"\n" + good * 3 + bad)
        with pytest.raises(UserError) as error:
            TokenStore.open_or_build(path, ByteEncoder())
        report = str(error.value).splitlines()
        assert report[0].startswith(f"{path}:8: ")
        assert reason in report[0]
        assert report[1].startswith(f"{path}:12: ")
        assert reason in report[1]
        assert report[2:] == [
            f"{path}: 2 of 12 lines are bad; --skip_bad_lines 0.17 goes on without them; "
            "scripts/check_data.py shows what it holds"
        ]


def test_bad_lines_are_remembered_and_can_be_skipped(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + b"bad\n" * 25)
    with pytest.raises(UserError) as first:
        TokenStore.open_or_build(path, ByteEncoder())
    before = snapshot(tmp_path)
    with pytest.raises(UserError) as second:
        TokenStore.open_or_build(path, NoBuild())
    store = TokenStore.open_or_build(path, NoBuild(), skip_bad_lines=True)
    assert snapshot(tmp_path) == before
    assert str(first.value) == str(second.value)
    assert str(first.value).count(f"{path}:") == 11
    assert str(first.value).endswith(
        "25 of 26 lines are bad, most of the file; scripts/check_data.py shows what it holds"
    )
    assert store.bad_lines.count == 25
    assert len(store.lines) == 1


def test_a_file_without_a_good_line_is_an_error_even_when_skipping(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"{]\n" * 3)
    with pytest.raises(UserError, match="not one good line in 3"):
        TokenStore.open_or_build(path, ByteEncoder(), skip_bad_lines=True)
    path.write_bytes(b" \n" * 3)
    with pytest.raises(UserError, match="not one good line in 0"):
        TokenStore.open_or_build(path, ByteEncoder())


def test_bad_lines_are_skipped_up_to_a_share(tmp_path):
    """Of 20 lines 2 are bad: a store that another share built says the same."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good"}\n' * 18 + b'{"text": ""}\n\n' * 2)
    for _ in range(2):
        assert len(TokenStore.open_or_build(path, ByteEncoder(), skip_bad_lines=0.1).lines) == 18
        with pytest.raises(UserError, match="2 of 20 lines are bad") as error:
            TokenStore.open_or_build(path, ByteEncoder(), skip_bad_lines=0.09)
        assert [line[:16] for line in str(error.value).replace(f"{path}", "").splitlines()] == [
            ':19: "text" is e',
            ':21: "text" is e',
            ": 2 of 20 lines ",
        ]


# ---- reuse


def test_second_open_writes_nothing(data):
    ids = TokenStore.open_or_build(data, ByteEncoder()).ids.tolist()
    before = snapshot(data.parent)
    assert TokenStore.open_or_build(data, NoBuild()).ids.tolist() == ids
    assert snapshot(data.parent) == before


def test_cache_dir_holds_the_store(data, tmp_path):
    cache = tmp_path / "not" / "yet"
    TokenStore.open_or_build(data, ByteEncoder(), cache_dir=cache)
    assert stores(cache)
    assert not stores(tmp_path)


def edit_end(path):
    content = path.read_bytes()
    path.write_bytes(content.replace(b"text 29", b"TEXT 29"))


def edit_middle(path):
    content = path.read_bytes()
    path.write_bytes(content.replace(b"text 15", b"TEXT 15"))


@pytest.mark.parametrize("edit", [edit_end, edit_middle])
def test_same_size_and_time_but_other_content_is_built_again(data, edit):
    TokenStore.open_or_build(data, ByteEncoder())
    stat = data.stat()
    edit(data)
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (data.stat().st_size, data.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    text = bytes((TokenStore.open_or_build(data, ByteEncoder()).ids - 100_000).astype(np.uint8))
    assert b"TEXT" in text


def test_other_size_time_or_encoder_is_built_again(data):
    TokenStore.open_or_build(data, ByteEncoder())
    os.utime(data, ns=(0, data.stat().st_mtime_ns + 1))
    TokenStore.open_or_build(data, ByteEncoder())
    assert len(stores(data.parent)) == 2
    with data.open("a", encoding="utf-8") as file:
        file.write('{"text": "one more"}\n')
    assert len(TokenStore.open_or_build(data, ByteEncoder()).lines) == 31
    assert len(stores(data.parent)) == 3
    other = ByteEncoder()
    other.key = "other"
    TokenStore.open_or_build(data, other)
    assert len(stores(data.parent)) == 4


def test_another_tokenizer_is_another_store(data, tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    before = TextEncoder(tokenizer).key
    assert TextEncoder(AutoTokenizer.from_pretrained(tokenizer_dir)).key == before
    tokenizer.add_tokens(["一个新词"])
    assert TextEncoder(tokenizer).key != before


def test_a_damaged_store_is_built_again(data):
    ids = TokenStore.open_or_build(data, ByteEncoder()).ids.tolist()
    store = data.parent / stores(data.parent)[0]
    with (store / "ids").open("r+b") as file:
        file.truncate(10)
    assert TokenStore.open_or_build(data, ByteEncoder()).ids.tolist() == ids


# ---- several processes

SCRIPT = """
import os, sys, time
from pathlib import Path
import numpy as np
from dataset.records import RecordOptions, UserError, parse_text
from dataset.text import TextTokenizer
from dataset.token_store import Encoded, TokenStore

path, events, go = map(Path, sys.argv[1:])

class Waiting:
    key = "bytes"
    dtype = np.dtype("<u4")
    is_chat = False
    counted = ()
    options = RecordOptions()
    prepare = staticmethod(TextTokenizer.prepare)

    def parse(self, line):
        return parse_text(line), ()

    def encode(self, records):
        with events.open("a") as file:
            file.write(f"{os.getpid()}\\n")
        while not go.exists():
            time.sleep(0.02)
        return Encoded(np.zeros(5 * len(records)), np.full(len(records), 5))

try:
    store = TokenStore.open_or_build(path, Waiting())
except UserError as error:
    print(error)
    sys.exit(2)
print(len(store.lines))
"""


@pytest.fixture
def start(root, tmp_path):
    """Start a process that opens a store; it builds when the file `go` is there."""
    processes = []

    def start(path, before="", **environment):
        files = [str(path), str(tmp_path / "events"), str(tmp_path / "go")]
        process = subprocess.Popen(
            [sys.executable, "-c", before + SCRIPT, *files],
            cwd=root,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)


def test_two_processes_build_once(data, start, tmp_path):
    first, second = start(data), start(data)
    wait_for(tmp_path / "events")
    builder = int((tmp_path / "events").read_text(encoding="utf-8"))
    waiter = first if second.pid == builder else second
    assert "waiting for another process" in waiter.stderr.readline()
    (tmp_path / "go").touch()
    assert [p.communicate(timeout=60)[0] for p in (first, second)] == ["30\n", "30\n"]
    assert (tmp_path / "events").read_text(encoding="utf-8") == f"{builder}\n"


def test_local_ranks_wait_for_the_first_and_see_its_bad_lines(data, start, tmp_path):
    with data.open("a", encoding="utf-8") as file:
        file.write("bad\n")
    second = start(data, LOCAL_RANK="1", RANK="1", WORLD_SIZE="2")
    first = start(data, LOCAL_RANK="0", RANK="0", WORLD_SIZE="2")
    wait_for(tmp_path / "events")
    (tmp_path / "go").touch()
    outputs = [p.communicate(timeout=60)[0] for p in (first, second)]
    assert (first.returncode, second.returncode) == (2, 2)
    assert outputs[0] == outputs[1]
    assert f"{data}:31: broken JSON" in outputs[0]
    assert (tmp_path / "events").read_text(encoding="utf-8") == f"{first.pid}\n"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_builder_leaves_no_store(data, start, tmp_path):
    process = start(data)
    wait_for(tmp_path / "events")
    process.kill()
    process.wait()
    assert not stores(tmp_path)
    assert leftovers(tmp_path)
    assert len(TokenStore.open_or_build(data, ByteEncoder()).lines) == 30
    assert not leftovers(tmp_path)


# ---- where nothing can be written


def test_a_folder_that_cannot_be_written_names_the_flag(data, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--cache_dir") as error:
        TokenStore.open_or_build(data, ByteEncoder(), cache_dir=tmp_path / "file" / "cache")
    assert "\n" not in str(error.value)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, start):
    pytest.importorskip("resource", reason="needs a limit on file sizes")
    path = tmp_path / "data.jsonl"
    write_lines(path, ["x"] * 10_000)
    (tmp_path / "go").touch()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
    process = start(path, before=limit)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert "--cache_dir" in output
    assert output.count("\n") == 1
    assert not stores(tmp_path)
    assert not leftovers(tmp_path)


def test_a_file_that_grows_meanwhile_is_an_error(data):
    class Appending(ByteEncoder):
        def encode(self, records):
            with data.open("a", encoding="utf-8") as file:
                file.write('{"text": "late"}\n')
            return super().encode(records)

    with pytest.raises(UserError, match="changed while"):
        TokenStore.open_or_build(data, Appending())
    assert not stores(data.parent)
    assert not leftovers(data.parent)
