"""Write the sample: texts, conversations and tests about a small invented world.

    python scripts/make_sample_data.py [--out_dir dataset/sample] [--seed 2024]

The same seed gives the same bytes on every platform and Python version. Nobody needs to run this:
a stage script that is given a file of dataset/sample writes it first if it is not there, or is of
another version of the generator.
"""

import common.interrupt  # noqa: F401  for Ctrl-C during the imports below

from common import make_parser, report_os_errors, report_user_errors, seed, user_path
from sample_world import SAMPLE, SEED, write_sample


def main() -> None:
    """Write all files and print their sizes."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--out_dir", type=user_path, default=SAMPLE)
    parser.add_argument("--seed", type=seed, default=SEED)
    args = parser.parse_args()
    with report_os_errors(f"--out_dir {args.out_dir}"):
        written = write_sample(args.out_dir, args.seed)
    for path in written:
        content = path.read_bytes()
        lines = content.count(b"\n")
        print(f"{path}: {lines:,} lines, {len(content):,} bytes")
    if not written:
        print(f"{args.out_dir}: all files are there")


if __name__ == "__main__":
    with report_user_errors():
        main()
