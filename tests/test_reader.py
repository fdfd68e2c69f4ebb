"""What a file is, and where its records begin.

Every array is read as Python's json reads it; what other libraries wrote comes back as it was.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from dataset import columns, reader, streams
from dataset.fields import RecordError, parse_object
from dataset.reader import BLANK, Place, check_source, locate, read_records, text_note


def records_of(path):
    return [(place.line, json.loads(record)) for place, record in read_records(path)]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


# ---- arrays

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\[]{},:\n\t\u4e2d🙂', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def dump(value, how):
    """One value as JSON: on one line, with line breaks, or with characters as escapes."""
    return json.dumps(value, indent=how if how else None, ensure_ascii=how == 1)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.dictionaries(st.text(max_size=3), values), st.integers(0, 2)), max_size=5
    ),
    st.sampled_from([",", " ,\n", ",\r\n\n", "\n, "]),
    st.sampled_from(["", "\n", " \n\n  "]),
    st.integers(0, 20),
    st.integers(1, 9),
)
def test_an_array_is_read_whatever_its_line_breaks(
    tmp_path_factory, elements, comma, blank, head, chunk
):
    """Records are what json.loads reads, their lines those of their first characters."""
    path = tmp_path_factory.getbasetemp() / "array.json"
    text = f"{blank}[{blank}"
    lines = []
    for i, (value, how) in enumerate(elements):
        text += comma * (i > 0)
        lines.append(1 + text.count("\n"))
        text += dump(value, how)
    text += f"{blank}]{blank}"
    write(path, "\ufeff" + text)
    expected = list(zip(lines, json.loads(text), strict=True))
    assert records_of(path) == expected  # at once
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(reader, "HEAD_BYTES", 5 + 3 * len(blank) + head)
        patches.setattr(reader, "CHUNK_BYTES", chunk)
        assert records_of(path) == expected  # from pieces that end anywhere


def test_elements_of_other_kinds_are_given_too(tmp_path):
    path = write(tmp_path / "a.json", '["text", 1,\nnull, [2, 3], {"a": 1, "b": [1, 2]},]')
    assert [(place.line, record.decode()) for place, record in read_records(path)] == [
        *[(1, '"text"'), (1, "1"), (2, "null"), (2, "[2, 3]")],
        (2, '{"a": 1, "b": [1, 2]}'),
    ]
    assert records_of(write(path, " [ \n ] \n")) == []


BROKEN_ARRAYS = {
    "cut in a record": ('[\n{"a": "1"},\n{"a": "2', 3, "cut off"),
    "cut after a record": ('[\n{"a": "1"},\n{"a": "2"}', 3, "cut off"),
    "cut after a comma": ('[\n{"a": "1"},\n', 3, "cut off"),
    "a bracket is missing": ('[\n{"a": "1"},\n{"a": "2",\n{"a": "3"}\n]\n', 3, "property name"),
    "a quote is missing": (
        '[\n{"a": "1"},\n{"a": "2},\n{"a": "3"}\n]\n',
        3,
        "Invalid control character",
    ),
    "more follows": ('[{"a": "1"}]\n\n[{"a": "2"}]\n', 3, "more follows the end"),
    "a bracket too many": ('[\n{"a": "1"}},\n{"a": "2"}]\n', 2, "Expecting ','"),
}


@pytest.mark.parametrize(
    ("text", "line", "reason"), BROKEN_ARRAYS.values(), ids=list(BROKEN_ARRAYS)
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_an_array_that_cannot_be_read_to_its_end_is_an_error(
    tmp_path, monkeypatch, text, line, reason, chunk
):
    monkeypatch.setattr(reader, "HEAD_BYTES", 5)
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk)
    path = write(tmp_path / "a.json", text)
    with pytest.raises(UserError) as error:
        list(read_records(path))
    assert str(error.value).startswith(f"{path}:{line}: ") and reason in str(error.value)
    assert "\n" not in str(error.value)


def test_the_shapes_of_the_published_files(shared_dir):
    for path in [
        *(shared_dir / "data" / "raw").glob("*.json"),
        *(shared_dir / "data" / "formats").glob("array*.json"),
    ]:
        expected = json.loads(path.read_text(encoding="utf-8"))
        found = records_of(path)
        assert [record for _, record in found] == expected
        lines = path.read_bytes().split(b"\n")
        assert all(lines[number - 1].lstrip().startswith(b"{") for number, _ in found)


@pytest.mark.parametrize("comma", [",", ",\n"])
def test_an_array_takes_the_memory_of_a_few_chunks(tmp_path, monkeypatch, comma):
    """Not that of the file, 8 MiB, even if it has one line alone."""
    for module in (reader, streams):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 16)
    path = write(tmp_path / "a.json", f"[{comma.join([json.dumps({'a': 'x' * 1000})] * 8192)}]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(path)) == 8192
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


# ---- lines


def test_blank_lines_are_left_out_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"a": 1}\r\n\n \t \r\n{"a": 2}\n\n\n{"a": 3}')
    assert [place.line for place, _ in read_records(path)] == [1, 4, 7]


# ---- what else there is


def zipped(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.jsonl", content)
    return file.getvalue()


GOOD = '{"text": "a"}\n'
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
OTHERS = {
    "zip": (zipped(GOOD), "zip archive", "unzip"),
    "UTF-16, no mark": (GOOD.encode("utf-16-le"), "UTF-16", "iconv"),
    "UTF-16, an array": (json.dumps([{"a": 1}]).encode("utf-16-be"), "UTF-16", "iconv"),
    "UTF-32": (GOOD.encode("utf-32"), "binary", "docs/data.md"),
    "Git LFS": (LFS, "Git LFS pointer", "git lfs pull"),
    "HTML": ("\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "HTML", "download"),
    "HTML, bare": ("<HTML>\n<head>", "HTML", "download"),
    "CSV": ('id,text\n0,"one, two"\n', "table", "name it .csv"),
    "TSV": ("id\ttext\n0\tone\n", "table", ".tsv"),
    "plain": ("Once upon a time, it was.\n\nThe end, then.\n", "plain text", "name it .txt"),
    "strings": ('"one"\n"two"\n', "plain text", "name it .txt"),
    "lyrics": ("[00:01] la\n[00:02] la\n", "plain text", "name it .txt"),
    "binary": (b"\x7fELF\x02\x01\x01\0\0\0", "binary", "docs/data.md"),
    "one object": (json.dumps({"text": "a"}, indent=2), "over several lines", "one object a line"),
    "objects": (2 * json.dumps({"data": [1]}, indent=2), "over several lines", "an array"),
}


@pytest.mark.parametrize(("content", "name", "remedy"), OTHERS.values(), ids=list(OTHERS))
def test_a_file_of_another_kind_is_named_with_what_to_do(tmp_path, content, name, remedy):
    path = write(tmp_path / "data.jsonl", content)
    for read in (check_source, lambda path: list(read_records(path))):
        with pytest.raises(UserError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}: is ") and "\n" not in str(error.value)
        assert name in str(error.value) and remedy in str(error.value)


def test_no_file(tmp_path):
    (tmp_path / "folder").mkdir()
    for path, reason in [
        (write(tmp_path / "empty.jsonl", ""), "is empty"),
        (tmp_path / "missing.jsonl", "no such file"),
        (tmp_path / "folder", "no files in this folder"),
        (tmp_path / "*.csv", "no files in this folder, or of this pattern"),
        (write(tmp_path / "empty.jsonl.gz", gzip.compress(b"")), "is empty"),
    ]:
        with pytest.raises(UserError) as error:
            check_source(path)
        assert str(error.value).startswith(f"{path}: ") and reason in str(error.value)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (GOOD, [1]),
        ("\n \n" + GOOD, [3]),
        ("bad\n" + GOOD, [1, 2]),
        ('{"text": "cut', [1]),
        ("{", [1]),
        ("{}\n" + GOOD, [1, 2]),
        ('{"text": "a"},\n{"text": "b"},\n', [1, 2]),
        ('{"text": "a", "b": [1, 2]}\n' + GOOD, [1, 2]),
        ('{"text": "<!doctype html>"}\n', [1]),
    ],
)
def test_json_lines_are_json_lines_even_if_some_are_bad(tmp_path, text, lines):
    path = write(tmp_path / "data.jsonl", text)
    check_source(path)
    assert [place.line for place, _ in read_records(path)] == lines


# ---- packed, recoded, by column, in folders

TEXTS = ["春天来了 the quick fox", 'a "quote", a comma', "two\nlines", "a\u2028b", "\U0001f642"]
RECORDS = [{"text": text, "title": f"title {i}"} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


def fields_of(path, separator=None):
    """The records of a file, and their places."""
    found = [(place, parse_object(record)) for place, record in read_records(path, separator)]
    return [record for _, record in found], [place.line for place, _ in found]


def zstd(content):
    zstandard = pytest.importorskip("zstandard")
    half = len(content) // 2  # two frames, as parallel compressors write
    parts = content[:half], content[half:]
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstd])
@pytest.mark.parametrize("is_array", [False, True])
def test_compressed_files_are_read_like_others(tmp_path, pack, is_array):
    content = json.dumps(RECORDS, indent=1) if is_array else LINES
    path = write(tmp_path / "data.json.packed", pack(content.encode()))
    records, lines = fields_of(path)
    assert records == RECORDS
    assert lines == ([2 + 4 * i for i in range(5)] if is_array else [1, 2, 3, 4, 5])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"packed: (damaged or cut off|.*is broken)"):
        fields_of(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings_that_a_mark_shows(tmp_path, monkeypatch, encoding, end):
    monkeypatch.setattr(streams, "CHUNK_BYTES", 7)
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    content = (mark + LINES.replace("\n", end)).encode(encoding)
    assert fields_of(write(tmp_path / "data.jsonl", content)) == (RECORDS, [1, 2, 3, 4, 5])


@pytest.mark.parametrize(("encoding", "named"), [("gb18030", "GB18030"), ("latin-1", "LATIN1")])
def test_another_encoding_is_a_bad_line_that_says_how_to_convert(tmp_path, encoding, named):
    text = "春天来了" if encoding == "gb18030" else "caf\xe9 noir"
    for name, content in [
        ("a.jsonl", f'{{"text": "{text}"}}\n'),
        ("a.csv", f"text\n{text}\n"),
        ("a.txt", text),
    ]:
        (_, record), *_ = read_records(write(tmp_path / name, content.encode(encoding)))
        with pytest.raises(RecordError, match=f"iconv -f {named} -t UTF-8"):
            parse_object(record)


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".csv", ";"), (".tsv", "\t")])
def test_tables(tmp_path, suffix, delimiter):
    path = tmp_path / f"data{suffix}"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, ["title", "text"], delimiter=delimiter)
        table.writeheader()
        table.writerows(RECORDS)
    assert fields_of(path) == (RECORDS, [2, 3, 4, 6, 7])
    text = path.read_text(encoding="utf-8-sig")
    later = write(tmp_path / f"later{suffix}", f"\ufeff\n  \n{text}".encode())
    assert fields_of(later) == (RECORDS, [4, 5, 6, 8, 9])
    with path.open("a", encoding="utf-8") as file:
        file.write("one cell\n")
    (place, record) = list(read_records(path))[-1]
    assert place.line == 8 and "1 columns, not 2" in str(record)


def test_two_columns_of_one_name_are_an_error_that_names_it(tmp_path):
    """Of which one alone would be read; columns without a name cannot be meant."""
    path = write(tmp_path / "a.csv", "\ntext,n,text\none,1,two\n")
    with pytest.raises(UserError, match=f'^{path}:2: 2 columns have the name "text"; [^\n]*$'):
        list(read_records(path))
    unnamed = write(tmp_path / "b.csv", "text,,\none,,\n")
    assert fields_of(unnamed) == ([{"text": "one", "": ""}], [2])
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table([["one"], ["two"]], names=["text", "text"])
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    for name, make in (("a.arrow", pyarrow.ipc.new_file), ("b.arrow", pyarrow.ipc.new_stream)):
        with make(tmp_path / name, table.schema) as file:
            file.write_table(table)
    for name in ("a.parquet", "a.arrow", "b.arrow"):
        path = tmp_path / name
        with pytest.raises(UserError, match=f'^{path}: 2 columns have the name "text"; [^\n]*$'):
            list(read_records(path))


def test_columns(tmp_path, monkeypatch):
    """Parquet of several row groups, both formats of Arrow, and a folder of datasets."""
    pyarrow = pytest.importorskip("pyarrow")
    datasets = pytest.importorskip("datasets")
    from pyarrow import parquet

    monkeypatch.setattr(columns, "ROWS", 2)
    chats = [{"messages": [{"role": "user", "content": text}]} for text in TEXTS]
    for records in (RECORDS, chats):
        table = pyarrow.Table.from_pylist(records)
        parquet.write_table(table, tmp_path / "data.parquet", row_group_size=3)
        for new, name in [
            (pyarrow.ipc.new_file, "file.arrow"),
            (pyarrow.ipc.new_stream, "stream.arrow"),
        ]:
            with new(tmp_path / name, table.schema) as writer:
                writer.write_table(table, max_chunksize=3)
        datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved", num_shards=2)
        for name in ("data.parquet", "file.arrow", "stream.arrow"):
            assert fields_of(tmp_path / name) == (records, [1, 2, 3, 4, 5])
        assert fields_of(tmp_path / "saved") == (records, [1, 2, 3, 1, 2])
    split = datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)})
    split.save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="name one: train"):
        check_source(tmp_path / "splits")
    assert fields_of(tmp_path / "splits" / "train")[0] == RECORDS
    path = tmp_path / "data.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="broken Parquet"):
        fields_of(path)


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    for module, name, content in [
        ("pyarrow", "a.parquet", b"PAR1"),
        ("zstandard", "a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\x00"),
    ]:
        monkeypatch.setitem(sys.modules, module, None)
        path = write(tmp_path / name, content)
        with pytest.raises(UserError) as error:
            list(read_records(path))
        install = "pip install -r dataset/requirements.txt"
        assert str(error.value) == f"{path}: needs {module}: {install}"


def test_text_is_one_document_a_file(tmp_path):
    for name in ("a.txt", "a.md", "a.py", "a"):
        path = write(tmp_path / name, "\ufeff\nOne, two\r\n\r\n  {three}\n")
        assert fields_of(path) == ([{"text": "One, two\n\n  {three}"}], [2])
    assert fields_of(write(tmp_path / "lines.txt", LINES))[0] == RECORDS


def prose_of(path, separator=None):
    records, lines = fields_of(path, separator)
    return [(line, record["text"]) for line, record in zip(lines, records, strict=True)]


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "notes.md"])
@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time, it was.\n\nThe end, then.",
        "[[a link]]\n{x}",
        "[00:01] la\n[00:02] la",
        "one,two\n",
        "code:\n\n{\n}",
        "从前",
    ],
)
def test_a_short_text_is_one_document(tmp_path, name, text):
    path = write(tmp_path / name, "\ufeff\n \n" + text.replace("\n", "\r\n"))
    assert prose_of(path) == [(3, text.strip("\n"))]
    assert text_note(path) == "plain text, taken as one document"


@pytest.mark.parametrize("text", [GOOD, json.dumps([{"text": "a"}])])
def test_records_are_records_whatever_the_file_s_name(tmp_path, text):
    path = write(tmp_path / "data.txt", text)
    assert prose_of(path) == [(1, "a")] and text_note(path) is None
    assert text_note(write(tmp_path / "data.jsonl", text)) is None


def test_a_long_text_is_split_at_blank_lines(tmp_path):
    """Paragraphs of 1,000 bytes: three of them are the first 2,048 bytes or more."""
    paragraphs = [f"{i:03} " + "x" * 995 for i in range(20)]
    path = write(tmp_path / "book.txt", "\n \n".join(paragraphs))
    found = prose_of(path)
    assert [number for number, _ in found] == [1 + 6 * i for i in range(7)]
    assert [text.split("\n \n") for _, text in found] == [
        paragraphs[i : i + 3] for i in range(0, 20, 3)
    ]
    assert "split at blank lines" in text_note(path)
    packed = write(tmp_path / "book.txt.gz", gzip.compress(path.read_bytes()))
    assert prose_of(packed) == found and text_note(packed) == text_note(path)
    assert [text for _, text in prose_of(path, BLANK)] == paragraphs
    assert text_note(path, BLANK) == "plain text, split at --separator"
    code = write(tmp_path / "book.py", path.read_bytes())
    assert [text for _, text in prose_of(code)] == ["\n \n".join(paragraphs)]
    assert text_note(code) is None and text_note(tmp_path) is None


def test_a_text_without_blank_lines_is_split_at_others(tmp_path):
    """Nothing of it is lost; of one that is a single line neither."""
    lines = [f"{i} " + "天" * 1000 for i in range(40)]  # 3 kB each: six are 16,384 bytes or more
    found = prose_of(write(tmp_path / "book.txt", "\n".join(lines)))
    assert [text.count("\n") + 1 for _, text in found] == [6] * 6 + [4]
    assert "\n".join(text for _, text in found) == "\n".join(lines)
    found = prose_of(write(tmp_path / "line.txt", "天" * 50_000))
    assert "".join(text for _, text in found) == "天" * 50_000
    assert {number for number, _ in found} == {1} and len(found) > 3


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_text_is_cut_at_separators(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk)
    path = write(tmp_path / "a.txt", "one\ntwo\n \n\n  three\n\n\n")
    texts, lines = fields_of(path, BLANK)
    assert ([r["text"] for r in texts], lines) == (["one\ntwo", "  three"], [1, 5])
    path = write(tmp_path / "a.txt", "<|end|>one\n\ntwo\n<|end|>\nthree<|end|>\n")
    texts, lines = fields_of(path, "<|end|>")
    assert ([r["text"] for r in texts], lines) == (["one\n\ntwo", "three"], [1, 5])


@settings(deadline=None)
@given(st.text("ab\n ", min_size=1, max_size=60), st.integers(1, 9), st.integers(1, 9))
def test_long_text_is_cut_into_documents(tmp_path_factory, text, longest, chunk):
    """They hold all of it, blank lines aside, and are not longer than they may be."""
    path = write(tmp_path_factory.getbasetemp() / "long.py", text)
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(reader, "DOCUMENT_CHARS", longest)
        patches.setattr(reader, "CHUNK_BYTES", chunk)
        records, lines = fields_of(path)
    texts = [record["text"] for record in records]
    assert "".join(texts).replace("\n", "").replace(" ", "") == "".join(text.split())
    assert all(len(document) <= longest for document in texts)
    source = text.split("\n")
    for document, line in zip(texts, lines, strict=True):
        assert document.split("\n")[0] in source[line - 1]


def test_folders_and_patterns(tmp_path):
    write(tmp_path / "b.jsonl", LINES)
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    write(tmp_path / "sub" / "a.py", "print(1)\n")
    write(tmp_path / "sub" / "__init__.py", "")
    write(tmp_path / "sub" / "picture.png", b"\x89PNG\r\n\x1a\n\0\0")
    for name in (".hidden", "README.md", "LICENSE", "sub/.git/config", "x.tokens.lock"):
        write(tmp_path / name, "not data")
    found = list(read_records(tmp_path))
    assert [place for place, _ in found] == [
        *[Place("b.jsonl", n) for n in range(1, 6)],
        *[Place("sub/a.py", 1), Place("sub/picture.png", 1)],
    ]
    assert locate(tmp_path, found[5][0]) == f"{tmp_path}/sub/a.py:1"
    assert found[5][1] == {"text": "print(1)"}
    assert "binary data" in str(found[6][1])
    for pattern in ("*/*.py", "**/*.py"):
        (found,) = read_records(tmp_path / pattern)
        assert found == (Place("sub/a.py", 1), {"text": "print(1)"})
        assert locate(tmp_path / pattern, found[0]) == f"{tmp_path}/sub/a.py:1"


def test_a_table_takes_the_memory_of_a_few_chunks(tmp_path, monkeypatch):
    """And text and a compressed file, of 8 MiB each."""
    for module in (reader, streams):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(reader, "DOCUMENT_CHARS", 1 << 16)
    rows = "".join(f'"{"x" * 1000}",{i}\n' for i in range(8192))
    packed = gzip.compress("".join(f'{{"text": "{"x" * 1000}"}}\n' * 8192).encode())
    for name, content in [("a.csv", f"text,n\n{rows}"), ("a.txt", rows), ("a.jsonl.gz", packed)]:
        path = write(tmp_path / name, content)
        tracemalloc.start()
        try:
            assert sum(1 for _ in read_records(path)) > 100
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 2 << 20


def test_data_sets_of_a_hub(tmp_path, monkeypatch):
    """A folder stands for the hub, as the library takes it; ModelScope's library is a stand-in."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "train.jsonl", LINES)
    write(tmp_path / "mine" / "test.jsonl", LINES.splitlines()[0] + "\n")
    for source, records in [
        ("hf://mine", RECORDS),
        ("hf://mine:test", RECORDS[:1]),
        ("hf://mine:train[:2]", RECORDS[:2]),
    ]:
        check_source(Path(source))
        assert fields_of(Path(source)) == (records, list(range(1, len(records) + 1)))
    assert locate(Path("hf://mine:test"), Place("", 1)) == "hf://mine:test:1"
    for source in ("hf://mine:none", "hf://nowhere/at-all"):
        with pytest.raises(UserError, match=f"^{source}: ") as error:
            fields_of(Path(source))
        assert "\n" not in str(error.value)

    class HubError(Exception):
        pass

    class MsDataset:
        @staticmethod
        def load(name, *, subset_name, split, use_streaming):
            if name == "a/none":
                raise HubError("[E3020] no such data set\nRequest: …")
            assert (name, subset_name, split, use_streaming) == ("a/b", "c", "train", True)
            return iter(RECORDS)

    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace())
    stand_in = SimpleNamespace(MsDataset=MsDataset)
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", stand_in)
    monkeypatch.setitem(sys.modules, "modelscope_hub", SimpleNamespace())
    errors = SimpleNamespace(HubError=HubError)
    monkeypatch.setitem(sys.modules, "modelscope_hub.errors", errors)
    assert fields_of(Path("ms://a/b/c"))[0] == RECORDS
    with pytest.raises(UserError, match=r"^ms://a/none: \[E3020\] no such data set$"):
        fields_of(Path("ms://a/none"))
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", None)
    with pytest.raises(
        UserError, match=r'needs modelscope: pip install -U "modelscope\[datasets\]"$'
    ):
        fields_of(Path("ms://a/b/c"))
