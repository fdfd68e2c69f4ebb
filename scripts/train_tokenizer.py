"""Train MiniMind's tokenizer: a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) over JSONL.

The tokenizer in model/minimind_tokenizer is the result of

    python scripts/train_tokenizer.py <data>/pretrain_real.jsonl=0.25 <data>/sft_real.jsonl=1.5 \\
        <data>/dpo_real.jsonl=6 --out_dir model/minimind_tokenizer --overwrite

`PATH=WEIGHT` counts a file's records WEIGHT times (0.25 takes every fourth); of a preference pair,
the chosen side alone. These weights keep the manuals, most of the text, from filling the
vocabulary; they were chosen by bytes per token on held-out files of all three kinds.

How text is cut before merging (PRE_TOKENS in export/pre_tokenizer.py), and why:

* A newline stands alone, so a text encodes the same alone and between the newlines and control
  tokens of the chat template. A digit stands alone, so a number's tokens are its digits.
* All else is cut after each run of letters: a pre-token is any non-letters, then letters. That
  keeps words whole with what leads them: " the", ", and", "'t", "，因为". At 6,400 entries this
  saves 2.5 to 3 % of the tokens against GPT-2's pattern. Letting merges cross words as well would
  save 1 % more, and fill the vocabulary with phrases.
* Where a cut falls depends on the two characters beside it. So merges do not reach over cuts, and
  an engine that cuts out numbers and nothing else gives the same ids. Merges of parts of characters
  would break this where other characters end or begin with the same bytes (the last byte of "§" and
  the space behind it: also that of "勧"). These few are left out, with the entries built on them.

Each distinct line counts once: a page header that recurs is no sample of the language. Where lines
recur on purpose, as the facts of a small world do, --keep_repeats counts all.
"""

import common.interrupt  # noqa: F401  for Ctrl-C during the imports below

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from itertools import islice
from math import floor
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from common import (
    UserError,
    make_parser,
    number,
    positive_float,
    report_os_errors,
    report_user_errors,
    user_path,
    write_atomically,
)
from dataset import (
    LANGUAGES,
    RecordError,
    check_source,
    language,
    locate,
    parse_chat,
    read_records,
    record_kind,
    record_text,
    render_chat,
)
from dataset.records import check_text
from export.pre_tokenizer import crossing_merges, make_pre_tokenizer, merge_pairs

CONTROL_TOKENS = [
    *("<pad>", "<s>", "</s>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
    *(f"<|reserved_{i}|>" for i in range(7)),
]
SMALLEST = len(CONTROL_TOKENS) + len(pre_tokenizers.ByteLevel.alphabet())  # entries
MAX_TOKEN_BYTES = 16
DISTINCT_LINES = 500_000  # how many lines back a repetition is noticed; about 70 MB
FILES = ("tokenizer.json", "tokenizer_config.json")

# Every piece of text in the template begins and ends at a newline or a control token.
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8").strip()
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "add_bos_token": False,
    "add_eos_token": False,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
    "chat_template": CHAT_TEMPLATE,
}


def read_texts(path: Path) -> Iterator[str]:
    """The text of each record of a file, in order. Raises UserError: `file:line: reason`.

    That of a conversation is what the chat template renders, but for the control tokens: the names
    of roles and the words of tool calls are in every one of them.
    """
    for place, record in read_records(path):
        try:
            if record_kind(record) == "conversation":
                pieces = render_chat(*parse_chat(record))
                text = "".join(piece.text for piece in pieces if not piece.is_control)
                yield check_text(text, "its text")
            else:
                yield record_text(record)
        except RecordError as error:
            raise UserError(f"{locate(path, place)}: {error}") from None


def training_texts(files: list[tuple[Path, float]], keep_repeats: bool = False) -> Iterator[str]:
    """What is counted: each file's records by its weight, if need be without lines met before."""
    seen: dict[bytes, bool] = {}  # the last DISTINCT_LINES

    def is_new(line: str) -> bool:
        key = hashlib.blake2b(line.encode("utf-8"), digest_size=8).digest()
        known = seen.pop(key, False)
        seen[key] = True
        if len(seen) > DISTINCT_LINES:
            del seen[next(iter(seen))]
        return not known

    for path, weight in files:
        for i, text in enumerate(read_texts(path)):
            times = floor((i + 1) * weight) - floor(i * weight)
            if times and not keep_repeats:
                text = "\n".join(filter(is_new, text.split("\n")))
            for _ in range(times):
                yield text


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A BPE of up to `vocab_size` entries: control tokens, the 256 bytes, then merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = make_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + vocab_size // 50 + 64,  # since some merges are left out
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in CONTROL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return without_crossing_merges(tokenizer, vocab_size)


def without_crossing_merges(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """The same BPE without merges that could reach over a cut, of up to `vocab_size` entries."""
    parts = json.loads(tokenizer.to_str())
    pairs, vocab = merge_pairs(parts), parts["model"]["vocab"]
    crossing = set(crossing_merges(pairs))
    entries = dict.fromkeys(sorted(vocab, key=vocab.get)[:SMALLEST])
    merges = []
    for left, right in pairs:
        if len(entries) == vocab_size:
            break
        if (left, right) in crossing or left not in entries or right not in entries:
            continue
        entries[left + right] = None
        merges.append((left, right))
    parts["model"] |= {"vocab": {entry: i for i, entry in enumerate(entries)}, "merges": merges}
    return Tokenizer.from_str(json.dumps(parts))


def save(tokenizer: Tokenizer, out_dir: Path) -> None:
    """Write what `AutoTokenizer.from_pretrained(out_dir)` needs, each file whole or not at all."""
    config = json.dumps(TOKENIZER_CONFIG, ensure_ascii=False, indent=2)
    for name, text in zip(FILES, (tokenizer.to_str(pretty=True), config), strict=True):
        content = f"{text}\n".encode()
        write_atomically(out_dir / name, lambda file, content=content: file.write(content))


def bytes_per_token(tokenizer: Tokenizer, path: Path) -> dict[str, tuple[int, int]]:
    """UTF-8 bytes and tokens of a file's texts by language; control tokens are not parsed."""
    tokenizer.encode_special_tokens = True
    counts = dict.fromkeys(LANGUAGES, (0, 0))
    texts = read_texts(path)
    while batch := list(islice(texts, 1000)):
        for text, encoding in zip(batch, tokenizer.encode_batch_fast(batch), strict=True):
            n_bytes, n_tokens = counts[language(text)]
            counts[language(text)] = (n_bytes + len(text.encode("utf-8")), n_tokens + len(encoding))
    return counts


def report(tokenizer: Tokenizer, paths: list[Path]) -> None:
    """Print a table of bytes per token: a row for each file, a column for each language."""
    print(f"{'bytes per token':32}" + "".join(f"{name:>12}" for name in (*LANGUAGES, "all")))
    for path in paths:
        counts = bytes_per_token(tokenizer, path)
        total = tuple(map(sum, zip(*counts.values(), strict=True)))
        cells = [f"{b / n:12.3f}" if n else f"{'-':>12}" for b, n in (*counts.values(), total)]
        print(f"{path.name:32}" + "".join(cells))


def weighted_path(text: str) -> tuple[Path, float]:
    """An argparse type: `PATH` or `PATH=WEIGHT`; a path that exists may hold an equals sign."""
    path, _, weight = text.rpartition("=")
    if not path or user_path(text).exists():
        return user_path(text), 1.0
    return user_path(path), positive_float(weight)


def parse_args() -> argparse.Namespace:
    """Read the command line. Raises UserError before anything is trained or written."""
    parser = make_parser("Train a byte-level BPE tokenizer on JSONL files.")
    add = parser.add_argument
    add("files", nargs="+", type=weighted_path, metavar="FILE[=WEIGHT]", help="training text")
    add("--out_dir", type=user_path, required=True, help="folder to save it in")
    add("--vocab_size", type=number(int, SMALLEST), default=6400, help="number of entries")
    add(
        "--eval",
        nargs="+",
        type=user_path,
        metavar="FILE",
        help="held-out text for the final report; default: the training text",
    )
    add("--keep_repeats", action="store_true", help="count a line as often as it occurs")
    add("--overwrite", action="store_true", help="replace the tokenizer in out_dir")
    args = parser.parse_args()
    files = [path for path, _ in args.files]
    args.eval = args.eval or files
    for path in files + args.eval:
        check_source(path)
    if args.out_dir.is_file():
        raise UserError(f"--out_dir {args.out_dir}: is not a folder")
    for name in FILES:
        if (args.out_dir / name).exists() and not args.overwrite:
            raise UserError(f"{args.out_dir / name} exists; --overwrite replaces it")
    return args


def main() -> None:
    """Train, save, report."""
    args = parse_args()
    tokenizer = train(training_texts(args.files, args.keep_repeats), args.vocab_size)
    entries = tokenizer.get_vocab_size()
    if entries < args.vocab_size:
        raise UserError(f"--vocab_size {args.vocab_size}: the text yields only {entries}")
    with report_os_errors(f"--out_dir {args.out_dir}"):
        save(tokenizer, args.out_dir)
    print(f"{entries:,} entries in {args.out_dir}")
    report(tokenizer, args.eval)


if __name__ == "__main__":
    with report_user_errors():
        main()
