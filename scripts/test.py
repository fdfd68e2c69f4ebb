"""Check the whole project: formatting, lint and tests, in an environment that it makes itself.

    python scripts/test.py [arguments for pytest]

Needs Python 3.10 or newer and nothing else. The first run makes `.venv` in the project root and
installs the versions in constraints.txt; later runs install again only when a requirement changed.
All checks run; the exit status is that of the first one that failed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from environment import prepare, require_python, run

REQUIREMENTS = ["requirements.txt", "scripts/requirements.txt", "tests/requirements.txt"]


def main(pytest_arguments: list[str]) -> int:
    """Run every check and return the exit status of the first that failed, else 0."""
    python = prepare(REQUIREMENTS, "installed.sha256")
    checks = [
        ["ruff", "format", "--check", "."],
        ["ruff", "check", "."],
        # Files are shared out among processes; each needs a gigabyte of memory.
        ["pytest", "--numprocesses=auto", "--maxprocesses=4", "--dist=loadfile", *pytest_arguments],
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
    require_python()
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
