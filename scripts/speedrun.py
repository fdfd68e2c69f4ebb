"""Time to 80 %: how long two CPU cores take from nothing to a model that knows the small world.

    python scripts/speedrun.py                          (the quick start's settings)
    python scripts/speedrun.py --entry my_entry.json

An entry is a JSON object with some of the quick start's settings (RECIPE in quickstart.py); what it
leaves out is the quick start's, as {"pretraining": ["--batch_size", "8", "--epochs", "3"]}. It is
trained with three seeds, each from the tokenizer to the tuned weights, and scored on the questions
that no training file holds, alone and after five exchanges. If the means of both reach 80 %, its
line is written to docs/board.md; else the exit status is 1.
"""

from __future__ import annotations  # an old Python must get as far as `require_python`

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

from environment import ROOT, fail, prepare, require_python, step, user_path
from further_stages import Quickstart
from quickstart import BOTH, EARLIER, IN_CONVERSATION, OVERALL, RECIPE, REQUIREMENTS, SAMPLE, train

BOARD = ROOT / "docs" / "board.md"
SEEDS, CORES = (42, 43, 44), 2


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--entry", type=user_path, help="JSON file of settings; default: the quick start's")
    add(
        "--out_dir", type=user_path, default=ROOT / "out" / "speedrun", help="default: out/speedrun"
    )
    parser.error = fail  # one line, as for every other user error
    return parser.parse_args()


def read_entry(path: Path) -> dict:
    """The settings of an entry's file; exit with status 2 if it is not one."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"--entry {path}: {error}")
    if not isinstance(entry, dict) or not entry.keys() <= RECIPE.keys():
        fail(f"--entry {path}: not a JSON object of {', '.join(RECIPE)}")
    return entry


def machine() -> str:
    """The processor, by name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    named = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return f"{CORES} cores of {named[1] if named else platform.processor() or platform.machine()}"


def commit() -> str:
    """The commit that is checked out, with a plus sign if files of it have changed."""
    git = ["git", "-C", ROOT, "describe", "--always", "--exclude=*", "--dirty=+"]
    done = subprocess.run(git, capture_output=True, encoding="utf-8")
    return done.stdout.strip() or "unknown"


def write_line(board: Path, cells: list[str]) -> None:
    """Add a line to the table, which the fastest leads."""
    text = board.read_text(encoding="utf-8")
    lines = re.findall(r"^\| \d.*\n", text, re.MULTILINE)
    rest = "".join(line for line in text.splitlines(keepends=True) if line not in lines)
    lines = sorted([*lines, f"| {' | '.join(cells)} |\n"], key=lambda line: float(line.split()[1]))
    board.write_text(rest + "".join(lines), encoding="utf-8")


def main() -> int:
    """Train and score an entry with each seed; returns the exit status."""
    require_python()
    args = parse_args()
    entry = RECIPE | (read_entry(args.entry) if args.entry else {})
    name = args.entry.stem if args.entry else "quick start"
    folders = [args.out_dir.resolve() / f"{name.replace(' ', '_')}_{seed}" for seed in SEEDS]
    if taken := next(filter(Path.exists, folders), None):
        fail(f"{taken} is there already: delete it or choose another --out_dir")
    if hasattr(os, "sched_setaffinity"):  # which the steps inherit
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    os.environ["OMP_NUM_THREADS"] = str(CORES)
    python = prepare(REQUIREMENTS, "quickstart.sha256")
    step("The sample world", python, "scripts/make_sample_data.py")
    minutes, scores = [], []
    for seed, out in zip(SEEDS, folders, strict=True):
        out.mkdir(parents=True)
        rows = [*entry["rows"], "--seed", str(seed), "--cache_dir", out / "tokens"]
        start = Quickstart(python, out, SAMPLE, out / "tokenizer", entry["model"], rows, False)
        started = time.perf_counter()
        weights = {BOTH: train(start, control=False, recipe=entry)[BOTH]}
        minutes.append((time.perf_counter() - started) / 60)
        words = ["--history", "0", str(EARLIER)]
        scores.append(start.score(f"Scores with seed {seed}", "test.jsonl", weights, *words))
    right = [[score[key]["overall"] for score in scores] for key in (BOTH, IN_CONVERSATION)]
    shares = [f"{mean(r):.1%} ({min(r):.1%}–{max(r):.1%})" for r in right]
    cells = [f"{mean(minutes):.1f}", name, *shares, ", ".join(map(str, SEEDS)), machine(), commit()]
    print(f"\n{' | '.join(cells)}", flush=True)
    if min(map(mean, right)) < OVERALL:
        print(f"below {OVERALL:.0%}: not written to the board", file=sys.stderr)
        return 1
    write_line(BOARD, cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
