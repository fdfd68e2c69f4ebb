"""Write the tables of flags in docs/ from the scripts' own parsers.

    python scripts/flag_tables.py

A table stands between `<!-- flags: train_pretrain.py -->` and `<!-- end of flags -->`. With
`<!-- flags: train_dpo.py beyond train_pretrain.py -->` it holds only the flags that the second
script lacks or has another default for.
"""

import argparse
import re
import runpy
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from common import ROOT, BooleanFlag, make_parser

MARKERS = re.compile(
    r"(<!-- flags: (\S+?)(?: beyond (\S+))? -->\n).*?(<!-- end of flags -->)", re.DOTALL
)
HEADS = {"en": "| flag | default | meaning |", "zh": "| 参数 | 默认值 | 含义 |"}


@cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser of a script, which runs up to where it would read the command line."""
    found: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        found.append(parser)
        sys.exit()

    path = ROOT / script
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        suppress(SystemExit),
    ):
        runpy.run_path(str(path), run_name="__main__")
    return found[0]


def default_text(value: Any) -> str:
    """A flag's default as a table shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        short = f"{value:g}" if not 0 < value < 0.01 else f"{value:e}"
        return re.sub(r"\.?0*e-0", "e-", short)  # 5e-4 instead of 0.0005
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, Path):
        return str(value.relative_to(ROOT) if value.is_relative_to(ROOT) else value)
    return "–" if value is None else str(value)


def flag_row(action: argparse.Action) -> str:
    """A line of a table. A default that the help text describes is shown as the default."""
    is_on = isinstance(action, BooleanFlag) and action.default
    names = action.option_strings if is_on else action.option_strings[:1]
    meaning = (action.help or "").replace("%%", "%")
    default = "required" if action.required else default_text(action.default)
    if found := re.fullmatch(r"(.*?)[;, ]*\(?\bdefault: ([^()]*)\)?", meaning):
        meaning, default = found.groups()
    choices = ", ".join(map(str, action.choices or ()))
    if choices != default:
        meaning = "; ".join(filter(None, [meaning, choices]))
    flags = ", ".join(f"`{name}`" for name in names)
    return f"| {flags} | {default} | {meaning} |".replace("|  |", "| |")


def shown_flags(actions: list[argparse.Action]) -> list[argparse.Action]:
    """The flags among a parser's actions that its help shows, without --help."""
    return [
        action
        for action in actions
        if action.option_strings and action.help != argparse.SUPPRESS and action.dest != "help"
    ]


def flag_table(script: str, beyond: str | None, head: str) -> str:
    """A table of a script's flags by group, or of those that differ from another script's."""
    other = shown_flags(parser_of(beyond)._actions) if beyond else []
    known = {action.dest: action.default for action in other}
    lines = [head, "|---|---|---|"]
    for group in parser_of(script)._action_groups:
        rows = [
            flag_row(action)
            for action in shown_flags(group._group_actions)
            if action.dest not in known or action.default != known[action.dest]
        ]
        if rows and group.title != "options":
            lines.append(f"| **{group.title}** | | |")
        lines += rows
    return "\n".join(lines) + "\n"


def fill_tables(path: Path) -> str:
    """The text of a Markdown file with its tables of flags as the parsers are now."""
    head = HEADS["zh" if path.stem.endswith("_zh") else "en"]

    def fill(found: re.Match) -> str:
        start, script, beyond, end = found.groups()
        return start + flag_table(script, beyond, head) + end

    return MARKERS.sub(fill, path.read_text(encoding="utf-8"))


def main() -> None:
    """Rewrite the files whose tables are out of date."""
    make_parser("Write the tables of flags in docs/ from the scripts' parsers.").parse_args()
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = fill_tables(path)
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
