"""JSON values of a record, each checked: one that cannot be used raises RecordError."""

import json
from typing import Any

MAX_LINE_BYTES = 1 << 30

_JSON_NAMES = {bool: "a boolean", str: "a string", list: "an array", dict: "an object"}


class RecordError(ValueError):
    """Why one line cannot be used: a short reason, without file name and line number."""


def parse_object(line: bytes | dict[str, Any] | RecordError) -> dict[str, Any]:
    """The fields of a record of `read_records`.

    Of JSON, the line end and a byte order mark before it are left out. Raises RecordError.
    """
    if isinstance(line, RecordError):
        raise line
    if isinstance(line, dict):
        return line
    if len(line) > MAX_LINE_BYTES:
        raise RecordError(f"longer than {MAX_LINE_BYTES:,} bytes")
    try:
        text = line.rstrip(b"\r\n").decode("utf-8").removeprefix("\ufeff")
        record = _load(text)
    except json.JSONDecodeError as error:
        if _is_cut_off(text, error):
            raise RecordError(f"JSON ends too early, at column {len(text)}; truncated?") from None
        what = error.msg.removesuffix(" at")
        where = f"line {error.lineno} of the record, " if error.lineno > 1 else ""
        raise RecordError(f"broken JSON: {what} at {where}column {error.colno}") from None
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            raise RecordError("cut off in the middle of a character; truncated?") from None
        raise RecordError(explain_encoding(line)) from None
    except (RecursionError, ValueError) as error:
        raise RecordError(f"broken JSON: {error}") from None
    return expect(record, dict, "the record")


def explain_encoding(content: bytes) -> str:
    """Why bytes are no UTF-8, and how a file of the encoding that they may have is converted."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = error.start + 1
    encoding = "GB18030"
    try:
        content.decode(encoding)
    except UnicodeDecodeError:
        encoding = "LATIN1"
    convert = f"iconv -f {encoding} -t UTF-8"
    return f"invalid UTF-8 at byte {place}; if the file is {encoding}: {convert}"


def _load(text: str) -> Any:
    """What JSON means. Raises ValueError, also for half a surrogate pair; or RecursionError."""
    value = json.loads(text)
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _is_cut_off(text: str, error: json.JSONDecodeError) -> bool:
    """Whether more characters could have made the text valid."""
    if error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()):
        return True
    return error.msg.startswith("Invalid \\uXXXX escape") and len(text) - error.pos < len("\\u0000")


def expect(value: Any, kind: type, name: str) -> Any:
    """`value` if it is of that kind: dict, list or str. Raises RecordError."""
    if not isinstance(value, kind):
        found = "null" if value is None else _JSON_NAMES.get(type(value), "a number")
        raise RecordError(f"{name} is {found}, not {_JSON_NAMES[kind]}")
    return value


def check_text(value: Any, name: str) -> str:
    """`value` if it is a string with something in it."""
    if not expect(value, str, name).strip():
        raise RecordError(f"{name} is {'blank' if value else 'empty'}")
    return value


def parse_json(text: str, name: str) -> Any:
    """What the JSON in a string means."""
    try:
        return _load(text)
    except (ValueError, RecursionError):
        raise RecordError(f"{name} is not the JSON that it should be") from None


def parse_array(value: Any, name: str) -> list[Any]:
    """An array or the JSON of one, where it is given."""
    if isinstance(value, str):
        value = parse_json(value, name) if value.strip() else None
    return expect(value or [], list, name)


def parse_flag(value: Any, name: str) -> bool | None:
    """A flag that may be absent or null."""
    if value is not None and value not in (0, 1):
        raise RecordError(f"{name} is neither true or 1 nor false or 0")
    return None if value is None else bool(value)
