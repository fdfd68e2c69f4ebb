"""Write the report of runs, finished or not, or draw the curves of several into one PNG.

python scripts/report_run.py out/logs/pretrain_512
python scripts/report_run.py out/logs/pretrain_512 [another run …] --out curves.png
"""

import json
from pathlib import Path
from typing import Any

from common import (
    UserError,
    add_lang,
    locale_language,
    make_parser,
    report_os_errors,
    report_user_errors,
    translate,
    user_path,
)
from diagnosis.curves import draw_curves
from diagnosis.metrics import having, read_metrics
from diagnosis.report import write_report


def main() -> None:
    """Report on the runs one by one, or draw them together."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("runs", type=user_path, nargs="+", help="folders that hold a metrics.jsonl")
    parser.add_argument(
        "--out",
        type=user_path,
        help="PNG file to draw the curves of all runs into, instead of report.md and curves.png in "
        "the folder of each",
    )
    add_lang(parser)
    args = parser.parse_args()
    try:
        if args.out is None:
            language = args.lang or locale_language()
            for run in args.runs:
                print(translate(write_report(run, language), language))
        else:
            draw_together(args.runs, args.out)
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None


def tokenizer_of(folder: Path) -> tuple[Any, Any] | None:
    """What tells a run's tokenizer from another's; None in a folder without config.json."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    return config.get("vocab_size"), config.get("arguments", {}).get("tokenizer_path")


def draw_together(folders: list[Path], out: Path) -> None:
    """Draw the curves of runs, one over the other; raises as `read_metrics`, and UserError."""
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: must end in .png")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):  # as pretrain_512 of two --out_dir
        names = [folder.as_posix() for folder in folders]
    paths = [folder / "metrics.jsonl" for folder in folders]
    runs = dict(zip(names, map(read_metrics, paths), strict=True))
    for path, metrics in zip(paths, runs.values(), strict=True):
        if not having(metrics, "loss"):
            raise UserError(f"{path}: holds no training line yet")
    first, *others = map(tokenizer_of, folders)
    differ = any(None not in (first, other) and other != first for other in others)
    try:
        with report_os_errors(f"--out {out}"):
            draw_curves(runs, out, tokenizers_differ=differ)
    except ImportError:
        raise UserError("needs matplotlib: pip install -r scripts/requirements.txt") from None
    print(out)


if __name__ == "__main__":
    with report_user_errors():
        main()
