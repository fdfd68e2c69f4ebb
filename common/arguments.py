"""Parsers of command lines, and the types that flags have."""

import argparse
import difflib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import exit_with

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "model" / "minimind_tokenizer"  # the one that ships with the project
FEW_BAD_LINES = 0.1  # the share that --skip_bad_lines allows without a number


class BooleanFlag(argparse.Action):
    """A switch in every form users write: `--x`, `--no-x`, `--x True`, `--x false`."""

    WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        negations = [f"--no-{name.removeprefix('--')}" for name in option_strings]
        super().__init__([*option_strings, *negations], dest, nargs="?", **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Set the switch."""
        negated = option_string.startswith("--no-")
        if values is None:
            value = True
        elif not negated and values.lower() in self.WORDS:
            value = self.WORDS[values.lower()]
        else:
            takes = "no value" if negated else "true or false"
            parser.error(f"argument {option_string}: takes {takes}, not {values!r}")
        setattr(namespace, self.dest, value != negated)

    def format_usage(self) -> str:
        """The spelling shown in the help text."""
        return " | ".join(self.option_strings)


class StageParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and which suggests the flag that was meant."""

    def error(self, message: str) -> NoReturn:
        """Report the message, without the usage text, and leave with exit status 2."""
        exit_with(message)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse; an unknown flag is an error that names the nearest known one."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
            self.error(f"unknown argument {unknown[0]}" + (f"; {near[0]}?" if near else ""))
        return parsed


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each flag's default, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def make_parser(description: str) -> StageParser:
    """A parser that shows defaults and takes flags by their whole names only."""
    return StageParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def number(
    kind: type, low: float, high: float = float("inf"), open_low: bool = False
) -> Callable[[str], Any]:
    """An argparse type for numbers within bounds."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if not low <= value <= high or value == float("inf") or (open_low and value == low):
            bounds = f"{'above' if open_low else 'at least'} {low:g}"
            bounds += "" if high == float("inf") else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return value

    return parse


seed = number(int, 0, 2**63 - 1)
positive_int = number(int, 1)
non_negative_int = number(int, 0)
port = number(int, 0, 65535)  # 0: any that is free
positive_float = number(float, 0, open_low=True)
non_negative_float = number(float, 0)
half_open_unit_interval = number(float, 0, 0.999999)
positive_unit_interval = number(float, 0, 1, open_low=True)
unit_interval = number(float, 0, 1)
open_unit_interval = number(float, 0, 0.999999, open_low=True)


def add_skip_bad_lines(parser: argparse._ActionsContainer) -> None:
    """Add `--skip_bad_lines [SHARE]`: the share of bad lines of a file that may be left out."""
    parser.add_argument(
        "--skip_bad_lines",
        type=unit_interval,
        nargs="?",
        const=FEW_BAD_LINES,
        default=0.0,
        metavar="SHARE",
        help="leave out lines that have errors, if at most this share has; "
        f"{FEW_BAD_LINES} if no number",
    )


def add_text_columns(parser: argparse._ActionsContainer) -> None:
    """Add the flags that say what the texts of records are."""
    add = parser.add_argument
    add("--text_column", help='field of the text; default: "text", or "content"')
    template = r"text made of fields in braces, such as '{title}\n\n{text}'"
    add("--text_template", type=escaped, help=template)
    between = (
        "what stands between documents of plain text, or blank for blank lines; default: a file "
        "is one document, or several if it is long"
    )
    add("--separator", type=escaped, help=between)


def add_parse_think(parser: argparse._ActionsContainer) -> None:
    """Add `--parse_think`: whether a thought in an answer's text is reasoning."""
    thought = "read <think>…</think> at the beginning of an answer as reasoning"
    parser.add_argument("--parse_think", action=BooleanFlag, default=False, help=thought)


def add_empty_think_ratio(parser: argparse._ActionsContainer) -> None:
    """Add `--empty_think_ratio`: in which conversations answers begin with an empty thought."""
    parser.add_argument(
        "--empty_think_ratio",
        type=unit_interval,
        default=0.0,
        metavar="SHARE",
        help="in this share of the conversations, answers without reasoning follow an empty "
        "thought, as they do where a prompt turns thinking off",
    )


def add_tokenizer_path(
    parser: argparse._ActionsContainer, default: Path | None = TOKENIZER
) -> None:
    """Add `--tokenizer_path FOLDER`; its default may be None, for that of the weights."""
    meaning = "folder of the tokenizer"
    if default is None:
        meaning += "; default: that of the weights, if it is near them, else the shipped one"
    parser.add_argument("--tokenizer_path", type=user_path, default=default, help=meaning)


# An argparse type: a name, or a path with `~` expanded; `~NAME` of no user stays as it is.
name_or_path = os.path.expanduser


def user_path(text: str) -> Path:
    """An argparse type: a path, its `~` expanded, which shells leave as it is in `--flag=~/x`."""
    return Path(name_or_path(text))


def prompts(text: str) -> list[str]:
    """An argparse type: a prompt, or a file with one on each line, empty lines aside."""
    path = user_path(text)
    try:
        is_file = path.is_file()
    except OSError:  # the text is longer than any name
        is_file = False
    if is_file:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{path}: {error}") from None
        found = [line for line in lines if line.strip()]
    elif path.suffix in (".txt", ".jsonl", ".json") and not set(text) & set(" \n"):
        raise argparse.ArgumentTypeError(f"{path}: no such file")
    else:
        found = [text] if text.strip() else []
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: no prompt")
    return found


def escaped(text: str) -> str:
    """An argparse type: a text that is not empty, in which `\\n` and `\\t` are as in JSON."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text.replace(r"\n", "\n").replace(r"\t", "\t")


def named_path(text: str) -> tuple[str, Path]:
    """An argparse type: `name=path`, or a path alone, whose name is that of its file."""
    name, equals, path = text.partition("=")
    whole = user_path(text)
    if equals and name and path and not {"/", "\\"} & set(name) and not whole.exists():
        return name, user_path(path)
    return whole.stem, whole


def weighted_path(text: str) -> tuple[Path, float | None]:
    """An argparse type: `path=weight`, or a path alone, also one whose name has a `=`."""
    path, equals, weight = text.rpartition("=")
    whole = user_path(text)
    if not (equals and path) or whole.exists():
        return whole, None
    try:
        value = float(weight)
    except ValueError:
        return whole, None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: a weight is at least 0")
    return user_path(path), value


def is_run_name(text: str) -> bool:
    """Whether `text` can end the names of a run's files and be told from all other such ends."""
    other = r"\d+|moe|best|resume|step\d+"  # as in full_sft_512_moe_best.pth
    return bool(re.fullmatch(r"[^\W_]([^\W_]|-)*", text) and not re.fullmatch(other, text.lower()))


def run_name(text: str) -> str:
    """An argparse type: a name for a run, see `is_run_name`."""
    if not is_run_name(text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: letters, digits and - only, not just digits, and none of moe, best, "
            "resume, stepN, which names of files end in for other reasons"
        )
    return text
