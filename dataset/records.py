"""Read and check one line of a JSONL file.

A line that cannot be used raises `RecordError` with the reason alone; whoever reads the file knows
its name and the line's number, collects both in `BadLines`, and tells the user through `DataError`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHOWN_BAD_LINES = 10

_BOM = "\ufeff"
_ESCAPE_LENGTH = len("\\u0000")
_MAGIC = {
    b"\x1f\x8b": "compressed with gzip, not plain JSON lines; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd, not plain JSON lines; unpack it first",
    b"\xff\xfe": "encoded in UTF-16; save it as UTF-8",
}


class RecordError(ValueError):
    """Why one line cannot be used: a short reason, without file name and line number."""


class DataError(Exception):
    """Something about the data that the user can fix.

    `str()` of it is what a stage script prints on stderr before it ends with status 2: one line, or
    one line for each of the first bad lines and one for their total.
    """


@dataclass
class BadLines:
    """The number of bad lines of a file, and the first ten of them as (line number, reason)."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line_number: int, reason: str) -> None:
        """Note one bad line; line numbers start at 1."""
        self.count += 1
        if len(self.first) < SHOWN_BAD_LINES:
            self.first.append((line_number, reason))

    def report(self, path: Path) -> str:
        """`file:line: reason` for each of the first ten, then the total and the way out."""
        lines = [f"{path}:{number}: {reason}" for number, reason in self.first]
        total = "1 bad line" if self.count == 1 else f"{self.count:,} bad lines"
        return "\n".join([*lines, f"{path}: {total}; --skip_bad_lines goes on without"])


def check_file(path: Path) -> None:
    """Raise DataError for a file that is missing, not a file, empty, or not plain text at all."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a JSONL file")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not head:
        raise DataError(f"{path}: is empty")
    for magic, reason in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{path}:1: {reason}")


def parse_text(line: bytes) -> str:
    """The text of one `{"text": "…"}` line. Raises RecordError."""
    record = _parse_object(line)
    if "text" not in record:
        raise RecordError('"text" is missing')
    return _check_text(record["text"], '"text"')


def _check_text(value: Any, name: str) -> str:
    """`value` if it is a string with something in it that UTF-8 can hold."""
    if not isinstance(value, str):
        raise RecordError(f"{name} is {_json_type(value)}, not a string")
    if not value:
        raise RecordError(f"{name} is empty")
    if value.isspace():
        raise RecordError(f"{name} is blank")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code, at = ord(value[error.start]), error.start + 1
        raise RecordError(
            f"{name} holds a lone surrogate, \\u{code:04x}, at character {at}"
        ) from None
    return value


def _parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object on a line; its line end, and a byte order mark before it, are left out."""
    try:
        text = line.rstrip(b"\r\n").decode("utf-8").removeprefix(_BOM)
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            raise RecordError("cut off in the middle of a character; truncated?") from None
        raise RecordError(f"invalid UTF-8 at byte {error.start + 1}") from None
    if not text.strip():
        raise RecordError("blank line")
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        if _is_cut_off(text, error):
            raise RecordError(f"JSON ends too early, at column {len(text)}; truncated?") from None
        what = error.msg.removesuffix(" at")
        raise RecordError(f"broken JSON: {what} at column {error.colno}") from None
    except RecursionError:
        raise RecordError("broken JSON: nested too deeply") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise RecordError("broken JSON: a number of several thousand digits") from None
    if not isinstance(record, dict):
        raise RecordError(f"{_json_type(record)}, not a JSON object")
    return record


def _is_cut_off(text: str, error: json.JSONDecodeError) -> bool:
    """Whether more characters could have made the text valid."""
    if error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()):
        return True
    escape = text[error.pos :]
    return error.msg.startswith("Invalid \\uXXXX escape") and len(escape) < _ESCAPE_LENGTH


def _json_type(value: Any) -> str:
    """What JSON calls the type of a parsed value."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "a number")
