"""Tokenise a data file once, into a memory-mapped store beside it.

The store of `data.jsonl` is the folder `data.jsonl.{key}.tokens/`, as `dataset.arrays` makes it:

    ids        token ids of all documents in file order, uint16 or uint32
    offsets    (documents + 1,) int64; document d is ids[offsets[d] : offsets[d + 1]]
    lines      (documents,) int64; the line that each document begins on, from 1
    …          (documents,) int64; whatever the encoder counts in each, by its name
    meta.json  what it was made of, and the bad lines that were found

and of conversations:

    weights    float32; how much each id counts as a target
    messages   int64; the place in `ids` of the first id of each message
    roles      uint8; the role of each message, as an index of `ROLES`

Tables derived from a store are folders inside it.
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from common import UserError

from .arrays import INDEX_DTYPE, Append, ArrayFolder, build_once
from .fields import RecordError
from .reader import check_file, read_records
from .records import BadLines

FORMAT_VERSION = 3
BATCH_BYTES = 1 << 21  # of lines encoded at a time; the library's results take 50 times as much
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

    def parse(self, line: bytes) -> Parsed:
        """What `encode` takes, and counts. Raises RecordError."""

    def encode(self, records: Sequence[Any]) -> Encoded:
        """The documents of each record in turn, as many of each, of at least two ids."""


class TokenStore:
    """The documents of one data file as token ids on disk.

    `path` is the file, `arrays` in `folder` are those of this module's docstring, `bad_lines` gave
    no document. `content`, a sha256 of the ids, identifies the documents wherever the file lies.
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
        """Open the store of a data file, and build it first if need be.

        It is in the folder `cache_dir`, or that of the file. Bad lines are left out if they are at
        most the share `skip_bad_lines`. UserError if the file cannot be used, more of its lines are
        bad, no good line is left, or the store cannot be written.
        """
        path = Path(path)
        check_file(path)
        parent = path.parent if cache_dir is None else Path(cache_dir)
        folder = parent / f"{path.name}.{_store_key(path, encoder)}.tokens"
        indices = dict.fromkeys(("offsets", "lines", *encoder.counted), INDEX_DTYPE)
        dtypes = {"ids": encoder.dtype, **indices, **(CHAT_DTYPES if encoder.is_chat else {})}
        store = cls(path, build_once(folder, dtypes, partial(_fill_store, path, encoder)))
        store.bad_lines.check(path, skip_bad_lines)
        if len(store.lines) == 0:
            raise UserError(f"{path}: not one good line in {store.bad_lines.total:,}")
        return store

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


def _fill_store(path: Path, encoder: Encoder, append: Append) -> dict[str, Any]:
    """Write the store's arrays and return its meta."""
    before = path.stat()
    bad_lines = BadLines()
    end = 0
    content = hashlib.sha256()
    append(offsets=[0])
    progress = tqdm(
        total=before.st_size,
        desc=f"tokenising {path.name}",
        unit="B",
        unit_scale=True,
        delay=1.0,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        disable=int(os.environ.get("RANK", "0")) > 0,
    )
    with progress:
        for lines, parsed, n_bytes in _read_batches(path, encoder, bad_lines):
            encoded = encoder.encode([record for record, _ in parsed])
            offsets = end + encoded.offsets[1:]
            content.update(np.ascontiguousarray(encoded.ids))
            content.update(offsets)
            each = len(encoded.lengths) // max(1, len(parsed))  # documents of a record
            append(ids=encoded.ids, offsets=offsets, lines=np.repeat(lines, each))
            for i, name in enumerate(encoder.counted):
                append(**{name: np.repeat([counts[i] for _, counts in parsed], each)})
            if encoder.is_chat:
                content.update(encoded.weights)
                append(
                    weights=encoded.weights, messages=end + encoded.messages, roles=encoded.roles
                )
            end += len(encoded.ids)
            progress.update(n_bytes)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{path}: changed while it was being read; start again")
    return {
        "source": path.name,
        "encoder": encoder.key,
        "content": content.hexdigest(),
        "bad_lines": asdict(bad_lines),
    }


def _read_batches(
    path: Path, encoder: Encoder, bad_lines: BadLines
) -> Iterator[tuple[list[int], list[Parsed], int]]:
    """Parse the file in batches of at least BATCH_BYTES, the last one excepted.

    Yields the lines of the good records, these records, and the bytes of all.
    """
    lines, parsed, n_bytes = [], [], 0
    for line, content in read_records(path):
        n_bytes += len(content)
        bad_lines.total += 1
        try:
            parsed.append(encoder.parse(content))
            lines.append(line)
        except RecordError as error:
            bad_lines.add(line, str(error))
        if n_bytes >= BATCH_BYTES:
            yield lines, parsed, n_bytes
            lines, parsed, n_bytes = [], [], 0
    yield lines, parsed, n_bytes
