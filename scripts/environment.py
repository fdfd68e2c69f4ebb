"""The virtual environment of a fresh clone, and the commands that run in it.

It imports nothing but the standard library, so that it runs before anything is installed.
"""

from __future__ import annotations  # an old Python must get as far as `require_python`

import hashlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = "constraints.txt"


def fail(message: str) -> NoReturn:
    """Print one line on stderr and exit with status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def user_path(text: str) -> Path:
    """`common.user_path`, where nothing is installed yet."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  `~NAME` of no user stays as it is


def require_python() -> None:
    """Exit with status 2 if Python is older than 3.10."""
    if sys.version_info < (3, 10):  # noqa: UP036  this line is for older ones
        fail(f"needs Python 3.10 or newer, this is {sys.version.split()[0]}")


def run(*command: str | Path) -> int:
    """Run a command in the project root with its output shown, and return its exit status.

    Ctrl-C reaches the command as well, SIGTERM is passed on to it; it may save first. Raises
    KeyboardInterrupt if Ctrl-C ended it.
    """
    environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    interrupted = False
    while process.returncode is None:
        try:
            process.wait()
        except KeyboardInterrupt:
            interrupted = True
    signal.signal(signal.SIGTERM, before)
    if interrupted and process.returncode:
        raise KeyboardInterrupt
    # As shells do: an exit status cannot be negative, so signal N is 128 + N.
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def step(title: str, python: Path, script: str, *words: str | Path) -> None:
    """Run a script of the project, its command printed; exit with its status if that is not 0."""
    command = [script, *map(short, words)]
    print(f"\n== {title}\n$ {shell_line(python, *command)}", flush=True)
    if status := run(python, *command):
        name = Path(sys.argv[0]).name
        print(f"{name}: stopped in “{title}”; run it again to go on", file=sys.stderr)
        sys.exit(status)


def shell_line(*words: str | Path) -> str:
    """A command as it is typed into a shell."""
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join(map(short, words))


def short(word: str | Path) -> str:
    """A word of a command; a path within the project is relative to its root."""
    path = Path(word)
    if path.is_absolute() and path.is_relative_to(ROOT):
        return path.relative_to(ROOT).as_posix()
    return str(word)


def interpreter_version(python: Path) -> str | None:
    """The full version of an interpreter, or None if it does not run or is too old."""
    code = "import sys; print(sys.version); sys.exit(sys.version_info < (3, 10))"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        return None


def interpreter(venv: Path) -> tuple[Path, str]:
    """The interpreter of a virtual environment and its version; made if there is none that runs.

    A broken environment is replaced, anything else in its place is left alone.
    """
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if version := interpreter_version(python):
        return python, version
    if not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):
        fail("this Python lacks the venv module (Debian, Ubuntu: apt install python3-venv)")
    if venv.exists() and not (venv / "pyvenv.cfg").is_file():
        fail(f"{venv} is in the way and is no virtual environment: move or delete it")
    if run(sys.executable, "-m", "venv", "--clear", venv):
        fail(f"cannot make {venv}")
    version = interpreter_version(python)
    return python, version or fail(f"{python} does not run: delete {venv} and try again")


def install(python: Path, requirements: Sequence[str], *options: str) -> None:
    """Install the files of requirements with pip, and pip itself if the environment lacks it."""
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode:
        run(python, "-m", "ensurepip", "--upgrade")
    files = [argument for name in requirements for argument in ("-r", name)]
    if run(python, "-m", "pip", "install", "--disable-pip-version-check", *files, *options):
        fail(f"installing failed (if {python.parent.parent} is damaged, delete it and try again)")


def prepare(requirements: Sequence[str], stamp: str) -> Path:
    """Make or complete `.venv`, whose file `stamp` records what is installed: its interpreter."""
    venv = ROOT / ".venv"
    python, version = interpreter(venv)
    digest, recorded = hashlib.sha256(version.encode("utf-8")), venv / stamp
    for name in [*requirements, CONSTRAINTS]:
        digest.update(name.encode("utf-8") + b"\0" + (ROOT / name).read_bytes() + b"\0")
    installed = digest.hexdigest()
    if not recorded.is_file() or recorded.read_text(encoding="utf-8") != installed:
        install(python, requirements, "-c", CONSTRAINTS)
        recorded.write_text(installed, encoding="utf-8")
    return python


def prepare_newest(requirements: Sequence[str]) -> Path:
    """Bring `.venv-newest` to the newest versions that are allowed, and return its interpreter.

    torch stays as in constraints.txt: its releases differ in the hardware that they run on.
    """
    python, _ = interpreter(ROOT / ".venv-newest")
    pins = (ROOT / CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    torch = [line for line in pins if line.startswith("torch==")]
    print("installing the newest versions", flush=True)
    install(python, requirements, *torch, "--upgrade", "--upgrade-strategy", "eager", "--quiet")
    run(python, "-m", "pip", "freeze")
    return python
