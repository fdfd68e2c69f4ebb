"""What saving costs: the time of a save beside that of the training steps, in one run.

    python benchmarks/saving.py [--dim 512 --n_layers 8 --batch_size 8]

It runs train_pretrain.py on the sample with a save every few steps, and prints by how much saving
every 100 steps lengthens a step.
"""

import argparse
import runpy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from common import ROOT
from training import Run

INTERVAL = 100  # steps, the default of --save_interval


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--n_layers", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--save_interval", type=int, default=4)
    args = parser.parse_args()

    steps: list[float] = []
    saves: list[float] = []
    save, add_step = Run.save, Run.add_step

    def timed_save(run: Run) -> None:
        started = time.perf_counter()
        save(run)
        saves.append(time.perf_counter() - started)

    def timed_step(run: Run, **figures: object) -> None:
        add_step(run, **figures)
        steps.append(figures["seconds"])
        if len(steps) == args.steps:
            run.ending = "measured"

    with tempfile.TemporaryDirectory() as folder:
        words = ["--dim", args.dim, "--n_layers", args.n_layers, "--batch_size", args.batch_size]
        words += ["--save_interval", args.save_interval, "--out_dir", folder, "--device", "cpu"]
        with (
            mock.patch.object(Run, "save", timed_save),
            mock.patch.object(Run, "add_step", timed_step),
            mock.patch.object(sys, "argv", ["train_pretrain.py", *map(str, words)]),
        ):
            try:
                runpy.run_path(str(ROOT / "train_pretrain.py"), run_name="__main__")
            except SystemExit as exit_:
                if exit_.code:
                    raise
        size = sum(file.stat().st_size for file in Path(folder).glob("*.pth")) / 1e6

    step, pause = statistics.median(steps), statistics.median(saves)
    print(
        f"{len(steps)} steps, median {step:.2f} s ({min(steps):.2f} to {max(steps):.2f}); "
        f"{len(saves)} saves, median {pause:.2f} s ({min(saves):.2f} to {max(saves):.2f}), "
        f"{size:.0f} MB on disk\n"
        f"saving every {INTERVAL} steps lengthens a step by {pause / INTERVAL / step:.2%}"
    )


if __name__ == "__main__":
    main()
