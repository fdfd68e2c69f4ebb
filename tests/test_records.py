import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.records import BadLines, DataError, RecordError, check_file, parse_text

# Bad lines, and a part of the reason to be named. test_token_store.py puts them into files.
BAD_LINES = {
    "blank": (b"", "blank line"),
    "spaces": (b"  \t", "blank line"),
    "not JSON": (b"hello", "broken JSON: Expecting value at column 1"),
    "column": (b'{"text": "a" "b"}', "broken JSON: Expecting ',' delimiter at column 14"),
    "column counts characters": ('{"text": "中文" 1}'.encode(), "at column 15"),
    "control character": (b'{"text": "a\tb"}', "Invalid control character at column 12"),
    "two objects": (b'{"text": "a"}{"text": "b"}', "Extra data at column 14"),
    "array": (b'["text"]', "an array, not a JSON object"),
    "string": (b'"text"', "a string, not a JSON object"),
    "null": (b"null", "null, not a JSON object"),
    "missing": (b'{"content": "a"}', '"text" is missing'),
    "text is null": (b'{"text": null}', '"text" is null, not a string'),
    "text is a number": (b'{"text": 1}', '"text" is a number, not a string'),
    "text is a boolean": (b'{"text": true}', '"text" is a boolean, not a string'),
    "text is an array": (b'{"text": ["a"]}', '"text" is an array, not a string'),
    "text is an object": (b'{"text": {}}', '"text" is an object, not a string'),
    "empty text": (b'{"text": ""}', '"text" is empty'),
    "blank text": ('{"text": " \\n\\t　"}'.encode(), '"text" is blank'),
    "not UTF-8": ('{"text": "中文"}'.encode("gbk"), "invalid UTF-8 at byte 11"),
    "surrogate in UTF-8": (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8 at byte 11"),
    "lone surrogate": (b'{"text": "ab\\ud83d!"}', r"lone surrogate, \ud83d, at character 3"),
    "low surrogate": (b'{"text": "\\ude00"}', r"lone surrogate, \ude00, at character 1"),
    "cut in a string": (b'{"text": "to be cont', "column 20; truncated?"),
    "cut before the brace": (b'{"text": "a"', "column 12; truncated?"),
    "cut in an escape": (b'{"text": "a\\u4e', "column 15; truncated?"),
    "cut in a character": (
        '{"text": "中'.encode()[:-1],
        "in the middle of a character; truncated?",
    ),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "long number": (b'{"text": "a", "n": ' + b"1" * 5_000 + b"}", "thousand digits"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_bad_line_is_refused_with_its_reason(line, reason, end):
    with pytest.raises(RecordError) as error:
        parse_text(line + end)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(texts, st.booleans(), st.sampled_from(["", "\n", "\r\n"]))
def test_a_good_line_gives_its_text(text, ascii_only, end):
    line = json.dumps({"id": 7, "text": text}, ensure_ascii=ascii_only) + end
    assert parse_text(line.encode("utf-8")) == text


@given(texts, st.booleans(), st.data())
def test_every_cut_of_a_line_is_called_truncated(text, ascii_only, data):
    line = json.dumps({"text": text}, ensure_ascii=ascii_only).encode("utf-8")
    cut = data.draw(st.integers(1, len(line) - 1))
    with pytest.raises(RecordError, match="truncated"):
        parse_text(line[:cut])


def test_a_byte_order_mark_is_accepted():
    assert parse_text(b'\xef\xbb\xbf{"text": "a"}\n') == "a"


def test_the_report_names_ten_lines_and_the_total():
    bad = BadLines()
    for number in range(3, 1237):
        bad.add(number, f"reason {number}")
    report = bad.report("data.jsonl").splitlines()
    assert report[:10] == [f"data.jsonl:{n}: reason {n}" for n in range(3, 13)]
    assert len(report) == 11
    assert "1,234" in report[10]
    assert "--skip_bad_lines" in report[10]


def test_files_that_cannot_be_data(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    packed = tmp_path / "packed.jsonl"
    packed.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    wide = tmp_path / "wide.jsonl"
    wide.write_text('{"text": "a"}\n', encoding="utf-16")
    missing = tmp_path / "missing.jsonl"
    for path, reason in [
        (empty, "empty"),
        (packed, "gzip"),
        (wide, "UTF-16"),
        (missing, "no such file"),
        (tmp_path, "folder"),
    ]:
        with pytest.raises(DataError) as error:
            check_file(path)
        assert str(path) in str(error.value)
        assert reason in str(error.value)
        assert "\n" not in str(error.value)
