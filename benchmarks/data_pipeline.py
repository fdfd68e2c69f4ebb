"""Measure the way from a JSONL file to batches: speed, start-up, memory, and how full rows are.

    python benchmarks/data_pipeline.py                      64 MB of generated text
    python benchmarks/data_pipeline.py --size 2000          2 GB
    python benchmarks/data_pipeline.py --data my.jsonl      a file of yours

The peer is what many training scripts do: `tokenizer(text)` line by line, ids written as JSON. Both
tokenise the beginning of the file in turns. Each measurement has a process of its own. Memory is
the peak of RssAnon, resident memory that is not backed by a file, sampled every 10 ms (Linux only).
Whatever is written is deleted.
"""

import json
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
from harness import in_own_process
from transformers import AutoTokenizer

from common import add_tokenizer_path, make_parser, positive_int, user_path
from dataset import PackedRows, PretrainDataset, RowBatches, collate
from sample_world.documents import pretraining_texts
from sample_world.world import build_world

SAMPLE_BYTES = 8_000_000  # what both sides tokenise in turn
ROUNDS = 3
STATUS = Path("/proc/self/status")
Figures = dict[str, float]


def main() -> None:
    """Run the measurements one after the other and print the table."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--data", type=user_path, help='JSONL file of {"text"}; default: made up')
    parser.add_argument("--size", type=positive_int, default=64, help="MB of text to make up")
    parser.add_argument("--max_seq_len", type=positive_int, default=512, help="positions in a row")
    parser.add_argument("--batch_size", type=positive_int, default=32, help="rows in a batch")
    add_tokenizer_path(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="data_pipeline_") as name:
        folder = Path(name)
        path = args.data or generate(folder / "generated.jsonl", args.size * 1_000_000)
        sample = folder / "sample.jsonl"
        with path.open("rb") as source:
            sample.write_bytes(b"".join(source.readlines(SAMPLE_BYTES)))
        theirs, ours = [], []  # seconds
        for turn in range(ROUNDS):
            options = (sample, args.tokenizer_path, folder / f"round{turn}")
            theirs.append(in_own_process(measure_peer, *options))
            ours.append(in_own_process(measure_open, *options, args.max_seq_len)["s"])
        options = (path, args.tokenizer_path, folder, args.max_seq_len)
        cold, warm = (in_own_process(measure_open, *options) for _ in range(2))
        epoch = in_own_process(measure_epoch, *options, args.batch_size)
        size, sample_size = path.stat().st_size / 1e6, sample.stat().st_size / 1e6
    print(
        f"file                       {size:,.0f} MB, {epoch['documents']:,.0f} documents, "
        f"{epoch['tokens'] / 1e6:,.1f} M tokens, {epoch['bytes_per_token']:.2f} bytes each\n"
        f"tokenising, whole file     {size / cold['s']:.2f} MB/s ({cold['s']:.1f} s)\n"
        f"tokenising, first {sample_size:.0f} MB     {sample_size / median(ours):.2f} MB/s, "
        f"peer {sample_size / median(theirs):.2f} MB/s, "
        f"ratio {median(theirs) / median(ours):.2f} (medians of {ROUNDS})\n"
        f"start with a warm store    {warm['s'] * 1e3:.1f} ms\n"
        f"one epoch of packed rows   {epoch['tokens'] / 1e6 / epoch['s']:.2f} M tokens/s\n"
        f"memory, RssAnon            {cold['peak_mb']:,.0f} MB building, "
        f"{epoch['peak_mb']:,.0f} MB reading, {epoch['before_mb']:,.0f} MB before either\n"
        f"rows of {args.max_seq_len}, packed         {epoch['fill']:.2%} real tokens, "
        f"{epoch['used']:.2%} of the text\n"
        f"  one document a row       {epoch['padded_fill']:.2%} real tokens, "
        f"{epoch['padded_used']:.2%} of the text"
    )


def measure_peer(path: Path, tokenizer_path: Path, folder: Path) -> float:
    """Seconds to tokenise a file in a plain loop."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    folder.mkdir()
    start = time.perf_counter()
    with path.open("rb") as source, (folder / "peer.jsonl").open("wb") as target:
        for line in source:
            ids = tokenizer(json.loads(line)["text"])["input_ids"]
            target.write(json.dumps(ids).encode() + b"\n")
    return time.perf_counter() - start


def measure_open(path: Path, tokenizer_path: Path, folder: Path, row_length: int) -> Figures:
    """Open the data as a stage script does, building what is not there yet."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    with peak_memory() as memory:
        start = time.perf_counter()
        dataset = PretrainDataset(path, tokenizer, row_length + 1, cache_dir=folder)
        PackedRows(dataset, row_length)
        seconds = time.perf_counter() - start
    return {"s": seconds, **memory}


def measure_epoch(
    path: Path, tokenizer_path: Path, folder: Path, row_length: int, batch_size: int
) -> Figures:
    """Make all batches of one shuffled epoch, and count what is in them."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    with peak_memory() as memory:
        dataset = PretrainDataset(path, tokenizer, row_length + 1, cache_dir=folder)
        rows = PackedRows(dataset, row_length)
        real = 0
        start = time.perf_counter()
        for batch in RowBatches(len(rows), batch_size, seed=1, epoch=0):
            real += int(collate([rows[index] for index in batch])["attention_mask"].sum())
        seconds = time.perf_counter() - start
    positions = np.diff(dataset.store.offsets) - 1
    kept = int(np.minimum(positions, row_length).sum())
    return {
        "s": seconds,
        **memory,
        "documents": dataset.n_documents,
        "tokens": dataset.n_tokens,
        "bytes_per_token": dataset.text_bytes / (dataset.n_tokens - dataset.n_documents),
        "fill": real / (len(rows) * row_length),
        "used": real / dataset.n_tokens,
        "padded_fill": kept / (len(positions) * row_length),
        "padded_used": kept / dataset.n_tokens,
    }


@contextmanager
def peak_memory() -> Iterator[Figures]:
    """A dict that holds `before_mb` and, at the end, `peak_mb`: RssAnon, NaN where unknown."""
    memory = {"before_mb": rss_anon(), "peak_mb": rss_anon()}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            memory["peak_mb"] = max(memory["peak_mb"], rss_anon())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield memory
    stop.set()
    thread.join()


def rss_anon() -> float:
    """This process's RssAnon in MB."""
    status = STATUS.read_text(encoding="utf-8") if STATUS.exists() else ""
    found = re.search(r"^RssAnon:\s+(\d+)", status, re.MULTILINE)
    return int(found[1]) * 1024 / 1e6 if found else float("nan")


def generate(path: Path, size: int) -> Path:
    """Write `size` bytes of documents about the sample world, the same each time."""
    generator = np.random.default_rng(0)
    parts = list(islice(pretraining_texts(build_world(0), seed=0), 20_000))
    with path.open("wb") as file:
        while file.tell() < size:
            chosen = generator.integers(len(parts), size=1 + int(generator.pareto(1.5) * 2))
            text = "\n\n".join(parts[n] for n in chosen.tolist())
            file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    return path


if __name__ == "__main__":
    main()
