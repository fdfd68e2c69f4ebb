"""Train with every combination of some flags' values; print how good each model is at the end.

    python benchmarks/sweep.py train_pretrain.py --data_path my.jsonl --val_data_path val.jsonl \\
        --size 5m --batch_size 8 --max_steps 150 --vary learning_rate 4e-3 8e-3 --vary seed 1 2 3

Other flags go to the stage's script as they are. Compare what costs the same per step with
--max_steps, and all else with --max_minutes. The larger sizes on a GPU, in six minutes:

    python benchmarks/sweep.py train_pretrain.py --data_path my.jsonl --val_data_path val.jsonl \\
        --max_minutes 0.5 --vary size 26m 104m moe --vary learning_rate 2e-3 4e-3 8e-3
"""

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, UserError, make_parser, report_user_errors, user_path

FIGURES = ("val_bits_per_byte", "val_accuracy", "val_loss")  # shown of the last evaluation


def last_evaluation(folder: Path) -> dict[str, float]:
    """The figures of the last evaluation of the one run that a folder holds."""
    (log,) = folder.glob("logs/**/metrics.jsonl")
    lines = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "val_loss" in line][-1]


def main() -> None:
    """Train all and print a table."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("script", type=user_path, help="a stage's script")
    varied = {"nargs": "+", "action": "append", "default": [], "metavar": ("FLAG", "VALUE")}
    parser.add_argument("--vary", **varied, help="a flag, without --, and its values")
    args, flags = parser.parse_known_args()
    if "--val_data_path" not in flags and "--val_ratio" not in flags:
        raise UserError("--val_data_path or --val_ratio: needed to compare")
    names = [name for name, *_ in args.vary]
    print("  ".join(f"{name:>14}" for name in [*names, "step", "seconds", *FIGURES]))
    for values in itertools.product(*(values for _, *values in args.vary)):
        words = [word for pair in zip(names, values, strict=True) for word in pair]
        words[::2] = [f"--{name}" for name in words[::2]]
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, args.script, *flags, *words, "--out_dir", folder]
            subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
            found = last_evaluation(Path(folder))
        figures = [found["step"], found["seconds"], *(found.get(name, "-") for name in FIGURES)]
        cells = [*values, *(f"{x:.4f}" if isinstance(x, float) else x for x in figures)]
        print("  ".join(f"{cell:>14}" for cell in cells), flush=True)


if __name__ == "__main__":
    with report_user_errors():
        main()
