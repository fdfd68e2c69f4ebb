"""Tokenise a data file once, into a memory-mapped store beside it.

The store of `data.jsonl` is the folder `data.jsonl.{key}.tokens/`:

    ids        token ids of all documents in file order, uint16 or uint32
    offsets    (documents + 1,) int64; document d is ids[offsets[d] : offsets[d + 1]]
    lines      (documents,) int64; the line that each document begins on, from 1
    bytes      (documents,) int64; the UTF-8 bytes of each document's text
    …          (documents,) int64; whatever else the encoder counts in each, by its name
    weights    float32, one for each id; only where the encoder gives weights
    meta.json  what it was made of, and the bad lines that were found

All numbers are little-endian. Tables derived from a store are folders inside it. Every such folder
is made under a temporary name, flushed, and renamed: it is there whole or not at all.
"""

import glob
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from filelock import FileLock, Timeout
from tokenizers import Tokenizer
from tqdm import tqdm

from common import UserError
from model import tokenizer_hash

from .reader import check_file, read_records
from .records import BadLines, RecordError

FORMAT_VERSION = 3
BATCH_BYTES = 1 << 21  # of lines encoded at a time; the library's results take 50 times as much
PIECE_CHARS = 1 << 16  # longer texts are encoded in pieces
SAMPLED_BLOCKS = 16
SAMPLED_BLOCK_BYTES = 1 << 16
POLL_SECONDS = 0.2

INDEX_DTYPE = np.dtype("<i8")
WEIGHT_DTYPE = np.dtype("<f4")


class Encoded(NamedTuple):
    """Documents as numbers, one after the other.

    `ids` (N,) of an integer dtype, `lengths` (documents,) in ids, `weights` (N,) float32 or None.
    """

    ids: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray | None = None


class Parsed(NamedTuple):
    """A record as an encoder takes it, the UTF-8 bytes of text in it, and what it counts there."""

    record: Any
    text_bytes: int
    counts: tuple[int, ...] = ()


class Encoder(Protocol):
    """How the records of a file become ids.

    `key` tells apart everything that changes the ids: kind of record, options, tokenizer.
    `dtype` is that of the ids; `weighted` says whether `encode` gives weights; `counted` names what
    `parse` counts.
    """

    key: str
    dtype: np.dtype
    weighted: bool
    counted: tuple[str, ...]

    def parse(self, line: bytes) -> Parsed:
        """What `encode` takes, with a number for each name of `counted`. Raises RecordError."""

    def encode(self, records: Sequence[Any]) -> Encoded:
        """The documents of each record in turn, as many of each, of at least two ids."""


class TextTokenizer:
    """Text to ids by a transformers tokenizer, such that no text can produce a control token.

    It works on a private copy of the tokenizer's backend. `hash` is its `tokenizer_hash`; `special`
    are the ids that no text gives, by token; `dtype` is the smallest that holds its ids: uint16 or
    uint32. Raises UserError where there is no such backend.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UserError("--tokenizer_path: this tokenizer has no tokenizer.json")
        # The tokenizers library warns in every process that is forked after it ran in parallel,
        # DataLoader workers included, unless this is set.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self.hash = tokenizer_hash(tokenizer)
        self._backend.encode_special_tokens = True
        self._added = self._backend.get_added_tokens_decoder()
        self.special = {token.content: id_ for id_, token in self._added.items() if token.special}
        largest_id = max(self._backend.get_vocab(with_added_tokens=True).values())
        self.dtype = np.dtype("<u2" if largest_id < 1 << 16 else "<u4")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # which the library does not pickle

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, of `dtype`, without `<s>` and `</s>`.

        Long texts are encoded in pieces, cut after a newline where there is one near enough. With
        a newline as a token of its own that changes nothing; other tokenizers may see one token
        in tens of thousands split in two.
        """
        pieces = ((owner, piece) for owner, text in enumerate(texts) for piece in cut_text(text))
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        for batch in _batches_of_pieces(pieces):
            encodings = self._backend.encode_batch_fast(
                [piece for _, piece in batch], add_special_tokens=False
            )
            for (owner, _), encoding in zip(batch, encodings, strict=True):
                parts[owner].append(np.array(encoding.ids, dtype=self.dtype))
        return [np.concatenate(part) for part in parts]

    def byte_counts(self) -> np.ndarray:
        """(largest id + 1,) int64, the UTF-8 bytes of text that each id stands for.

        Special tokens stand for none. A byte-level tokenizer writes each byte as one character; of
        others, ids are decoded one by one, which may miss a space or part of a character.
        """
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        is_byte_level = '"ByteLevel"' in json.dumps(json.loads(self._backend.to_str())["decoder"])
        counts = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
        for token, id_ in vocabulary.items():
            if id_ in self._added:
                counts[id_] = 0 if self._added[id_].special else len(token.encode("utf-8"))
            elif is_byte_level:
                counts[id_] = len(token)
            else:
                counts[id_] = len(self._backend.decode([id_]).encode("utf-8"))
        return counts


def cut_text(text: str, limit: int = PIECE_CHARS) -> Iterator[str]:
    """Cut `text` into pieces of at most `limit` characters, at the end of a line if possible."""
    start = 0
    while len(text) - start > limit:
        newline = text.rfind("\n", start, start + limit)
        end = newline + 1 if newline >= 0 else start + limit
        yield text[start:end]
        start = end
    yield text[start:]


def _batches_of_pieces(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """As many pieces together as make BATCH_BYTES characters."""
    batch: list[tuple[int, str]] = []
    chars = 0
    for owner, piece in pieces:
        batch.append((owner, piece))
        chars += len(piece)
        if chars >= BATCH_BYTES:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class ArrayFolder:
    """Memory-mapped arrays of a folder that `build_once` made. It pickles as the folder's path.

    `arrays` has them by name, `meta` is the content of meta.json.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.arrays = {
            name: _map_array(folder / name, dtype, length)
            for name, (dtype, length) in self.meta["arrays"].items()
        }

    def __reduce__(self) -> tuple[type["ArrayFolder"], tuple[Path]]:
        return ArrayFolder, (self.folder,)


class ArrayWriter:
    """Append numbers to the arrays of a folder that is being built."""

    def __init__(self, folder: Path, **dtypes: np.dtype) -> None:
        self._dtypes = dtypes
        self._lengths = dict.fromkeys(dtypes, 0)
        self._stack = ExitStack()
        self._files = {
            name: self._stack.enter_context((folder / name).open("wb")) for name in dtypes
        }

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def append(self, name: str, values: Any) -> None:
        """Add `values`, converted to the array's dtype, at the end of the array `name`."""
        array = np.ascontiguousarray(values, dtype=self._dtypes[name])
        self._files[name].write(array.data)
        self._lengths[name] += len(array)

    def description(self) -> dict[str, tuple[str, int]]:
        """dtype and length of each array, as meta.json keeps them."""
        return {name: (dtype.str, self._lengths[name]) for name, dtype in self._dtypes.items()}


def build_once(folder: Path, build: Callable[[Path], dict[str, Any]]) -> ArrayFolder:
    """The arrays of `folder`, built now if they are not there yet, by one process only.

    `build` fills the empty folder that it is given and returns the content of meta.json, with
    ArrayWriter's description under "arrays". Other processes wait for the one that holds the lock,
    which the operating system takes back when that process dies. Under torchrun only the first
    process of each host asks for the lock; the others wait for the folder to appear.

    Raises UserError if the folder cannot be written.
    """
    try:
        if _is_complete(folder):
            return ArrayFolder(folder)
        if "WORLD_SIZE" in os.environ and int(os.environ.get("LOCAL_RANK", "0")) > 0:
            while not _is_complete(folder):
                time.sleep(POLL_SECONDS)
            return ArrayFolder(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        try:
            lock.acquire(timeout=POLL_SECONDS)
        except Timeout:
            print(f"waiting for another process that builds {folder}", file=sys.stderr)
            lock.acquire()
        try:
            if not _is_complete(folder):
                _build_folder(folder, build)
        finally:
            lock.release()
        return ArrayFolder(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{folder.parent}: cannot be written ({reason}); --cache_dir names another folder"
        ) from error


def _build_folder(folder: Path, build: Callable[[Path], dict[str, Any]]) -> None:
    """Build under a temporary name, flush, rename. The caller holds the lock."""
    for leftover in folder.parent.glob(f"{glob.escape(folder.name)}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        meta = json.dumps(build(temporary), ensure_ascii=False, indent=1)
        (temporary / "meta.json").write_text(meta, encoding="utf-8")
        for path in temporary.iterdir():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(folder)  # incomplete: a copy that was broken off, or a damaged file
        try:
            temporary.rename(folder)
        except OSError:
            if not _is_complete(folder):  # else another host was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    """Whether the folder is there with arrays of the lengths that meta.json names."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return all(
            (folder / name).stat().st_size == np.dtype(dtype).itemsize * length
            for name, (dtype, length) in meta["arrays"].items()
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False


def _map_array(path: Path, dtype: str, length: int) -> np.ndarray:
    if length == 0:  # nothing that could be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r", shape=(length,)))


class TokenStore:
    """The documents of one data file as token ids on disk.

    `ids`, `offsets`, `lines` and `weights` (None without) are the arrays that this module's
    docstring describes, `path` is the file. `bad_lines` are the lines that gave no document.
    `content` identifies the documents, wherever the file lies: a sha256 of their ids.
    """

    def __init__(self, path: Path, files: ArrayFolder) -> None:
        self.path = path
        self._files = files
        self.content: str = files.meta["content"]
        self.bad_lines = BadLines(**files.meta["bad_lines"])

    @classmethod
    def open_or_build(
        cls,
        path: str | Path,
        encoder: Encoder,
        *,
        cache_dir: str | Path | None = None,
        skip_bad_lines: float = 0.0,
        batch_bytes: int = BATCH_BYTES,
    ) -> "TokenStore":
        """Open the store of `path`, in `cache_dir` or beside the file, and build it if need be.

        Bad lines are left out if they are at most the share `skip_bad_lines` of all.

        Raises UserError: the file cannot be used, more of its lines are bad, no good line is left,
        or the store cannot be written.
        """
        path = Path(path)
        check_file(path)
        parent = path.parent if cache_dir is None else Path(cache_dir)
        folder = parent / f"{path.name}.{_store_key(path, encoder)}.tokens"
        build = partial(_build_store, path, encoder, batch_bytes)
        store = cls(path, build_once(folder, build))
        store.bad_lines.check(path, skip_bad_lines)
        if len(store.lines) == 0:
            raise UserError(f"{path}: not one good line in {store.bad_lines.total:,}")
        return store

    @property
    def ids(self) -> np.ndarray:
        """Ids of all documents in file order."""
        return self._files.arrays["ids"]

    @property
    def offsets(self) -> np.ndarray:
        """(documents + 1,) where each document starts in `ids`, and the end."""
        return self._files.arrays["offsets"]

    @property
    def lines(self) -> np.ndarray:
        """(documents,) the line of each, from 1."""
        return self._files.arrays["lines"]

    @property
    def bytes(self) -> np.ndarray:
        """(documents,) UTF-8 bytes of each document's text."""
        return self._files.arrays["bytes"]

    def counts(self, name: str) -> np.ndarray:
        """(documents,) what the encoder counts in each by that name."""
        return self._files.arrays[name]

    @property
    def weights(self) -> np.ndarray | None:
        """How much each id of `ids` counts as a target, if the encoder said."""
        return self._files.arrays.get("weights")

    def derived(self, name: str, build: Callable[[Path], dict[str, Any]]) -> ArrayFolder:
        """A table made from this store by `build` (see `build_once`), kept inside it."""
        return build_once(self._files.folder / name, build)

    def find_derived(self, name: str) -> ArrayFolder | None:
        """That table if it is there already."""
        folder = self._files.folder / name
        return ArrayFolder(folder) if _is_complete(folder) else None


def _store_key(path: Path, encoder: Encoder) -> str:
    """16 hex digits that differ when the file, the encoder or the format differs."""
    stat = path.stat()
    digest = hashlib.sha256()
    digest.update(f"{FORMAT_VERSION} {stat.st_size} {stat.st_mtime_ns} {encoder.key}".encode())
    last = max(0, stat.st_size - SAMPLED_BLOCK_BYTES)
    with path.open("rb") as file:
        for block in range(SAMPLED_BLOCKS):
            file.seek(last * block // (SAMPLED_BLOCKS - 1))
            digest.update(file.read(SAMPLED_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def _build_store(path: Path, encoder: Encoder, batch_bytes: int, folder: Path) -> dict[str, Any]:
    """Write the store's arrays into `folder` and return its meta."""
    before = path.stat()
    bad_lines = BadLines()
    dtypes = {
        "ids": encoder.dtype,
        "offsets": INDEX_DTYPE,
        "lines": INDEX_DTYPE,
        "bytes": INDEX_DTYPE,
        **dict.fromkeys(encoder.counted, INDEX_DTYPE),
    }
    if encoder.weighted:
        dtypes["weights"] = WEIGHT_DTYPE

    end = 0
    content = hashlib.sha256()
    with ArrayWriter(folder, **dtypes) as writer, _progress(path, before.st_size) as progress:
        writer.append("offsets", [0])
        for batch in _read_batches(path, encoder, bad_lines, batch_bytes):
            encoded = encoder.encode([parsed.record for parsed in batch.parsed])
            offsets = end + np.cumsum(encoded.lengths, dtype=np.int64)
            end += len(encoded.ids)
            content.update(np.ascontiguousarray(encoded.ids))
            content.update(offsets)
            writer.append("ids", encoded.ids)
            writer.append("offsets", offsets)
            each = len(encoded.lengths) // max(1, len(batch.parsed))
            writer.append("lines", np.repeat(batch.lines, each))
            writer.append("bytes", np.repeat([p.text_bytes for p in batch.parsed], each))
            for i, name in enumerate(encoder.counted):
                writer.append(name, np.repeat([p.counts[i] for p in batch.parsed], each))
            if encoder.weighted:
                content.update(encoded.weights)
                writer.append("weights", encoded.weights)
            progress.update(batch.file_bytes)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{path}: changed while it was being read; start again")
    return {
        "source": path.name,
        "encoder": encoder.key,
        "arrays": writer.description(),
        "content": content.hexdigest(),
        "bad_lines": asdict(bad_lines),
    }


class _Batch(NamedTuple):
    """Consecutive records: the good ones and their lines; the bytes of all."""

    lines: list[int]
    parsed: list[Parsed]
    file_bytes: int


def _read_batches(
    path: Path, encoder: Encoder, bad_lines: BadLines, batch_bytes: int
) -> Iterator[_Batch]:
    """Parse the file in batches of at least `batch_bytes`, the last one excepted."""
    lines: list[int] = []
    parsed: list[Parsed] = []
    file_bytes = 0
    for line, content in read_records(path):
        file_bytes += len(content)
        bad_lines.total += 1
        try:
            parsed.append(encoder.parse(content))
        except RecordError as error:
            bad_lines.add(line, str(error))
        else:
            lines.append(line)
        if file_bytes >= batch_bytes:
            yield _Batch(lines, parsed, file_bytes)
            lines, parsed, file_bytes = [], [], 0
    yield _Batch(lines, parsed, file_bytes)


def _progress(path: Path, size: int) -> tqdm:
    """A bar in bytes of the file, on rank 0; where it is no terminal, a line now and then."""
    return tqdm(
        total=size,
        desc=f"tokenising {path.name}",
        unit="B",
        unit_scale=True,
        delay=1.0,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        disable=int(os.environ.get("RANK", "0")) > 0,
    )
