"""Show what training would learn of data: their shape, counts, lengths, and examples.

    python scripts/check_data.py my.jsonl
    python scripts/check_data.py zh.parquet code/ "chats/*.json" --examples 5

Each source may be a file, a folder, a pattern, or a data set on a hub (docs/data.md). Tokens are
kept where training looks for them. The exit status is 2 if nothing of a source can be used.
"""

import common.interrupt  # noqa: F401  for Ctrl-C during the imports below

import argparse
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from show_batch import legend, painted, print_border

from common import (
    UserError,
    add_parse_think,
    add_text_columns,
    add_tokenizer_path,
    make_parser,
    non_negative_int,
    number,
    positive_int,
    report_user_errors,
    user_path,
)
from dataset import (
    LANGUAGES,
    DPODataset,
    NoItems,
    PackedRows,
    PretrainDataset,
    RecordError,
    RecordOptions,
    RLAIFDataset,
    SFTDataset,
    language,
    pair_judged,
    parse_text,
    read_records,
    record_kind,
    record_text,
)
from dataset.columns import hub_name, is_on_hub
from dataset.fields import parse_object
from dataset.reader import Place, Record
from dataset.records import BadLines
from dataset.shapes import find_shape
from model import Tokenizer, load_tokenizer

SAMPLED = 2000  # records whose language is found
REMEMBERED = 1_000_000  # records among which repeats are found
BAR = 40  # characters of the longest bar
Kinds = PretrainDataset | SFTDataset | DPODataset | RLAIFDataset


@dataclass
class Survey:
    """What the records of a source are, before any becomes tokens."""

    total: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    languages: Counter[str] = field(default_factory=Counter)  # characters of the first records


def survey(path: Path, options: RecordOptions) -> Survey:
    """Look at all records of a source. UserError if it cannot be read.

    Records with a "label" of which no two make a pair are what they are without it.
    """
    paired = pair_judged(read_records(path, options.separator), BadLines())
    found = _count(paired, options)
    if found.total:
        return found
    return _count(_without_labels(read_records(path, options.separator)), options)


def _without_labels(records: Iterable[tuple[Place, Record]]) -> Iterator[tuple[Place, Record]]:
    for place, record in records:
        try:
            values = parse_object(record)
        except RecordError:
            yield place, record
        else:
            yield place, {name: value for name, value in values.items() if name != "label"}


def _count(records: Iterable[tuple[Place, Record]], options: RecordOptions) -> Survey:
    found, seen = Survey(), set()
    for _, record in records:
        found.total += 1
        try:
            values = parse_object(record)
        except RecordError:
            found.shapes["no record"] += 1
            continue
        shape = find_shape(values)
        named = options.text_column in values or options.text_template is not None
        kind = "text" if named else record_kind(record)
        name = "text" if named else shape.name if shape else "a shape that is not known"
        found.shapes[name] += 1
        if kind:
            found.kinds[kind] += 1
        key = hashlib.blake2b(repr(values).encode("utf-8", "replace"), digest_size=8).digest()
        found.repeated += key in seen
        if len(seen) < REMEMBERED:
            seen.add(key)
        if found.total <= SAMPLED:
            try:
                text = parse_text(record, options) if kind == "text" else record_text(record)
            except RecordError:
                continue
            found.languages[language(text)] += len(text)
    return found


def open_as(kind: str, path: Path, args: argparse.Namespace, tokenizer: Tokenizer) -> Kinds:
    """The data set that the stage for records of this kind makes of a source."""
    options = {
        "cache_dir": args.cache_dir,
        "skip_bad_lines": 1.0,
        "records": RecordOptions.of(args),
    }
    if kind == "pair":
        half = args.max_seq_len // 2
        return DPODataset(path, tokenizer, half, args.max_seq_len - half, **options)
    if kind == "text":
        return PretrainDataset(path, tokenizer, args.max_seq_len + 1, **options)
    try:
        return SFTDataset(path, tokenizer, args.max_seq_len + 1, **options)
    except NoItems:
        return RLAIFDataset(path, tokenizer, args.max_seq_len + 1, **options)


STAGES = {
    PretrainDataset: "train_pretrain.py",
    SFTDataset: "train_full_sft.py, train_lora.py or train_distillation.py",
    DPODataset: "train_dpo.py",
    RLAIFDataset: "nothing to learn from, but prompts for reinforcement learning",
}


def describe(found: Survey, dataset: Kinds, args: argparse.Namespace) -> None:
    """Print the shapes, counts, lengths, and the rows and steps of an epoch."""
    shapes = ", ".join(f"{name} ({count:,})" for name, count in found.shapes.most_common())
    print(f"{found.total:,} records: {shapes}")
    print(f"for {STAGES[type(dataset)]}")
    for note in dataset.notes:
        print(f"  {note}")
    for reason in dataset.store.bad_lines.reasons(dataset.store.path):
        print(f"  {reason}")
    if found.repeated:
        print(f"  {found.repeated:,} records are repeated")
    characters = max(1, found.languages.total())
    shares = (f"{name} {found.languages[name] / characters:.0%}" for name in LANGUAGES)
    print(f"languages: {', '.join(shares)} of the characters of up to {SAMPLED:,} records")
    n_ids = len(dataset.store.ids)
    if isinstance(dataset, RLAIFDataset):
        print(f"{len(dataset):,} prompts, {n_ids:,} tokens")
    else:
        learnt = dataset.n_tokens
        print(f"{learnt:,} tokens are learnt of {n_ids:,} ({learnt / n_ids:.0%})")
        describe_rows(dataset, args)
    print_lengths(np.diff(dataset.store.offsets))


def describe_rows(dataset: Kinds, args: argparse.Namespace) -> None:
    """Print the rows and steps of an epoch."""
    packs = not isinstance(dataset, DPODataset)
    batch = args.batch_size or (32 if packs else 8)
    rows = len(PackedRows(dataset, args.max_seq_len)) if packs else len(dataset)
    unit = f"rows of {args.max_seq_len}" if packs else "pairs"
    print(f"{rows:,} {unit}: {-(-rows // batch):,} steps of {batch} in an epoch")


def print_lengths(lengths: np.ndarray) -> None:
    """Print a table of lengths in tokens, and a picture with a bar for each power of two."""
    points = np.percentile(lengths, (0, 10, 50, 90, 99, 100), method="nearest")
    names = ("shortest", "10 %", "median", "90 %", "99 %", "longest")
    print("tokens: " + ", ".join(f"{n} {x:,}" for n, x in zip(names, points, strict=True)))
    powers = np.ceil(np.log2(lengths)).astype(int)  # up to 2 ** power
    counts = np.bincount(powers)
    for power in range(powers.min(), len(counts)):
        bar = "█" * round(BAR * counts[power] / counts.max())
        print(f"  ≤ {1 << power:>9,} {counts[power]:>9,} {bar}")


def show_examples(dataset: Kinds, n_examples: int, tokenizer: Tokenizer) -> None:
    """Print items from all over the source; what is learnt is coloured or in brackets."""
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if n_examples and not isinstance(dataset, RLAIFDataset):
        print(legend(colours))
    for index in np.unique(np.linspace(0, len(dataset) - 1, n_examples, dtype=int)).tolist():
        if isinstance(dataset, RLAIFDataset):
            print_border(dataset.place(index), colours)
            print(dataset[index]["prompt"])
            continue
        item = dataset[index]
        sides = {"": item}
        if isinstance(item, dict):
            names = ("chosen", "rejected")
            sides = {f" {n}": tuple(item[f"{part}_{n}"] for part in "xy") for n in names}
            sides = {f" {n}": (*sides[f" {n}"], item[f"mask_{n}"]) for n in names}
        for name, (inputs, targets, mask) in sides.items():
            ids = torch.cat((inputs[:1], targets))
            learnt = torch.cat((torch.zeros(1, dtype=torch.bool), mask > 0))
            about = f"{len(ids)} tokens, {int(learnt.sum())} learnt"
            print_border(f"{dataset.place(index)}{name}: {about}", colours)
            print("".join(painted(ids, learnt, tokenizer, colours)).rstrip("\n"))


def check(path: Path, args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """Print all about a source. UserError if nothing of it can be used."""
    found = survey(path, RecordOptions.of(args))
    kinds = [kind for kind, _ in found.kinds.most_common(1)] or ["conversation"]
    dataset = open_as(kinds[0], path, args, tokenizer)
    describe(found, dataset, args)
    show_examples(dataset, args.examples, tokenizer)


def main() -> None:
    """Check each source."""
    parser = make_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("sources", type=user_path, nargs="+", metavar="FILE", help="files, folders, patterns")
    add("--examples", type=non_negative_int, default=2, help="items of each that are shown")
    add("--max_seq_len", type=number(int, 2), default=512, help="positions of a row")
    add("--batch_size", type=positive_int, help="rows of a step; default: 32, of pairs 8")
    add("--cache_dir", type=user_path, help="where token stores go; default: by the data")
    add_text_columns(parser)
    add_parse_think(parser)
    add("--min_margin", type=float, help="as of train_dpo.py")
    add_tokenizer_path(parser)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer_path)
    errors = []
    for path in args.sources:
        print(f"══ {hub_name(path) if is_on_hub(path) else path}")
        try:
            check(path, args, tokenizer)
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError("\n".join(errors))


if __name__ == "__main__":
    with report_user_errors():
        main()
