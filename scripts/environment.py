"""The virtual environment that the scripts make for whoever has nothing but Python.

It imports nothing but the standard library, so that it runs before anything is installed.
"""

from __future__ import annotations  # an old Python must get as far as `require_python`

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CONSTRAINTS = "constraints.txt"


def fail(message: str) -> NoReturn:
    """Print one line on stderr and exit with status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def user_path(text: str) -> Path:
    """Return a path, its `~` expanded: `training.user_path`, where nothing is installed yet."""
    with suppress(RuntimeError):
        return Path(text).expanduser()
    return Path(text)


def require_python() -> None:
    """Exit with status 2 where Python is older than 3.10."""
    if sys.version_info < (3, 10):  # noqa: UP036  an older one is just what this line is for
        fail(f"needs Python 3.10 or newer, this is {sys.version.split()[0]}")


def run(*command: str | Path) -> int:
    """Run a command in the project root, its output shown as it comes; return its exit status.

    Ctrl-C reaches the command as well, SIGTERM is passed on to it, and what it does about them, as
    saving first, is waited for.

    Raises KeyboardInterrupt if Ctrl-C ended it.
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
    # A signal's number as shells tell it, since an exit status is not negative.
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def interpreter_version(python: Path) -> str | None:
    """Return the full version of an interpreter, or None where it does not run or is too old."""
    code = "import sys; print(sys.version); sys.exit(sys.version_info < (3, 10))"
    try:
        result = subprocess.run([python, "-c", code], capture_output=True)
    except OSError:
        return None
    return result.stdout.decode("utf-8") if result.returncode == 0 else None


def interpreter(venv: Path) -> tuple[Path, str]:
    """The interpreter of a virtual environment, made where there is none that runs; its version."""
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if interpreter_version(python) is None:
        make_venv(venv)
    version = interpreter_version(python)
    if version is None:
        fail(f"{python} does not run: delete {venv} and try again")
    return python, version


def make_venv(venv: Path) -> None:
    """Make a virtual environment, over a broken one if need be, but never over anything else."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        fail("this Python lacks the venv module (Debian, Ubuntu: apt install python3-venv)")
    is_venv = (venv / "pyvenv.cfg").is_file()
    if venv.exists() and not is_venv and not (venv.is_dir() and not any(venv.iterdir())):
        fail(f"{venv} is in the way and is no virtual environment: move or delete it")
    if run(sys.executable, "-m", "venv", "--clear", venv):
        fail(f"cannot make {venv}")


def requirements_digest(requirements: Sequence[str], version: str) -> str:
    """Hash what decides which packages are installed: the files' contents and the interpreter."""
    digest = hashlib.sha256(version.encode("utf-8"))
    for name in [*requirements, CONSTRAINTS]:
        digest.update(name.encode("utf-8") + b"\0" + (ROOT / name).read_bytes() + b"\0")
    return digest.hexdigest()


def install(python: Path, requirements: Sequence[str], *options: str) -> None:
    """Install the requirements with pip, which a half-made or foreign environment may lack."""
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode:
        run(python, "-m", "ensurepip", "--upgrade")
    files = [argument for name in requirements for argument in ("-r", name)]
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    if run(*pip, *files, *options):
        fail(f"installing failed (if {python.parent.parent} is damaged, delete it and try again)")


def prepare(requirements: Sequence[str], stamp: str) -> Path:
    """Return the interpreter of `.venv`, made and filled as far as is missing.

    Args:
        requirements: files of requirements, from the project root.
        stamp: name of the file in `.venv` that notes what was installed for them.
    """
    python, version = interpreter(VENV)
    digest, noted = requirements_digest(requirements, version), VENV / stamp
    if not noted.is_file() or noted.read_text(encoding="utf-8") != digest:
        install(python, requirements, "-c", CONSTRAINTS)
        noted.write_text(digest, encoding="utf-8")
    return python


def prepare_newest(requirements: Sequence[str]) -> Path:
    """Return the interpreter of `.venv-newest`, brought up to the newest versions allowed.

    torch stays as in constraints.txt: its releases differ in what hardware they run on.

    Args:
        requirements: files of requirements, from the project root.
    """
    python, _ = interpreter(ROOT / ".venv-newest")
    pins = (ROOT / CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    torch = [line for line in pins if line.startswith("torch==")]
    print("installing the newest versions", flush=True)
    install(python, requirements, *torch, "--upgrade", "--upgrade-strategy", "eager", "--quiet")
    return python
