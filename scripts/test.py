"""Check the whole project: formatting, lint and tests, in an environment that it makes itself.

    python scripts/test.py [arguments for pytest]
    python scripts/test.py --newest

Needs Python 3.10 or newer and nothing else. The first run makes `.venv` in the project root and
installs the versions in constraints.txt; later runs install again only when a requirement changed.
All checks run; the exit status is that of the first one that failed.

`--newest` makes `.venv-newest` instead, with the newest versions that the requirements allow, and
runs a core of the tests there: every stage, scoring, chat, server, exports.
"""

import argparse
import sys

from environment import prepare, prepare_newest, require_python, run

REQUIREMENTS = [
    *("requirements.txt", "dataset/requirements.txt"),
    *("scripts/requirements.txt", "tests/requirements.txt"),
]
# Files are shared out among processes; each needs a gigabyte of memory.
PYTEST = ["pytest", "--numprocesses=auto", "--maxprocesses=4", "--dist=loadfile"]
CORE = [
    "tests/test_quickstart.py::test_smoke_goes_all_the_way",  # every stage
    "tests/test_model.py::test_trainer_lowers_the_loss_and_evaluates",
    "tests/test_chat.py",
    "tests/test_eval_model.py::test_tuned_weights_answer_and_remember",
    "tests/test_eval_model.py::test_scores_are_those_of_llama",
    "tests/test_eval_model.py::test_answers_beside_references",
    "tests/test_server.py::test_an_answer_is_the_model_s",
    "tests/test_server.py::test_a_stream_adds_up_to_the_answer",
    "tests/test_server.py::test_texts_are_continued",
    "tests/test_server.py::test_langchain",
    "tests/test_convert_model.py",
]


def main() -> int:
    """Run every check and return the exit status of the first that failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--newest", action="store_true", help="the newest versions, in .venv-newest"
    )
    args, arguments = parser.parse_known_args()  # the rest is for pytest
    if args.newest:
        python = prepare_newest(REQUIREMENTS)
        checks = [[*PYTEST, *CORE, *arguments]]
    else:
        python = prepare(REQUIREMENTS, "installed.sha256")
        lint = ["ruff", "format", "--check", "."], ["ruff", "check", "."]
        checks = [*lint, [*PYTEST, *arguments]]
    failed = {}
    for check in checks:
        print(">", *check, flush=True)
        if status := run(python, "-m", *check):
            failed[" ".join(check)] = status
    for check, status in failed.items():
        print(f"test.py: failed with status {status}: {check}", file=sys.stderr)
    return next(iter(failed.values()), 0)


if __name__ == "__main__":
    require_python()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
