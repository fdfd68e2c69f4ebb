"""Find the records of a file, a folder or a data set: what each file is, and where they begin."""

import csv
import glob
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from common import Text, UserError

from .columns import (
    check_columns,
    hub_name,
    is_on_hub,
    read_arrow,
    read_hub,
    read_parquet,
    saved_files,
)
from .fields import MAX_LINE_BYTES, RecordError, explain_encoding
from .streams import CHUNK_BYTES, DAMAGED, SUFFIXES, open_stream

HEAD_BYTES = 1 << 16  # that the format of a file is detected from
LONG_TEXT = 1 << 14  # bytes of a .txt or .md file from which on it is split into documents
DOCUMENT_BYTES = 1 << 11  # at least, of each: about a row of 512 tokens
LONGEST_TOKEN = 12  # characters of an escaped surrogate pair, the longest that JSON has
DOCUMENT_CHARS = 1 << 20  # of any other text; a longer one is cut
BLANK = "blank"  # the separator that stands for blank lines


class Place(NamedTuple):
    """Where a record is: see `locate`."""

    file: str  # its path in a folder; empty where the source is a file
    line: int  # that it begins on, from 1; of a file without lines, its number


# A record is the JSON of one, or its fields, or the reason why it is none.
Record = bytes | dict[str, Any] | RecordError
Read = Callable[[Path, str | None], Iterator[tuple[int, Record]]]


def locate(source: Path, place: Place) -> str:
    """`file:line` of a record of a source."""
    if is_on_hub(source):
        return f"{hub_name(source)}:{place.line}"
    return f"{_base(source) / place.file}:{place.line}"


def read_records(source: Path, separator: str | None = None) -> Iterator[tuple[Place, Record]]:
    """The records of a source in order, each with its place.

    A source is a file, a folder or a pattern of files, a folder that `Dataset.save_to_disk` wrote,
    or a data set on a hub (`hf://NAME`). Files are, compressed or not, JSON Lines, a JSON array,
    Parquet, Arrow, CSV or TSV, or else text, whose records have a "text". `separator` stands
    between documents of text, `BLANK` for blank lines; without one, a .txt or .md file is split as
    `_read_paragraphs` does it, and any other is one document, or several of DOCUMENT_CHARS if it is
    longer.

    Memory does not grow with a file: of a line beyond MAX_LINE_BYTES comes only as much as shows
    that it is too long. Raises UserError as `check_source`; also if a file is cut off or broken,
    such that it is unclear where its next record begins.
    """
    if is_on_hub(source):
        yield from ((Place("", number), row) for number, row in read_hub(source))
        return
    base = _base(source)
    for file in find_files(source):
        name = "" if file == base else file.relative_to(base).as_posix()
        try:
            read = _find_reader(file)
        except UserError as error:
            if not name:
                raise
            if file.stat().st_size:
                yield Place(name, 1), RecordError(str(error).removeprefix(f"{file}: "))
            continue
        try:
            for line, record in read(file, separator):
                yield Place(name, line), record
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
        except DAMAGED as error:
            raise UserError(f"{file}: damaged or cut off ({error})") from None


def check_source(source: Path) -> None:
    """Raise UserError if a source is missing or empty, or a file of a format that is not known.

    Files of a folder are not looked into: one that cannot be read has a bad record.
    """
    if not is_on_hub(source) and find_files(source) == [source]:
        _find_reader(source)


def find_files(source: Path) -> list[Path]:
    """The files of a source, in order. UserError if there are none.

    Hidden files, token stores, and those that describe a folder (README, LICENSE) are no data.
    """
    if source.is_file():
        return [source]
    if source.is_dir():
        files = saved_files(source) or [
            file for file in source.rglob("*") if _is_data(file, source)
        ]
    elif source == _base(source):
        raise UserError(f"{source}: no such file")
    else:
        base = _base(source)
        found = base.glob(str(source.relative_to(base)))
        files = [file for file in found if _is_data(file, base)]
    if not files:
        raise UserError(f"{source}: no files in this folder, or of this pattern")
    return sorted(files)


def _base(source: Path) -> Path:
    """What names in a source are relative to: for a pattern, the folder before its first `*`."""
    parts = source.parts
    if source.exists() or not glob.has_magic(str(source)):
        return source
    return Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])


def _is_data(file: Path, folder: Path) -> bool:
    parts = file.relative_to(folder).parts
    if any(part.startswith(".") or part.endswith(".tokens") for part in parts):
        return False
    described = re.match(r"(README|LICENSE)(\.|$)", file.name)
    return file.is_file() and not described and file.suffix not in (".lock", ".version", ".tmp")


def _find_reader(path: Path) -> Read:
    """What reads the records of a file, by its format. UserError names one that is not known."""
    try:
        with path.open("rb") as file:
            start = file.read(6)
        if start.startswith(b"PAR1"):
            return lambda path, separator: read_parquet(path)
        if start == b"ARROW1" or start[:4] == b"\xff" * 4:
            return lambda path, separator: read_arrow(path)
        with open_stream(path) as stream:
            head = stream.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except DAMAGED as error:
        raise UserError(f"{path}: damaged or cut off ({error})") from None
    if not head:
        raise UserError(f"{path}: is empty")
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    suffix = next((s for s in reversed(path.suffixes) if s not in SUFFIXES), "").lower()
    formats = (*_FOREIGN, *_NAMED.get(suffix, _OTHERS))
    if suffix in (".html", ".htm"):
        formats = _OTHERS  # wanted as it is
    _, name, outcome = next(f for f in formats if re.match(f[0], head, re.DOTALL))
    if isinstance(outcome, str):
        raise UserError(f"{path}: is {name}; {outcome}")
    return outcome


def _read_lines(path: Path, separator: str | None) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, each with its line end."""
    number = 0
    with open_stream(path) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if line.strip():
                yield number, line
            while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES + 1)


def _open_text(path: Path, newline: str | None) -> io.TextIOWrapper:
    """A file as text; bytes that are none become half surrogate pairs."""
    errors = "surrogateescape"
    return io.TextIOWrapper(open_stream(path), encoding="utf-8-sig", errors=errors, newline=newline)


def _read_array(path: Path, separator: str | None) -> Iterator[tuple[int, bytes]]:
    """The elements of a JSON array, as they stand there."""
    decode = json.JSONDecoder().raw_decode
    blanks = re.compile(r"[ \t\r\n]*")
    with _open_text(path, "") as file:
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


def _read_table(path: Path, separator: str | None) -> Iterator[tuple[int, Record]]:
    """The rows of a CSV or TSV file, blank ones aside, by the names in the first; all strings."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with _open_text(path, "") as file:
        blank = 0
        while (head := file.readline()).isspace():
            blank += 1
        delimiter = max(",\t;", key=head.count)
        rows = csv.reader(chain([head], file), delimiter=delimiter)
        line = blank + 1
        try:
            names = next(rows)
            check_columns(names, f"{path}:{line}")
            line = blank + rows.line_num + 1
            for row in rows:
                if row:
                    yield line, _as_record(names, row)
                line = blank + rows.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{line}: the table is broken ({error})") from None


def _as_record(names: list[str], row: list[str]) -> Record:
    if len(row) != len(names):
        return RecordError(f"{len(row)} columns, not {len(names)} as the first line has")
    return _checked(dict(zip(names, row, strict=True)))


def _checked(record: dict[str, str]) -> Record:
    """A record, unless its file is in another encoding."""
    try:
        "".join(record.values()).encode("utf-8")
    except UnicodeEncodeError:
        content = "".join(record.values()).encode("utf-8", "surrogateescape")
        return RecordError(explain_encoding(content))
    return record


def _read_prose(path: Path, separator: str | None) -> Iterator[tuple[int, Record]]:
    """The documents of a .txt or .md file."""
    return _read_text(path, separator) if separator else _read_paragraphs(path)


def _read_paragraphs(path: Path) -> Iterator[tuple[int, Record]]:
    """The documents of a text that is split by its length.

    A file of up to LONG_TEXT bytes is one. A longer one is split at the first blank line after
    DOCUMENT_BYTES; where there is none for LONG_TEXT, at the end of a line.
    """
    is_long = _is_long(path)
    document, size, first, number = [], 0, 1, 0

    def record() -> tuple[int, Record]:
        return first, _checked({"text": "".join(document).strip("\n")})

    with _open_text(path, None) as file:
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


def _is_long(path: Path) -> bool:
    with open_stream(path) as file:
        return len(file.read(LONG_TEXT + 1)) > LONG_TEXT


def text_note(source: Path, separator: str | None = None) -> Text | None:
    """What a .txt or .md file was taken as, for the user; None for another source."""
    if not source.is_file() or _find_reader(source) is not _read_prose:
        return None
    if separator:
        return Text("plain text, split at --separator")
    if not _is_long(source):
        return Text("plain text, taken as one document")
    return Text(
        "plain text, split at blank lines into documents of {size:,} bytes or more",
        size=DOCUMENT_BYTES,
    )


def _read_text(path: Path, separator: str | None) -> Iterator[tuple[int, Record]]:
    """The documents of a file of text, without the blank lines around each."""
    pattern = re.compile(r"\n(?:[^\S\n]*\n)+" if separator == BLANK else re.escape(separator or ""))
    line, rest = 1, ""  # line of the beginning of `rest`
    with _open_text(path, None) as file:
        chunk = "…"
        while chunk:
            chunk = file.read(CHUNK_BYTES)
            rest, start = rest + chunk, 0
            for begin, end in _cuts(rest, pattern if separator else None, is_end=not chunk):
                text = rest[start:begin]
                if text.strip():
                    blank = len(text) - len(text.lstrip("\n"))
                    yield line + blank, _checked({"text": text.strip("\n")})
                line, start = line + rest.count("\n", start, end), end
            rest = rest[start:]


def _cuts(text: str, separator: re.Pattern[str] | None, is_end: bool) -> Iterator[tuple[int, int]]:
    """The ends of documents in a text, and where what follows begins."""
    start = 0
    separators = separator.finditer(text) if separator else ()
    ends: Iterable[tuple[int, int]] = (match.span() for match in separators)
    for begin, end in chain(ends, [(len(text), len(text))]):
        while begin - start > DOCUMENT_CHARS:
            limit = start + DOCUMENT_CHARS
            cut = max(text.rfind("\n\n", start, limit), start)
            if cut == start:
                cut = max(text.rfind("\n", start, limit), start)
            start = cut if cut > start else limit
            yield start, start
        if end < len(text) or is_end:
            yield begin, end
            start = end


_LINES = "write one object a line, or an array of them"
# Beginnings of files, what they are, what reads them or what to do: the first that matches counts.
_FOREIGN = (
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first: 7z x"),
    (rb"PK\x03\x04", "a zip archive", "unpack it first: unzip"),
    (
        rb"version https://git-lfs.github.com/",
        "a Git LFS pointer, not the data itself",
        "fetch the data: git lfs pull",
    ),
    (
        rb"[\[{]\0|\0[\[{]",
        "text in UTF-16 without a byte order mark",
        "save it as UTF-8: iconv -f UTF-16LE -t UTF-8, or UTF-16BE",
    ),
    (
        rb"(?i:<!doctype html|<html)",
        "an HTML page, perhaps an error or a login",
        "download the file itself",
    ),
)
_BINARY = (
    rb".*\0",
    "binary data of an unknown kind",
    "docs/data.md names the kinds that are known",
)
_JSON = (
    (rb'\[\s*[]\[{"]', "a JSON array", _read_array),
    (
        rb"{([^\n]*([{[]|[^}\n],))?[^\S\n]*\n",  # a first line that goes on
        "a JSON object over several lines",
        _LINES,
    ),
    (rb"$|{|.*\n\s*{", "JSON Lines", _read_lines),
    _BINARY,
    (rb"\w[\w .-]*([,\t]\w[\w .-]*)+\r?\n", "a table (CSV or TSV)", "name it .csv or .tsv"),
    (rb"", "plain text, not JSON", "name it .txt"),
)
_TABLE = (_BINARY, (rb"", "a table", _read_table))
_RECORDS = (
    (rb'\[\s*{\s*"', "a JSON array", _read_array),
    (rb'{\s*"[^\n]*}[^\S\n]*(\n|$)', "JSON Lines", _read_lines),
    _BINARY,
)
_OTHERS = (*_RECORDS, (rb"", "text", _read_text))
_PROSE = (*_RECORDS, (rb"", "text", _read_prose))
_NAMED = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), _JSON),
    **dict.fromkeys((".csv", ".tsv"), _TABLE),
    **dict.fromkeys((".txt", ".md"), _PROSE),
}
