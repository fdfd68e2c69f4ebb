"""Show the input of training: the text of a sample or a packed row, and which of it is learnt.

    python scripts/show_batch.py dataset/sample/sft.jsonl
    python scripts/show_batch.py my.jsonl --packed --index 7

What is learnt is green, what is only read is grey, control tokens are inverted. Without colours
(in a file, or where NO_COLOR is set) what is learnt stands between ⟦ and ⟧. │ separates tokens,
except those that are parts of one character. A legend above the text says the same.
"""

import common.interrupt  # noqa: F401  for Ctrl-C during the imports below

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from common import (
    TOKENIZER,
    BooleanFlag,
    UserError,
    add_skip_bad_lines,
    add_tokenizer_path,
    make_parser,
    positive_int,
    report_user_errors,
    user_path,
)
from dataset import PackedRows, PretrainDataset, SFTDataset, dataset_kind
from model import Tokenizer, load_tokenizer
from sample_world import SAMPLE, ensure_sample

LEARNT, READ, CONTROL, BORDER, END = "\033[32m", "\033[90m", "\033[7m", "\033[36m", "\033[0m"
BETWEEN = "│"


def add_data_flags(parser: argparse.ArgumentParser, tokenizer: Path | None = TOKENIZER) -> None:
    """Add the flags that `open_dataset` reads, `data_path` apart; `tokenizer`: its default."""
    add = parser.add_argument
    add("--max_seq_len", type=positive_int, default=512, help="positions of a row")
    add_skip_bad_lines(parser)
    add("--cache_dir", type=user_path, help="where token stores go; default: by the data")
    add_tokenizer_path(parser, tokenizer)


def open_dataset(args: argparse.Namespace, tokenizer: Tokenizer) -> PretrainDataset | SFTDataset:
    """Open the texts or conversations in `args.data_path`, and print the notes about them."""
    path = ensure_sample(args.data_path)
    options = {"cache_dir": args.cache_dir, "skip_bad_lines": args.skip_bad_lines}
    dataset = dataset_kind(path)(path, tokenizer, args.max_seq_len + 1, **options)
    for note in dataset.notes:
        print(f"{args.data_path}: {note}")
    return dataset


def legend(colours: bool) -> str:
    """What the colours, or the brackets, and the borders mean, in one line."""
    if not colours:
        return f"⟦learnt⟧, the rest is only read; {BETWEEN} between tokens"
    learnt, read = f"{LEARNT}learnt{END}", f"{READ}only read{END}"
    return f"{learnt}, {read}, {READ}{CONTROL}control token{END}; {_between(True)} between tokens"


def token_texts(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """The text of ids, token by token; tokens that are parts of one character are one text."""
    stream = DecodeStream(skip_special_tokens=False)
    texts = [text for id_ in ids if (text := stream.step(tokenizer.backend_tokenizer, id_))]
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    rest = whole[sum(map(len, texts)) :]  # half a character at the end
    return [*texts, rest] if rest else texts


def painted(ids: Tensor, learnt: Tensor, tokenizer: Tokenizer, colours: bool) -> Iterator[str]:
    """The text of ids (T,), those that are `learnt` (T,) in colour or in brackets, with borders."""
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    pairs = zip(ids.tolist(), learnt.tolist(), strict=True)
    inside = False
    for i, ((is_learnt, is_control), run) in enumerate(
        groupby(pairs, lambda pair: (pair[1], pair[0] in special))
    ):
        if is_learnt != inside and not colours:
            yield "⟦" if is_learnt else "⟧"
        elif i:
            yield _between(colours)
        inside = is_learnt
        texts = token_texts([id_ for id_, _ in run], tokenizer)
        if colours:
            style = (LEARNT if is_learnt else READ) + (CONTROL if is_control else "")
            # Each line on its own: pagers forget colours at a line's end.
            texts = [
                "\n".join(f"{style}{line}{END}" if line else "" for line in text.split("\n"))
                for text in texts
            ]
        yield _between(colours).join(texts)
    if inside and not colours:
        yield "⟧"


def _between(colours: bool) -> str:
    return f"{BORDER}{BETWEEN}{END}" if colours else BETWEEN


def print_border(text: str, colours: bool) -> None:
    """Print a line between documents."""
    print(f"{BORDER}── {text}{END}" if colours else f"── {text}")


def main() -> None:
    """Show one sample or row."""
    parser = make_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("data_path", type=user_path, nargs="?", default=SAMPLE / "sft.jsonl", help="JSONL file")
    add("--index", type=int, default=0, help="of the sample, or of the row")
    add("--packed", action=BooleanFlag, default=False, help="show a packed row")
    add_data_flags(parser)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer_path)
    dataset = open_dataset(args, tokenizer)
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    rows = PackedRows(dataset, args.max_seq_len) if args.packed else dataset
    if not 0 <= args.index < len(rows):
        raise UserError(f"--index {args.index}: there are {len(rows):,}, from 0 on")
    items = rows.items(args.index) if args.packed else [args.index]
    print(legend(colours))
    for number, item in enumerate(items, 1):
        inputs, targets, mask = dataset[item]
        ids = torch.cat((inputs[:1], targets))
        learnt = torch.cat((torch.zeros(1, dtype=torch.bool), mask > 0))
        weights = sorted(set(mask[mask > 0].tolist()) - {1.0})
        note = f", weights {', '.join(f'{w:g}' for w in weights)}" if weights else ""
        title = f"{dataset.place(item)}: {len(ids)} tokens, "
        title += f"{int(learnt.sum())} learnt{note} "
        if args.packed:
            title = f"document {number} of {len(items)}, {title}"
        print_border(title, colours)
        print("".join(painted(ids, learnt, tokenizer, colours)).rstrip("\n"))
    if args.packed:
        padding = args.max_seq_len - sum(len(dataset[item][0]) for item in items)
        print_border(f"{padding} of {args.max_seq_len} positions are padding", colours)


if __name__ == "__main__":
    with report_user_errors():
        main()
