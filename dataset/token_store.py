"""Tokenise a source of data once, into a memory-mapped store.

The store of `data.jsonl` is the folder `data.jsonl.{key}.tokens/` beside
it, as `dataset.arrays` makes it:

    ids        token ids of all documents in file order, uint16 or uint32
    offsets    (documents + 1,) int64; document d is ids[offsets[d] : offsets[d + 1]]
    lines      (documents,) int64; the line that each document begins on, from 1
    files      (documents,) int32; the file of each, as an index of `files` in meta.json
    …          (documents,) int64; what the encoder counts in each, by its name
    meta.json  what it was made of, and the bad lines that were found

and of conversations:

    weights    float32; how much each id counts as a target
    messages   int64; the place in `ids` of the first id of each message
    roles      uint8; the role of each message, as an index of `ROLES`

Tables derived from a store are folders inside it.
"""

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from common import ROOT, UserError

from .arrays import INDEX_DTYPE, LENGTH_DTYPE, Append, ArrayFolder, build_once
from .columns import hub_name, is_on_hub
from .fields import RecordError
from .reader import Place, Record, check_source, find_files, locate, read_records
from .records import BadLines, LeftOut, RecordOptions

FORMAT_VERSION = 4
HUB_STORES = ROOT / "dataset" / "hub"  # where stores of data sets on a hub go
BATCH_BYTES = 1 << 21  # of records encoded at a time; the library's results take 50 times as much
SAMPLED_BLOCKS = 16
SAMPLED_BLOCK_BYTES = 1 << 16

ROLES = ("system", "user", "assistant", "tool")
Parsed = tuple[Any, tuple[int, ...]]  # what an encoder takes, and what it counts in it
CHAT_DTYPES = {"weights": np.dtype("<f4"), "messages": INDEX_DTYPE, "roles": np.dtype("u1")}


class Encoded(NamedTuple):
    """Documents as numbers, one after the other; the last three fields of conversations only."""

    ids: np.ndarray  # (N,) of an integer dtype
    lengths: np.ndarray  # (documents,) int64, in ids
    weights: np.ndarray | None = None  # (N,) float32, how much each id counts as a target
    messages: np.ndarray | None = None  # (messages,) int64, the place of each one's first id
    roles: np.ndarray | None = None  # (messages,) uint8, the role of each as an index of ROLES

    @property
    def offsets(self) -> np.ndarray:
        """(documents + 1,) int64, where each document begins, and the end."""
        return np.append(0, np.cumsum(self.lengths, dtype=np.int64))


class Encoder(Protocol):
    """How the records of a file become ids."""

    key: str  # differs wherever the ids would
    dtype: np.dtype
    is_chat: bool
    counted: tuple[str, ...]  # names of what `parse` counts
    options: RecordOptions

    def prepare(
        self, records: Iterable[tuple[Place, Record]], bad_lines: BadLines
    ) -> Iterable[tuple[Place, Record]]:
        """The records that `parse` gets of those of a source; `bad_lines` counts what it drops."""

    def parse(self, record: Record) -> Parsed:
        """What `encode` takes, and counts. Raises RecordError, or LeftOut of a good record."""

    def encode(self, records: Sequence[Any]) -> Encoded:
        """The documents of each record in turn, as many of each, of at least two ids."""


class TokenStore:
    """The documents of one source as token ids on disk.

    `path` is the source as `read_records` takes it, `arrays` in `folder` are those of this module's
    docstring, `bad_lines` gave no document. `content`, a sha256 of the ids, identifies the
    documents wherever the source lies.
    """

    def __init__(self, path: Path, files: ArrayFolder) -> None:
        self.path, self._files = path, files
        self.folder, self.arrays = files.folder, files.arrays
        self.ids, self.offsets, self.lines = (self.arrays[n] for n in ("ids", "offsets", "lines"))
        self.bad_lines = BadLines(**files.meta["bad_lines"])
        self.content: str = files.meta["content"]

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path, ArrayFolder]]:
        return TokenStore, (self.path, self._files)

    @classmethod
    def open_or_build(
        cls,
        path: str | Path,
        encoder: Encoder,
        *,
        cache_dir: str | Path | None = None,
        skip_bad_lines: float = 0.0,
    ) -> "TokenStore":
        """Open the store of a source, and build it first if need be.

        It is in the folder `cache_dir`, or that of the source. Bad lines are left out if they are
        at most the share `skip_bad_lines`. UserError if the source cannot be used, more of its
        lines are bad, no good line is left, or the store cannot be written.
        """
        path = Path(path)
        check_source(path)
        beside = HUB_STORES if is_on_hub(path) else path.parent
        if "*" in str(beside):  # a pattern of folders
            beside = Path(*beside.parts[: next(i for i, p in enumerate(beside.parts) if "*" in p)])
        parent = beside if cache_dir is None else Path(cache_dir)
        name = hub_name(path) if is_on_hub(path) else path.name or path.resolve().name
        name = re.sub(r"[^\w. -]+", "_", name)
        folder = parent / f"{name}.{_store_key(path, encoder)}.tokens"
        indices = dict.fromkeys(("offsets", "lines", *encoder.counted), INDEX_DTYPE)
        dtypes = {
            "ids": encoder.dtype,
            "files": LENGTH_DTYPE,
            **indices,
            **(CHAT_DTYPES if encoder.is_chat else {}),
        }
        store = cls(path, build_once(folder, dtypes, partial(_fill_store, path, encoder)))
        store.bad_lines.check(path, skip_bad_lines)
        if len(store.lines) == 0:
            total = store.bad_lines.total
            hint = "scripts/check_data.py shows what it holds"
            raise UserError(f"{path}: not one good line in {total:,}; {hint}")
        return store

    def place(self, document: int) -> str:
        """`file:line` of a document."""
        name = self._files.meta["files"][self.arrays["files"][document]]
        return locate(self.path, Place(name, int(self.lines[document])))

    def read(self, first: int, stop: int) -> Encoded:
        """The documents from `first` up to `stop`, as the encoder gave them."""
        begin, end = self.offsets[first], self.offsets[stop]
        encoded = Encoded(self.ids[begin:end], np.diff(self.offsets[first : stop + 1]))
        if "messages" not in self.arrays:
            return encoded
        messages = slice(*np.searchsorted(self.arrays["messages"], (begin, end)))
        return encoded._replace(
            weights=self.arrays["weights"][begin:end],
            messages=self.arrays["messages"][messages] - begin,
            roles=self.arrays["roles"][messages],
        )


def _store_key(path: Path, encoder: Encoder) -> str:
    """16 hex digits that differ when the source, the encoder or the format differs.

    Of a single file they depend on samples of its content, of several on their sizes and times, and
    of a data set on a hub on its name alone.
    """
    digest = hashlib.sha256(f"{FORMAT_VERSION} {encoder.key}".encode())
    if is_on_hub(path):
        digest.update(hub_name(path).encode())
        return digest.hexdigest()[:16]
    files = find_files(path)
    for file in files:
        stat = file.stat()
        name = "" if file == path else file.as_posix()
        digest.update(f" {name} {stat.st_size} {stat.st_mtime_ns}".encode())
    if files == [path]:
        last = max(0, path.stat().st_size - SAMPLED_BLOCK_BYTES)
        with path.open("rb") as file:
            for block in range(SAMPLED_BLOCKS):
                file.seek(last * block // (SAMPLED_BLOCKS - 1))
                digest.update(file.read(SAMPLED_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def _fill_store(path: Path, encoder: Encoder, append: Append) -> dict[str, Any]:
    """Write the store's arrays and return its meta."""
    before = _stamps(path)
    bad_lines = BadLines()
    files: dict[str, int] = {}
    end = 0
    content = hashlib.sha256()
    append(offsets=[0])
    progress = tqdm(
        total=sum(size for size, _ in before) if _is_plain(path) else None,
        desc=f"tokenising {path.name}",
        unit="B",
        unit_scale=True,
        delay=1.0,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        disable=int(os.environ.get("RANK", "0")) > 0,
    )
    with progress:
        for places, parsed, n_bytes in _read_batches(path, encoder, bad_lines):
            encoded = encoder.encode([record for record, _ in parsed])
            offsets = end + encoded.offsets[1:]
            content.update(np.ascontiguousarray(encoded.ids))
            content.update(offsets)
            each = len(encoded.lengths) // max(1, len(parsed))  # documents of a record
            append(ids=encoded.ids, offsets=offsets)
            append(lines=np.repeat([place.line for place in places], each))
            numbers = [files.setdefault(place.file, len(files)) for place in places]
            append(files=np.repeat(numbers, each))
            for i, name in enumerate(encoder.counted):
                append(**{name: np.repeat([counts[i] for _, counts in parsed], each)})
            if encoder.is_chat:
                content.update(encoded.weights)
                append(
                    weights=encoded.weights, messages=end + encoded.messages, roles=encoded.roles
                )
            end += len(encoded.ids)
            progress.update(n_bytes)
    if _stamps(path) != before:
        raise UserError(f"{path}: changed while it was being read; start again")
    return {
        "source": path.name,
        "files": list(files),
        "encoder": encoder.key,
        "content": content.hexdigest(),
        "bad_lines": asdict(bad_lines),
    }


def _stamps(path: Path) -> list[tuple[int, int]]:
    """Size and time of each file of a source."""
    stats = [] if is_on_hub(path) else [file.stat() for file in find_files(path)]
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def _is_plain(path: Path) -> bool:
    """Whether the records of a source take as many bytes as its files."""
    return path.suffix in (".jsonl", ".json", ".txt", ".md")


def _read_batches(
    path: Path, encoder: Encoder, bad_lines: BadLines
) -> Iterator[tuple[list[Place], list[Parsed], int]]:
    """Parse the source in batches of at least BATCH_BYTES, the last one excepted.

    Yields the places of the good records, these records, and the bytes of all.
    """
    places, parsed, n_bytes = [], [], 0

    def read() -> Iterator[tuple[Place, Record]]:
        nonlocal n_bytes
        for place, record in read_records(path, encoder.options.separator):
            n_bytes += len(record if isinstance(record, bytes) else repr(record))
            yield place, record

    for place, record in encoder.prepare(read(), bad_lines):
        bad_lines.total += 1
        try:
            parsed.append(encoder.parse(record))
            places.append(place)
        except RecordError as error:
            bad_lines.add(place, str(error))
        except LeftOut as reason:
            bad_lines.leave_out(str(reason))
        if n_bytes >= BATCH_BYTES:
            yield places, parsed, n_bytes
            places, parsed, n_bytes = [], [], 0
    yield places, parsed, n_bytes
