"""Write the sample: texts, conversations and tests about a small invented world.

    python scripts/make_sample_data.py [--out_dir dataset/sample] [--seed 2024]

The same seed gives the same bytes on every platform and Python version. Nobody needs to run this:
a stage script that is given a file of dataset/sample writes it first if it is not there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.sample import SAMPLE, SEED, write_sample
from training import UserError, make_parser, report_user_errors, seed


def main() -> None:
    """Write all files and say how large they are."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--out_dir", type=Path, default=SAMPLE)
    parser.add_argument("--seed", type=seed, default=SEED)
    args = parser.parse_args()
    try:
        counts = write_sample(args.out_dir, args.seed)
    except OSError as error:
        raise UserError(f"--out_dir {args.out_dir}: {error.strerror}") from None
    for name, count in counts.items():
        path = args.out_dir / name
        print(f"{path}: {count:,} lines, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    with report_user_errors():
        main()
