"""Check the whole project: formatting, lint and tests, in an environment that it makes itself.

    python scripts/test.py [arguments for pytest]

Needs Python 3.10 or newer and nothing else. The first run makes `.venv` in the project root and
installs the versions in constraints.txt; later runs install again only when a requirement changed.
All checks run; the exit status is that of the first one that failed.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036  an older interpreter is just what this line is for
    print(f"test.py: needs Python 3.10 or newer, this is {sys.version.split()[0]}", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed.sha256"
REQUIREMENTS = ["requirements.txt", "scripts/requirements.txt", "tests/requirements.txt"]
CONSTRAINTS = "constraints.txt"


def fail(message: str) -> None:
    """Print one line on stderr and exit with status 2."""
    print(f"test.py: {message}", file=sys.stderr)
    sys.exit(2)


def run(*command: str | Path) -> int:
    """Run a command in the project root, its output shown as it comes; return its exit status."""
    environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def interpreter_version(python: Path) -> str | None:
    """Return the full version of an interpreter, or None where it does not run or is too old."""
    code = "import sys; print(sys.version); sys.exit(sys.version_info < (3, 10))"
    try:
        result = subprocess.run([python, "-c", code], capture_output=True)
    except OSError:
        return None
    return result.stdout.decode("utf-8") if result.returncode == 0 else None


def make_venv() -> None:
    """Make `.venv`, over a broken one if need be, but never over anything else."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        fail("this Python lacks the venv module (Debian, Ubuntu: apt install python3-venv)")
    is_venv = (VENV / "pyvenv.cfg").is_file()
    if VENV.exists() and not is_venv and not (VENV.is_dir() and not any(VENV.iterdir())):
        fail(f"{VENV} is in the way and is no virtual environment: move or delete it")
    if run(sys.executable, "-m", "venv", "--clear", VENV):
        fail(f"cannot make {VENV}")


def requirements_digest(version: str) -> str:
    """Hash what decides which packages are installed: the files' contents and the interpreter."""
    digest = hashlib.sha256(version.encode("utf-8"))
    for name in [*REQUIREMENTS, CONSTRAINTS]:
        digest.update(name.encode("utf-8") + b"\0" + (ROOT / name).read_bytes() + b"\0")
    return digest.hexdigest()


def install(python: Path) -> None:
    """Install the requirements with pip, which a half-made or foreign `.venv` may lack."""
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode:
        run(python, "-m", "ensurepip", "--upgrade")
    files = [argument for name in REQUIREMENTS for argument in ("-r", name)]
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    if run(*pip, *files, "-c", CONSTRAINTS):
        fail(f"installing failed (if {VENV} is damaged, delete it and try again)")


def prepare() -> Path:
    """Return the interpreter of `.venv`, made and filled as far as is missing."""
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if interpreter_version(python) is None:
        make_venv()
    version = interpreter_version(python)
    if version is None:
        fail(f"{python} does not run: delete {VENV} and try again")
    digest = requirements_digest(version)
    if not STAMP.is_file() or STAMP.read_text(encoding="utf-8") != digest:
        install(python)
        STAMP.write_text(digest, encoding="utf-8")
    return python


def main(pytest_arguments: list[str]) -> int:
    """Run every check and return the exit status of the first that failed, else 0."""
    python = prepare()
    checks = [
        ["ruff", "format", "--check", "."],
        ["ruff", "check", "."],
        ["pytest", *pytest_arguments],  # pyproject.toml already says -q; twice hides the totals
    ]
    failed = {}
    for check in checks:
        print(">", *check, flush=True)
        status = run(python, "-m", *check)
        if status:
            failed[" ".join(check)] = status
    for check, status in failed.items():
        print(f"test.py: failed with status {status}: {check}", file=sys.stderr)
    return next(iter(failed.values()), 0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
