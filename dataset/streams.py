"""A file as a stream of UTF-8: unpacked if it is compressed, recoded if it is UTF-16."""

import bz2
import codecs
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from common import UserError

CHUNK_BYTES = 1 << 20
PACKED_BYTES = 1 << 16  # of zstd unpacked at a time; they may become a thousand times as many
SUFFIXES = {".gz", ".bz2", ".xz", ".zst"}  # of compressed files
# What reading a damaged file raises, besides OSError.
DAMAGED = (EOFError, lzma.LZMAError, zlib.error)


def need(module: str, path: Path, packages: str = "-r dataset/requirements.txt") -> ModuleType:
    """Import what a container needs; UserError that says how to install it: which `packages`."""
    try:
        return importlib.import_module(module)
    except ImportError:
        library = module.partition(".")[0]
        install = f"needs {library}: pip install {packages}"
        raise UserError(f"{path}: {install}") from None


def open_stream(path: Path) -> BinaryIO:
    """Open a file for reading bytes, of text in UTF-8 if it is text, from its beginning on.

    While it is read, `DAMAGED` or OSError is raised if it is broken or cut off. UserError if a
    library is missing.
    """
    file = _unpack(path)
    start = file.peek(4)[:4]
    mark = start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and start[2:] != b"\0\0"
    return _as_stream(_recode(file)) if mark else file


def _unpack(path: Path) -> io.BufferedReader:
    with path.open("rb") as file:
        start = file.read(6)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        zstandard = need("zstandard", path)
        return _as_stream(_unpack_zstd(path, zstandard))
    for magic, unpacked in (
        (b"\x1f\x8b", gzip.GzipFile),
        (b"BZh", bz2.BZ2File),
        (b"\xfd7zXZ\0", lzma.LZMAFile),
    ):
        if start.startswith(magic):
            return io.BufferedReader(unpacked(path), CHUNK_BYTES)
    return path.open("rb", buffering=CHUNK_BYTES)


def _unpack_zstd(path: Path, zstandard: ModuleType) -> Iterator[bytes]:
    """The contents of all frames of a zstd file."""
    with path.open("rb") as file:
        packed, frame = file.read(PACKED_BYTES), None
        try:
            while packed:
                if frame is None:
                    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
                    frame = unpacker.decompressobj()
                yield frame.decompress(packed)
                packed = b""
                if frame.eof:
                    packed, frame = frame.unused_data, None
                packed = packed or file.read(PACKED_BYTES)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
    if frame is not None:
        raise EOFError("the last frame is not complete")


def _recode(file: BinaryIO) -> Iterator[bytes]:
    """UTF-16 that begins with its mark, as UTF-8; characters that are broken become `�`."""
    decoder = codecs.getincrementaldecoder("utf-16")(errors="replace")
    with file:
        while chunk := file.read(CHUNK_BYTES):
            yield decoder.decode(chunk).encode("utf-8", "replace")
        yield decoder.decode(b"", final=True).encode("utf-8", "replace")


class _Pieces(io.RawIOBase):
    """A stream of the bytes that an iterator gives piece by piece."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer as far as one piece does; the number of bytes, 0 at the end."""
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _as_stream(pieces: Iterator[bytes]) -> io.BufferedReader:
    return io.BufferedReader(_Pieces(pieces), CHUNK_BYTES)
