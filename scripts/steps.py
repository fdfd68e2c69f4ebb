"""Steps of a script that runs other scripts, each shown as a command that could be typed as well.

It imports nothing but the standard library, as `environment`.
"""

from __future__ import annotations  # an old Python must get as far as `require_python`

import os
import shlex
import subprocess
import sys
from itertools import islice
from pathlib import Path

from environment import ROOT, run


def step(title: str, python: Path, script: str, *words: str | Path) -> None:
    """Run a script of the project as a step of its own; exit with its status if that is not 0."""
    command = [script, *map(short, words)]
    print(f"\n== {title}\n$ {typed(python, *command)}", flush=True)
    status = run(python, *command)
    if status:
        name = Path(sys.argv[0]).name
        print(f"{name}: stopped in “{title}”; run it again to go on", file=sys.stderr)
        sys.exit(status)


def copy_beginning(source: Path, target: Path, lines: int) -> None:
    """Write the first lines of a file to another one, unless it holds just these."""
    with source.open(encoding="utf-8", newline="") as file:
        beginning = "".join(islice(file, lines))
    if not target.is_file() or target.read_bytes() != beginning.encode("utf-8"):
        target.write_text(beginning, encoding="utf-8", newline="")


def typed(*words: str | Path) -> str:
    """The words as a shell takes them."""
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join(map(short, words))


def short(word: str | Path) -> str:
    """A word of a command; paths within the project are told from its root."""
    path = Path(word)
    if path.is_absolute() and path.is_relative_to(ROOT):
        return path.relative_to(ROOT).as_posix()
    return str(word)
