"""Kill a run again and again, saves included, and see whether it ends as one that was left alone.

    python benchmarks/kill_and_resume.py
    python benchmarks/kill_and_resume.py --kills 100 --seed 1

A tiny model is trained twice on made-up text, saving every other step. One run is left alone. The
other is killed and resumed, again and again: at any time after its start, at any time after a few
more steps, or while a save writes the weights or the resume file. After each kill, once a first
save was complete, the weights and one of the two resume files must be whole and load, and the next
start must go on from the newest of these. In the end both runs must have the same weights, bit by
bit, and the same metrics but for times. Else the exit status is 1.

In the table, a run resumed from - was killed before it printed the step, and a resume file with the
step - is missing or damaged.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from common import ROOT, UserError, make_parser, positive_int, seed
from diagnosis.metrics import read_metrics
from model.weights import check_sums, read_pickle

DIM = 32
NAME = f"pretrain_{DIM}"
FLAGS = f"""
    --device cpu --dim {DIM} --n_layers 2 --max_seq_len 32 --batch_size 2 --accumulation_steps 2
    --learning_rate 1e-3 --dropout 0.1 --val_ratio 0.1 --eval_interval 10 --save_best
    --save_interval 2 --save_total_limit 2 --keep_every 50 --log_interval 1 --resume
    """.split()
WORDS = ("river", "stone", "the", "of", "green", "walks", "and", "山", "河流", "石头", "在")
TIMES = {"seconds", "tokens_per_second", "memory_gb", "mfu"}
AIMS = ("save", "step", "save", "step", "start")
SAVED = (f"{NAME}.json", f"{NAME}.pth", f"{NAME}_resume.pth")


class Run:
    """A training run in a folder, in one process after another."""

    def __init__(self, out: Path, data: Path, epochs: int):
        self.out = out
        self.log = out.with_suffix(".log")
        self.command = [sys.executable, str(ROOT / "train_pretrain.py"), *FLAGS]
        self.command += ["--epochs", str(epochs), "--data_path", str(data), "--out_dir", str(out)]

    def start(self) -> subprocess.Popen:
        """Start or resume it."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        with self.log.open("wb") as log:
            output = {"stdout": log, "stderr": subprocess.STDOUT}
            return subprocess.Popen(self.command, cwd=ROOT, env=environment, **output)

    def finish(self) -> None:
        """Start or resume it and wait for its end."""
        if self.start().wait():
            raise SystemExit(f"the run failed:\n{self.printed()}")

    def printed(self) -> str:
        """What the last process printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def resumed_from(self) -> int | None:
        """The step that the last process went on from, 0 for a new run; None if not printed."""
        printed = self.printed()
        found = re.search(r"--resume: going on after step (\d+)\n", printed)
        return int(found[1]) if found else 0 if "a new run starts" in printed else None

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the metrics file, without times."""
        lines = read_metrics(self.out / "logs" / NAME / "metrics.jsonl")
        return [{key: line[key] for key in line if key not in TIMES} for line in lines]

    def writing(self) -> str | None:
        """The file that is being written under another name, or was when the run was killed."""
        return next((path.stem[1:] for path in self.out.glob(".*.tmp")), None)


def make_data(path: Path) -> Path:
    """300 documents of 5 to 60 words each."""
    generator = random.Random(0)
    texts = (" ".join(generator.choices(WORDS, k=generator.randint(5, 60))) for _ in range(300))
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def kill_often(run: Run, kills: int, generator: random.Random) -> list[str]:
    """Kill and resume, then let the run end; print the table and return the faults."""
    faults: list[str] = []
    print("kill  aimed at  resumed from  was writing                newest  previous")
    saved, start_seconds = 0, 5.0
    for kill in range(1, kills + 1):
        aim = AIMS[kill % len(AIMS)]
        began = time.perf_counter()
        process = run.start()
        if aim == "start":
            time.sleep(generator.uniform(0, start_seconds))
        else:
            wait_for_step(run, process, saved + generator.randint(1, 6))
            start_seconds = time.perf_counter() - began
            wanted = generator.choice(SAVED)
            while aim == "save" and process.poll() is None and run.writing() != wanted:
                pass
            time.sleep(generator.uniform(0, 0.005 if aim == "save" else 0.2))
        process.kill()
        if process.wait() == 0 or "Traceback" in run.printed():
            raise SystemExit(f"kill {kill} came too late:\n{run.printed()}")
        resumed_from = run.resumed_from()
        if resumed_from not in (None, saved):
            faults.append(f"kill {kill}: the run went on from {resumed_from}, not {saved}")
        weights = load(run.out / f"{NAME}.pth")
        files = [load(run.out / f"{NAME}_resume{which}.pth") for which in ("", ".prev")]
        newest, previous = (contents["state"]["step"] if contents else None for contents in files)
        held = newest or previous or 0
        if held < saved or (held and weights is None):
            faults.append(f"kill {kill}: weights or resume files are lost")
        saved = held
        print(
            f"{kill:>4}  {aim:<8}  {'-' if resumed_from is None else resumed_from:>12}  "
            f"{run.writing() or '':<25}  {newest or '-':>6}  {previous or '-':>8}",
            flush=True,
        )
    run.finish()
    if run.resumed_from() != saved:
        faults.append(f"the run went on from {run.resumed_from()}, not {saved}")
    return faults


def wait_for_step(run: Run, process: subprocess.Popen, step: int) -> None:
    """Wait until the process has printed the figures of this step or a later one."""
    while max(map(int, re.findall(r"^step (\d+)/", run.printed(), re.MULTILINE)), default=0) < step:
        if process.poll() is not None:
            raise SystemExit(f"the run ended by itself:\n{run.printed()}")
        time.sleep(0.005)


def load(path: Path) -> Any:
    """What torch.save wrote; None where there is no file, or one that is damaged."""
    with suppress(UserError):
        check_sums(path)
        return read_pickle(path, mmap=False)


def compare(killed: Run, alone: Run) -> list[str]:
    """What differs between two runs that are finished."""
    faults = []
    files, expected = (
        {path.name for path in run.out.iterdir() if path.suffix in (".pth", ".json", ".tmp")}
        for run in (killed, alone)
    )
    if files != expected:
        faults.append(f"other files: {files ^ expected}")
    for name in sorted(expected):
        if name.endswith(".pth") and "_resume" not in name:
            ours, theirs = load(killed.out / name), load(alone.out / name)
            if ours is None or not all(torch.equal(ours[key], theirs[key]) for key in theirs):
                faults.append(f"{name}: other weights")
    if killed.metrics() != alone.metrics():
        faults.append("other metrics")
    return faults


def main() -> int:
    """Train, kill, resume, compare; the exit status."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--kills", type=positive_int, default=25, help="how many")
    parser.add_argument("--seed", type=seed, default=0, help="decides the instants")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill_and_resume_") as name:
        folder = Path(name)
        data = make_data(folder / "data.jsonl")
        epochs = max(1, args.kills // 10)  # of 138 steps each: enough for the kills to come in time
        alone, killed = (Run(folder / name, data, epochs) for name in ("alone", "killed"))
        alone.finish()
        faults = kill_often(killed, args.kills, random.Random(args.seed)) + compare(killed, alone)
    print("\n".join(["", *faults]) if faults else "\nThe same weights and metrics, bit by bit.")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
