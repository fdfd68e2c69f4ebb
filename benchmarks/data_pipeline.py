"""Measure the way from a JSONL file to batches: speed, start-up, memory, and how full rows are.

    python benchmarks/data_pipeline.py                      64 MB of generated text
    python benchmarks/data_pipeline.py --size 2000          2 GB
    python benchmarks/data_pipeline.py --data my.jsonl      a file of yours
    python benchmarks/data_pipeline.py --containers read    reading every container, and mixing

The peer is what many training scripts do: `tokenizer(text)` line by line, ids written as JSON. Both
tokenise the beginning of the file in turns. Each measurement has a process of its own. Memory is
the peak of RssAnon, resident memory that is not backed by a file, sampled every 10 ms (Linux only).
Whatever is written is deleted.

With --containers the same texts are written as JSON Lines, an array, CSV, text, gzip, zstd and
Parquet, and each is read; `tokenise` makes a token store of each besides. Then 20 sources are
mixed: what starting with warm stores takes, and what a batch takes of them and of one source alone,
in turns. Times of these are of the CPU, on one core. This needs dataset/requirements.txt.
"""

import argparse
import csv
import gzip
import json
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow
import zstandard
from harness import in_own_process
from pyarrow import parquet
from transformers import AutoTokenizer

from common import add_tokenizer_path, make_parser, positive_int, user_path
from dataset import (
    Mixture,
    PackedRows,
    PretrainDataset,
    RowBatches,
    collate,
    parse_text,
    read_records,
)
from sample_world.documents import pretraining_texts
from sample_world.world import build_world

SAMPLE_BYTES = 8_000_000  # what both sides tokenise in turn
ROUNDS = 3
SOURCES, BATCHES = 20, 200
STATUS = Path("/proc/self/status")
Figures = dict[str, float]


def main() -> None:
    """Run the measurements one after the other and print the table."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--data", type=user_path, help='JSONL file of {"text"}; default: made up')
    parser.add_argument("--size", type=positive_int, default=64, help="MB of text to make up")
    measured = "measure containers and mixing instead: read them, or tokenise them too"
    parser.add_argument("--containers", choices=("read", "tokenise"), help=measured)
    parser.add_argument("--max_seq_len", type=positive_int, default=512, help="positions in a row")
    parser.add_argument("--batch_size", type=positive_int, default=32, help="rows in a batch")
    add_tokenizer_path(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="data_pipeline_") as name:
        folder = Path(name)
        path = args.data or generate(folder / "generated.jsonl", args.size * 1_000_000)
        if args.containers:
            compare_containers(path, folder, args)
            compare_mixing(path, folder, args)
            return
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
        start, cpu_start = time.perf_counter(), time.process_time()
        dataset = PretrainDataset(path, tokenizer, row_length + 1, cache_dir=folder)
        PackedRows(dataset, row_length)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"s": seconds, "cpu_s": cpu_seconds, **memory}


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


def compare_containers(path: Path, folder: Path, args: argparse.Namespace) -> None:
    """Print the speed and the memory of reading the same texts in every container."""
    for name, write in CONTAINERS.items():
        file = folder / f"container{name}"
        write(path, file)
        read = in_own_process(measure_read, file)
        line = f"{name:<12} {file.stat().st_size / 1e6:7,.0f} MB on disk, "
        line += f"{read['mb']:,.0f} MB of text: "
        line += f"{read['mb'] / read['s']:6.1f} MB/s of CPU time, RssAnon {read['peak_mb']:,.0f} MB"
        if args.containers == "tokenise":
            options = (file, args.tokenizer_path, folder, args.max_seq_len)
            opened = in_own_process(measure_open, *options)
            line += f"; tokenised at {read['mb'] / opened['cpu_s']:.2f} MB/s"
            line += f", RssAnon {opened['peak_mb']:,.0f} MB"
        print(line, flush=True)
        file.unlink()


def write_array(path: Path, out: Path) -> None:
    """The records of a JSONL file as one JSON array."""
    with path.open("rb") as source, out.open("wb") as target:
        for number, line in enumerate(source):
            target.write((b"," if number else b"[") + line)
        target.write(b"]")


def write_table(path: Path, out: Path) -> None:
    """The texts of a JSONL file as CSV."""
    with out.open("w", encoding="utf-8", newline="") as target:
        rows = csv.writer(target)
        rows.writerow(["text"])
        rows.writerows([text] for text in texts_of(path))


def write_text(path: Path, out: Path) -> None:
    """The texts of a JSONL file, with blank lines between."""
    with out.open("w", encoding="utf-8") as target:
        target.writelines(f"{text}\n\n" for text in texts_of(path))


def write_gzip(path: Path, out: Path) -> None:
    """A file in gzip."""
    with path.open("rb") as source, gzip.open(out, "wb", 6) as target:
        shutil.copyfileobj(source, target)


def write_zstd(path: Path, out: Path) -> None:
    """A file in zstd."""
    with path.open("rb") as source, out.open("wb") as target:
        zstandard.ZstdCompressor().copy_stream(source, target)


def write_parquet(path: Path, out: Path) -> None:
    """The texts of a JSONL file as Parquet."""
    schema = pyarrow.schema([("text", pyarrow.string())])
    texts = texts_of(path)
    with parquet.ParquetWriter(out, schema) as target:
        while rows := list(islice(texts, 20_000)):
            target.write_table(pyarrow.table({"text": rows}, schema))


def texts_of(path: Path) -> Iterator[str]:
    """The texts of a JSONL file."""
    with path.open("rb") as source:
        for line in source:
            yield json.loads(line)["text"]


CONTAINERS = {
    ".jsonl": shutil.copyfile,
    ".json": write_array,
    ".csv": write_table,
    ".txt": write_text,
    ".jsonl.gz": write_gzip,
    ".jsonl.zst": write_zstd,
    ".parquet": write_parquet,
}


def measure_read(path: Path) -> Figures:
    """Read and parse all records of a file."""
    size = 0
    with peak_memory() as memory:
        start = time.process_time()
        for _, record in read_records(path):
            size += len(parse_text(record).encode("utf-8"))
        seconds = time.process_time() - start
    return {"s": seconds, "mb": size / 1e6, **memory}


def compare_mixing(path: Path, folder: Path, args: argparse.Namespace) -> None:
    """Print what 20 sources cost at the start, and with each batch."""
    with path.open("rb") as source:
        lines = source.readlines(SAMPLE_BYTES)
    for number in range(SOURCES):
        (folder / f"part{number}.jsonl").write_bytes(b"".join(lines[number::SOURCES]))
    (folder / "whole.jsonl").write_bytes(b"".join(lines))
    options = (folder, args.tokenizer_path, args.max_seq_len, args.batch_size)
    in_own_process(measure_mixing, *options)  # builds the stores
    figures = in_own_process(measure_mixing, *options)
    print(
        f"{SOURCES} sources, warm stores: {figures['start_ms']:.1f} ms of CPU time until there is "
        "an order of the first epoch\n"
        f"a batch of {args.batch_size} rows: {figures['mixed_ms']:.2f} ms mixed, "
        f"{figures['alone_ms']:.2f} ms of one source (medians of {BATCHES}, in turns)"
    )


def measure_mixing(folder: Path, tokenizer_path: Path, row_length: int, batch_size: int) -> Figures:
    """Open 20 sources and one, and make batches of both in turns."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)

    def open_rows(name: str) -> PackedRows:
        options = {"cache_dir": folder, "encoder": encoder}
        dataset = PretrainDataset(folder / name, tokenizer, row_length + 1, **options)
        return PackedRows(dataset, row_length)

    encoder = PretrainDataset.make_encoder(tokenizer)  # which a run with one source makes, too
    start = time.process_time()
    parts = {f"part{n}": open_rows(f"part{n}.jsonl") for n in range(SOURCES)}
    mixture = Mixture(parts, [1 + n % 3 for n in range(SOURCES)], seed=1)
    order = mixture.order(0)
    seconds = time.process_time() - start
    alone = open_rows("whole.jsonl")
    loaders = {}
    for name, rows, how in (("mixed", mixture, order), ("alone", alone, None)):
        batches = RowBatches(len(rows), batch_size, seed=1, order=how)
        loaders[name] = rows, islice(chain.from_iterable(repeat(list(batches))), BATCHES)
    times: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(BATCHES):
        for name, (rows, batches) in loaders.items():
            begun = time.process_time()
            collate([rows[index] for index in next(batches)])
            times[name].append(time.process_time() - begun)
    each = {f"{name}_ms": 1e3 * median(values) for name, values in times.items()}
    return {"start_ms": 1e3 * seconds, **each}


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
