"""Find the records in a file: what kind of file it is, and where each of its records begins."""

import csv
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common import UserError

from .fields import MAX_LINE_BYTES

HEAD_BYTES = 1 << 16  # that the format of a file is detected from
CHUNK_BYTES = 1 << 20

_BOM = b"\xef\xbb\xbf"
_BACKSLASH = ord("\\")

Record = tuple[int, bytes]  # the line that it begins on, from 1, and its JSON


class FileFormat(NamedTuple):
    """A kind of file.

    `name` completes "the file is …". `read` gives the records; where it is None the file cannot be
    used, and `remedy` is what to do about it.
    """

    name: str
    remedy: str = ""
    read: Callable[[Path], Iterator[Record]] | None = None


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file in order: the line that each begins on, from 1, and its JSON.

    They are the lines of a JSON Lines file, blank ones left out, or the elements of a JSON array,
    and are not parsed. Of a line beyond MAX_LINE_BYTES comes only as much as shows that it is too
    long. The file is never in memory as a whole.

    Raises:
        UserError: see `check_file`; also if an array is cut off, or broken such that it is unclear
            where its next element begins.
    """
    try:
        yield from check_file(path).read(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def check_file(path: Path) -> FileFormat:
    """The format of a file whose records can be read.

    Raises:
        UserError: if the file is missing, a folder, empty, or of another format; the text names the
            format and what to do about it.
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
    file_format = _detect_format(head)
    if file_format.read is None:
        raise UserError(f"{path}: is {file_format.name}; {file_format.remedy}")
    return file_format


def _read_lines(path: Path) -> Iterator[Record]:
    """The lines of a file that are not blank, each with its line end."""
    number = 0
    with path.open("rb", buffering=CHUNK_BYTES) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            record = line.removeprefix(_BOM) if number == 1 else line
            if record.strip():
                yield number, record
            while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES + 1)


_TOKEN = re.compile(rb'[",\[\]{}]')  # what separates the elements of an array


def _read_array(path: Path) -> Iterator[Record]:
    """The elements of a JSON array: what stands between the commas that no other bracket encloses.

    An element that is broken in itself is yielded as any other. Where it is unclear where the
    next one begins, UserError is raised: to go on would lose the rest of the file.
    """
    with path.open("rb") as file:
        buffer = file.read(HEAD_BYTES)
        start = position = buffer.index(b"[") + 1  # of the element, and of the next token
        line = 1 + buffer.count(b"\n", 0, start)  # that of `start`
        depth = 1
        while depth > 0:
            token = _TOKEN.search(buffer, position)
            position = token.start() if token else len(buffer)
            if token and token[0] == b'"':
                end = _end_of_string(buffer, position)
                newline = buffer.find(b"\n", position, end)
                if newline >= 0:
                    at = line + buffer.count(b"\n", start, newline)
                    raise UserError(
                        f"{path}:{at}: broken JSON: a string without an end; it is unclear where "
                        "the array goes on"
                    )
                if end < len(buffer):
                    position = end + 1
                    continue
            if position == len(buffer) or token[0] == b'"':  # the next token is not read yet
                chunk = file.read(max(CHUNK_BYTES, len(buffer) - start))
                at = f"{path}:{_first_line(buffer[start:], line)}"
                if not chunk:
                    raise UserError(
                        f"{at}: the array does not end after this; truncated, or a bracket is "
                        "missing"
                    )
                if len(buffer) - start > MAX_LINE_BYTES:
                    raise UserError(f"{at}: longer than {MAX_LINE_BYTES:,} bytes")
                buffer, position, start = buffer[start:] + chunk, position - start, 0
                continue
            position += 1
            if token[0] in (b"[", b"{"):
                depth += 1
            elif token[0] in (b"]", b"}"):
                depth -= 1
            if depth == 0 or (depth == 1 and token[0] == b","):
                element = buffer[start : position - 1]
                if element.strip():
                    yield _first_line(element, line), element.strip()
                line += element.count(b"\n")
                start = position
        _check_rest(path, line, buffer[position:], file)


def _end_of_string(buffer: bytes, start: int) -> int:
    """Where the quote is that ends the string whose first one is at `start`, or `len(buffer)`."""
    end = start
    while (end := buffer.find(b'"', end + 1)) >= 0:
        first = end
        while buffer[first - 1] == _BACKSLASH:
            first -= 1
        if (end - first) % 2 == 0:
            return end
    return len(buffer)


def _check_rest(path: Path, line: int, rest: bytes, file: BinaryIO) -> None:
    """Raise UserError if anything but blanks follows an array that ends on `line`."""
    while rest:
        if rest.strip():
            raise UserError(
                f"{path}:{_first_line(rest, line)}: more follows the end of the array; a file "
                "holds one array, or one object a line"
            )
        line += rest.count(b"\n")
        rest = file.read(CHUNK_BYTES)


def _first_line(part: bytes, line: int) -> int:
    """The line of the first character of a part that is not blank; the part begins on `line`."""
    return line + part.count(b"\n", 0, len(part) - len(part.lstrip()))


_LINES = FileFormat("JSON Lines", read=_read_lines)
_ARRAY = FileFormat("a JSON array", read=_read_array)

_CONVERT = "convert it to JSON Lines first, for example with to_json of the datasets library"
_UTF16 = FileFormat("text in UTF-16", "save it as UTF-8, for example with iconv")
_OBJECT = FileFormat(
    "a JSON object over several lines", "write one object a line, or an array of them"
)
_PLAIN = FileFormat("plain text, not JSON", 'write each document on one line, as {"text": "…"}')
_TABLE = FileFormat("a table (CSV or TSV)", _CONVERT)
_BINARY = FileFormat("binary data of an unknown kind", "JSON Lines in UTF-8 are needed")
# By their first bytes.
_OTHERS = {
    b"\x1f\x8b": FileFormat("compressed with gzip", "unpack it first: gunzip"),
    b"\x28\xb5\x2f\xfd": FileFormat("compressed with zstd", "unpack it first: unzstd"),
    b"\xfd7zXZ\0": FileFormat("compressed with xz", "unpack it first: unxz"),
    b"BZh": FileFormat("compressed with bzip2", "unpack it first: bunzip2"),
    b"7z\xbc\xaf\x27\x1c": FileFormat("a 7z archive", "unpack it first: 7z x"),
    b"PK\x03\x04": FileFormat("a zip archive", "unpack it first: unzip"),
    b"PAR1": FileFormat("a Parquet file", _CONVERT),
    b"ARROW1": FileFormat("an Arrow file", _CONVERT),
    b"version https://git-lfs.github.com/": FileFormat(
        "a Git LFS pointer, not the data itself", "fetch the data: git lfs pull"
    ),
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
    b"[\0": _UTF16,
    b"\0[": _UTF16,
    b"{\0": _UTF16,
    b"\0{": _UTF16,
}


def _detect_format(head: bytes) -> FileFormat:
    """What a file is, by its beginning."""
    for signature, file_format in _OTHERS.items():
        if head.startswith(signature):
            return file_format
    text = head.removeprefix(_BOM).lstrip()
    if re.match(rb'\[\s*[]\[{"]', text):
        return _ARRAY
    if re.match(rb"{(.*([{[]|[^}],))?[^\S\n]*\n", text):  # a first line that goes on
        return _OBJECT
    if not text or re.search(rb"^\s*{", text, re.MULTILINE):
        return _LINES
    if b"\0" in text:
        return _BINARY
    if re.match(rb"<!doctype html|<html", text, re.IGNORECASE):
        return FileFormat("an HTML page, perhaps an error or a login", "download the file itself")
    return _TABLE if _is_table(text.decode("utf-8", "replace")) else _PLAIN


def _is_table(text: str) -> bool:
    """Whether a text begins with a row of names and another one of as many cells."""
    for delimiter in ",\t":
        rows = list(islice(csv.reader(text.splitlines(keepends=True), delimiter=delimiter), 2))
        if len(rows) == 2 and 1 < len(rows[0]) == len(rows[1]):
            return all(re.fullmatch(r"\w[\w .-]*", name) for name in rows[0])
    return False
