"""What saving costs: the time of a save beside that of the training steps, in one run.

    python benchmarks/saving.py [--dim 512 --n_layers 8 --batch_size 8]

It runs train_pretrain.py on the beginning of the sample with a save every few steps, and prints by
how much a save every 100 steps lengthens a step.
"""

import runpy
import sys
import tempfile
import time
from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from unittest import mock

from harness import parse_flags

from common import ROOT, make_parser
from diagnosis.metrics import read_metrics
from sample_world import SAMPLE, ensure_sample
from training import Run

INTERVAL = 100  # steps, the default of --save_interval
DOCUMENTS_PER_ROW = 10  # of the sample, about: enough for as many rows as are asked for


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__.splitlines()[0])
    args = parse_flags(parser, dim=512, n_layers=8, batch_size=8, steps=24, save_interval=4)
    saves: list[float] = []
    save = Run.save

    def timed_save(run: Run) -> None:
        started = time.perf_counter()
        save(run)
        saves.append(time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = args.steps * args.batch_size * DOCUMENTS_PER_ROW
        with ensure_sample(SAMPLE / "pretrain.jsonl").open("rb") as file:
            (folder / "texts.jsonl").write_bytes(b"".join(islice(file, documents)))
        words = ["--dim", args.dim, "--n_layers", args.n_layers, "--batch_size", args.batch_size]
        words += ["--save_interval", args.save_interval, "--log_interval", 1, "--out_dir", folder]
        words += ["--data_path", folder / "texts.jsonl", "--device", args.device or "cpu"]
        with (
            mock.patch.object(Run, "save", timed_save),
            mock.patch.object(sys, "argv", ["train_pretrain.py", *map(str, words)]),
            suppress(SystemExit),
        ):
            runpy.run_path(str(ROOT / "train_pretrain.py"), run_name="__main__")
        (metrics,) = folder.glob("logs/*/metrics.jsonl")
        lines = read_metrics(metrics)
        size = sum(file.stat().st_size for file in folder.glob("*.pth")) / 1e6

    seconds = [line["seconds"] for line in lines if "loss" in line]
    steps = [after - before for before, after in pairwise([0, *seconds])]
    step, pause = median(steps), median(saves)
    print(
        f"{len(steps)} steps, median {step:.2f} s ({min(steps):.2f} to {max(steps):.2f}); "
        f"{len(saves)} saves, median {pause:.2f} s ({min(saves):.2f} to {max(saves):.2f}), "
        f"{size:.0f} MB on disk\n"
        f"saving every {INTERVAL} steps lengthens a step by {pause / INTERVAL / step:.2%}"
    )


if __name__ == "__main__":
    main()
