"""Draw the curves of one or several runs into one PNG: training loss, validation bits per byte.

python scripts/plot_run.py out/logs/pretrain_512 [another run …] --out curves.png
"""

import argparse
import json
import sys
from pathlib import Path

try:
    import matplotlib
except ImportError:
    sys.exit("plot_run.py: needs matplotlib: pip install -r scripts/requirements.txt")

matplotlib.use("Agg")
from matplotlib import pyplot

CURVES = {
    "loss": "training loss (nats per token)",
    "val_bits_per_byte": "validation (bits per byte)",
}


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def main() -> None:
    """Read the runs and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders that hold a metrics.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    for run in args.runs:
        if not (run / "metrics.jsonl").is_file():
            parser.error(f"{run}: no metrics.jsonl there")

    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(10, 4), layout="constrained")
    for run in args.runs:
        metrics = read_metrics(run)
        for axis, name in zip(axes, CURVES, strict=True):
            points = [(m["tokens"] / 1e6, m[name]) for m in metrics if name in m]
            if points:
                axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
    for axis, title in zip(axes, CURVES.values(), strict=True):
        axis.set(xlabel="million tokens", title=title)
        axis.grid(alpha=0.3)
    if len(args.runs) > 1:
        axes[0].legend([run.name for run in args.runs])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=100)
    print(args.out)


if __name__ == "__main__":
    main()
