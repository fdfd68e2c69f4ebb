"""Find the records in a file: what kind of file it is, and where each of its records begins."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from common import UserError

from .fields import MAX_LINE_BYTES

HEAD_BYTES = 1 << 16  # that the format of a file is detected from
CHUNK_BYTES = 1 << 20
LONG_TEXT = 1 << 14  # bytes of a plain text from which on it is split into documents
DOCUMENT_BYTES = 1 << 11  # at least, of each: about a row of 512 tokens
LONGEST_TOKEN = 12  # characters of an escaped surrogate pair, the longest that JSON has

Record = tuple[int, bytes]  # the line that it begins on, from 1, and its JSON
Read = Callable[[Path], Iterator[Record]]


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file in order: the line that each begins on, from 1, and its JSON.

    They are the lines of a JSON Lines file, blank ones left out, or the elements of a JSON array;
    or {"text"} objects, made of a plain .txt or .md file as `_read_text` splits it.
    Of a line beyond MAX_LINE_BYTES comes only as much as shows that it is too long. The file is
    never in memory as a whole. Raises UserError as `check_file`; also if an array is cut off or
    broken, such that it is unclear where its next element begins.
    """
    try:
        yield from check_file(path)(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def check_file(path: Path) -> Read:
    """What reads the records of a file, by its format.

    UserError if the file is missing, a folder, empty, or of another format, which it names.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a JSONL file")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not head:
        raise UserError(f"{path}: is empty")
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    _, name, remedy = next(f for f in _FORMATS if re.match(f[0], head, re.DOTALL))
    if path.suffix.lower() in (".txt", ".md") and name in _TEXTS and not re.match(_RECORDS, head):
        return _read_text
    if name not in _READERS:
        raise UserError(f"{path}: is {name}; {remedy}")
    return _READERS[name]


def _read_lines(path: Path) -> Iterator[Record]:
    """The lines of a file that are not blank, each with its line end."""
    number = 0
    with path.open("rb", buffering=CHUNK_BYTES) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if line.strip():
                yield number, line
            while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES + 1)


def _read_text(path: Path) -> Iterator[Record]:
    """The documents of a plain text, as {"text"} objects.

    A file of up to LONG_TEXT bytes is one. A longer one is split at the first blank line after
    DOCUMENT_BYTES; where there is none for LONG_TEXT, at the end of a line. What is not UTF-8 stays
    as it is, for the record to be refused.
    """
    is_long = path.stat().st_size > LONG_TEXT
    document, size, first, number = [], 0, 1, 0

    def record() -> Record:
        text = json.dumps({"text": "".join(document).strip("\n")}, ensure_ascii=False)
        return first, text.encode("utf-8", "surrogateescape")

    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        while line := file.readline(LONG_TEXT):
            ends = size >= LONG_TEXT or (size >= DOCUMENT_BYTES and not line.strip())
            if is_long and ends:
                yield record()
                document, size = [], 0
            if line.strip() and not document:
                first = number + 1
            if line.strip() or document:
                document.append(line)
                size += len(line.encode("utf-8", "surrogateescape"))
            number += line.endswith("\n")
    if document:
        yield record()


def text_note(path: Path) -> str | None:
    """What a plain text was taken as, for the user; None for a file of records."""
    if check_file(path) is not _read_text:
        return None
    if path.stat().st_size <= LONG_TEXT:
        return "plain text, taken as one document"
    return f"plain text, split at blank lines into documents of {DOCUMENT_BYTES:,} bytes or more"


def _read_array(path: Path) -> Iterator[Record]:
    """The elements of a JSON array, as they stand there."""
    decode = json.JSONDecoder().raw_decode
    blanks = re.compile(r"[ \t\r\n]*")
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        text = file.read(HEAD_BYTES)
        start = text.index("[") + 1  # of what stands before the next comma or bracket
        line = 1 + text.count("\n", 0, start)  # that of `start`
        mark = "["
        while mark != "]":
            begin = end = blanks.match(text, start).end()
            first_line = line + text.count("\n", start, begin)
            try:
                if not text.startswith("]", begin):  # an empty array, or a comma after the last
                    end = decode(text, begin)[1]
                stop = blanks.match(text, end).end()
                mark = text[stop : stop + 1]
                if mark not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, stop)
            except (ValueError, RecursionError) as error:
                reason, at = getattr(error, "msg", str(error)), getattr(error, "pos", begin)
                chunk = ""
                if reason.startswith("Unterminated string") or len(text) - at < LONGEST_TOKEN:
                    chunk = file.read(max(CHUNK_BYTES, len(text) - start))
                if not chunk:
                    problem = f"the array is broken or cut off ({reason.removesuffix(' at')})"
                    raise UserError(f"{path}:{first_line}: {problem}") from None
                text, start = text[start:] + chunk, 0
                continue
            if end > begin:
                yield first_line, text[begin:end].encode("utf-8", "surrogateescape")
            line += text.count("\n", start, stop)
            start = stop + 1
        rest = text[start:] + file.read(CHUNK_BYTES)
    if rest.strip():
        line += rest.count("\n", 0, len(rest) - len(rest.lstrip()))
        more = "more follows the end of the array; a file holds one array, or one object a line"
        raise UserError(f"{path}:{line}: {more}")


_CONVERT = "convert it to JSON Lines first, for example with to_json of the datasets library"
# Beginnings of files, what they are, what to do: the first that matches counts; the last one does.
_FORMATS = (
    (rb"\x1f\x8b", "compressed with gzip", "unpack it first: gunzip"),
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it first: unzstd"),
    (rb"\xfd7zXZ\0", "compressed with xz", "unpack it first: unxz"),
    (rb"BZh", "compressed with bzip2", "unpack it first: bunzip2"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first: 7z x"),
    (rb"PK\x03\x04", "a zip archive", "unpack it first: unzip"),
    (rb"PAR1", "a Parquet file", _CONVERT),
    (rb"ARROW1", "an Arrow file", _CONVERT),
    (
        rb"version https://git-lfs.github.com/",
        "a Git LFS pointer, not the data itself",
        "fetch the data: git lfs pull",
    ),
    (
        rb"\xff\xfe|\xfe\xff|[\[{]\0|\0[\[{]",
        "text in UTF-16",
        "save it as UTF-8, for example with iconv",
    ),
    (
        rb"(?i:<!doctype html|<html)",
        "an HTML page, perhaps an error or a login",
        "download the file itself",
    ),
    (rb'\[\s*[]\[{"]', "a JSON array", ""),
    (
        rb"{([^\n]*([{[]|[^}\n],))?[^\S\n]*\n",  # a first line that goes on
        "a JSON object over several lines",
        "write one object a line, or an array of them",
    ),
    (rb"$|{|.*\n\s*{", "JSON Lines", ""),
    (rb".*\0", "binary data of an unknown kind", "JSON Lines in UTF-8 are needed"),
    (rb"\w[\w .-]*([,\t]\w[\w .-]*)+\r?\n", "a table (CSV or TSV)", _CONVERT),
    (
        rb"",
        "plain text, not JSON",
        "name it .txt or .md to have it taken as it is, or write each document on one line, as "
        '{"text": "…"}',
    ),
)
# What a .txt or .md file may look like and yet be text to be taken as it is, unless it begins as
# records do.
_TEXTS = ("a JSON array", "JSON Lines", "a table (CSV or TSV)", "plain text, not JSON")
_RECORDS = rb"{|\[\s*{|$"
_READERS: dict[str, Read] = {"a JSON array": _read_array, "JSON Lines": _read_lines}
