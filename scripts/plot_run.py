"""Draw the curves of one or several runs, one over the other, into one PNG.

python scripts/plot_run.py out/logs/pretrain_512 [another run …] --out curves.png
"""

import common.interrupt  # noqa: F401  for Ctrl-C during the imports below

from common import UserError, make_parser, report_user_errors, user_path
from diagnosis.curves import draw_curves, has_number, read_metrics


def main() -> None:
    """Read the runs and draw them."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("runs", type=user_path, nargs="+", help="folders that hold a metrics.jsonl")
    parser.add_argument("--out", type=user_path, required=True, help="PNG file to write")
    args = parser.parse_args()
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: must end in .png")

    names = [run.resolve().name for run in args.runs]
    if len(set(names)) < len(names):  # as pretrain_512 of two --out_dir
        names = [run.as_posix() for run in args.runs]
    runs = {}
    for name, run in zip(names, args.runs, strict=True):
        try:
            runs[name] = read_metrics(run / "metrics.jsonl")
        except OSError as error:
            raise UserError(f"{run / 'metrics.jsonl'}: {error.strerror or error}") from None
        except ValueError as error:
            raise UserError(str(error)) from None
        if not any(has_number(line, "loss") for line in runs[name]):
            raise UserError(f"{run / 'metrics.jsonl'}: holds no training line yet")
    try:
        draw_curves(runs, args.out)
    except ImportError:
        raise UserError("needs matplotlib: pip install -r scripts/requirements.txt") from None
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror or error}") from None
    print(args.out)


if __name__ == "__main__":
    with report_user_errors():
        main()
