"""What a file is, and where its records begin: every array is read as Python's json reads it."""

import bz2
import gzip
import io
import json
import lzma
import tracemalloc
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from dataset import RecordError, parse_text, reader
from dataset.reader import check_file, read_records, text_note


def records_of(path):
    return [(line, json.loads(record)) for line, record in read_records(path)]


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
    assert [(line, record.decode()) for line, record in read_records(path)] == [
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
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1 << 16)
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
    assert [line for line, _ in read_records(path)] == [1, 4, 7]


# ---- what else there is


def zipped(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.jsonl", content)
    return file.getvalue()


GOOD = '{"text": "a"}\n'
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
OTHERS = {
    "gzip": (gzip.compress(GOOD.encode()), "compressed with gzip", "gunzip"),
    "xz": (lzma.compress(GOOD.encode()), "compressed with xz", "unxz"),
    "bzip2": (bz2.compress(GOOD.encode()), "compressed with bzip2", "bunzip2"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", "compressed with zstd", "unzstd"),
    "zip": (zipped(GOOD), "zip archive", "unzip"),
    "Parquet": (b"PAR1\x15\x04\x15", "Parquet", "to_json"),
    "Arrow": (b"ARROW1\0\0", "Arrow", "to_json"),
    "UTF-16": (GOOD.encode("utf-16"), "UTF-16", "UTF-8"),
    "UTF-16, big": (b"\xfe\xff" + GOOD.encode("utf-16-be"), "UTF-16", "UTF-8"),
    "UTF-16, no mark": (GOOD.encode("utf-16-le"), "UTF-16", "UTF-8"),
    "UTF-16, an array": (json.dumps([{"a": 1}]).encode("utf-16-be"), "UTF-16", "UTF-8"),
    "Git LFS": (LFS, "Git LFS pointer", "git lfs pull"),
    "HTML": ("\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "HTML", "download"),
    "HTML, bare": ("<HTML>\n<head>", "HTML", "download"),
    "CSV": ('id,text\n0,"one, two"\n', "table", "to_json"),
    "TSV": ("id\ttext\n0\tone\n", "table", "to_json"),
    "plain": ("Once upon a time, it was.\n\nThe end, then.\n", "plain text", '{"text": "…"}'),
    "strings": ('"one"\n"two"\n', "plain text", '{"text": "…"}'),
    "lyrics": ("[00:01] la\n[00:02] la\n", "plain text", '{"text": "…"}'),
    "binary": (b"\x7fELF\x02\x01\x01\0\0\0", "binary", "UTF-8"),
    "one object": (json.dumps({"text": "a"}, indent=2), "over several lines", "one object a line"),
    "objects": (2 * json.dumps({"data": [1]}, indent=2), "over several lines", "an array"),
}


@pytest.mark.parametrize(("content", "name", "remedy"), OTHERS.values(), ids=list(OTHERS))
def test_a_file_of_another_kind_is_named_with_what_to_do(tmp_path, content, name, remedy):
    path = write(tmp_path / "data.jsonl", content)
    for read in (check_file, lambda path: list(read_records(path))):
        with pytest.raises(UserError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}: is ") and "\n" not in str(error.value)
        assert name in str(error.value) and remedy in str(error.value)


def test_the_invented_files_of_other_kinds(shared_dir):
    folder = shared_dir / "data" / "formats"
    for name, kind in {
        "chat.parquet": "Parquet",
        "text.parquet": "Parquet",
        "text.jsonl.gz": "gzip",
        "text.jsonl.zst": "zstd",
        "utf16.jsonl": "UTF-16",
        "text.csv": "table",
    }.items():
        with pytest.raises(UserError, match=kind):
            check_file(folder / name)


def texts_of(path):
    return [(number, json.loads(record)["text"]) for number, record in read_records(path)]


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
    assert texts_of(path) == [(3, text.strip("\n"))]
    assert text_note(path) == "plain text, taken as one document"


@pytest.mark.parametrize("text", [GOOD, json.dumps([{"text": "a"}])])
def test_records_are_records_whatever_the_file_s_name(tmp_path, text):
    path = write(tmp_path / "data.txt", text)
    assert texts_of(path) == [(1, "a")] and text_note(path) is None
    assert text_note(write(tmp_path / "data.jsonl", text)) is None


@pytest.mark.parametrize("content", [gzip.compress(GOOD.encode()), "a".encode("utf-16"), b"a\0b"])
def test_what_is_no_text_is_none_by_its_name(tmp_path, content):
    with pytest.raises(UserError, match=r"data\.txt: is "):
        check_file(write(tmp_path / "data.txt", content))


def test_a_long_text_is_split_at_blank_lines(tmp_path):
    """Paragraphs of 1,000 bytes: three of them are the first 2,048 bytes or more."""
    paragraphs = [f"{i:03} " + "x" * 995 for i in range(20)]
    path = write(tmp_path / "book.txt", "\n \n".join(paragraphs))
    found = texts_of(path)
    assert [number for number, _ in found] == [1 + 6 * i for i in range(7)]
    assert [text.split("\n \n") for _, text in found] == [
        paragraphs[i : i + 3] for i in range(0, 20, 3)
    ]
    assert "split at blank lines" in text_note(path)


def test_a_text_without_blank_lines_is_split_at_others(tmp_path):
    """Nothing of it is lost; of one that is a single line neither."""
    lines = [f"{i} " + "天" * 1000 for i in range(40)]  # 3 kB each: six are 16,384 bytes or more
    found = texts_of(write(tmp_path / "book.txt", "\n".join(lines)))
    assert [text.count("\n") + 1 for _, text in found] == [6] * 6 + [4]
    assert "\n".join(text for _, text in found) == "\n".join(lines)
    found = texts_of(write(tmp_path / "line.txt", "天" * 50_000))
    assert "".join(text for _, text in found) == "天" * 50_000
    assert {number for number, _ in found} == {1} and len(found) > 3


def test_text_in_another_encoding_is_a_bad_record(tmp_path):
    path = write(tmp_path / "old.txt", "天天".encode("gb18030"))
    [(number, record)] = read_records(path)
    with pytest.raises(RecordError, match="invalid UTF-8"):
        parse_text(record)
    assert number == 1


def test_no_file(tmp_path):
    for path, reason in [
        (write(tmp_path / "empty.jsonl", ""), "is empty"),
        (tmp_path / "missing.jsonl", "no such file"),
        (tmp_path, "is a folder"),
    ]:
        with pytest.raises(UserError) as error:
            check_file(path)
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
    check_file(path)
    assert [number for number, _ in read_records(path)] == lines
