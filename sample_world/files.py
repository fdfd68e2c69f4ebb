"""The files of the sample: written when they are first needed, the same bytes on every platform.

Each has a `.version` file beside it: a digest of the generator, its templates and its seed. A file
of another version is written anew; one without a `.version` belongs to the user and is left alone.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from common import ROOT, UserError
from dataset.arrays import POLL_SECONDS

from .conversations import (
    adapter_records,
    preference_records,
    test_records,
    tuning_records,
)
from .documents import pretraining_texts
from .world import World, build_world

SAMPLE = ROOT / "dataset" / "sample"
SEED = 2024
PRETRAINING_BYTES = 3_000_000  # of text in pretrain.jsonl, at most


def _pretraining_records(world: World, seed: int) -> Iterator[dict[str, Any]]:
    left = PRETRAINING_BYTES
    for text in pretraining_texts(world, seed):
        left -= len(text.encode("utf-8"))
        if left < 0:
            return
        yield {"text": text}


FILES = {
    "pretrain.jsonl": _pretraining_records,
    "sft.jsonl": tuning_records,
    "sft_tools.jsonl": partial(tuning_records, apart=True),
    "test.jsonl": test_records,
    "test_tools.jsonl": lambda world, seed: test_records(world, seed, "tools"),
    "test_thinking.jsonl": lambda world, seed: test_records(world, seed, "thinking"),
    "dpo.jsonl": lambda world, seed: preference_records(world, seed, testing=False),
    "dpo_test.jsonl": lambda world, seed: preference_records(world, seed, testing=True),
    "lora.jsonl": lambda world, seed: adapter_records(world, seed, testing=False),
    "lora_test.jsonl": lambda world, seed: adapter_records(world, seed, testing=True),
}


def sample_version(seed: int) -> str:
    """A digest of everything that determines the content of the files: code, templates, seed."""
    digest = hashlib.sha256(str(seed).encode("utf-8"))
    folder = Path(__file__).parent
    for source in sorted([*folder.glob("*.py"), *(folder / "templates").glob("*.txt")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _version_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.version")


def _is_current(path: Path, version: str) -> bool:
    note = _version_file(path)
    return path.is_file() and (
        not note.is_file() or note.read_text(encoding="utf-8").strip() == version
    )


def write_sample(folder: Path, seed: int = SEED, names: Iterable[str] = FILES) -> list[Path]:
    """Write files of the sample into a folder, each atomically; those that are current stay.

    Args:
        folder: folder to write into; made if it is missing.
        seed: seed of the world and of everything else that is drawn.
        names: names of the files, keys of FILES.

    Returns:
        The files that were written.

    Raises:
        OSError: if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    version = sample_version(seed)
    paths = [folder / name for name in names if not _is_current(folder / name, version)]
    world = build_world(seed)
    for path in paths:
        lines = [
            json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"
            for record in FILES[path.name](world, seed)
        ]
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(b"".join(lines))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _version_file(path).write_text(version, encoding="utf-8")
    return paths


def ensure_sample(path: str | Path) -> Path:
    """Write a file of the sample if it is missing or not current; any other path is left alone.

    One process writes it: under torchrun the first of each host, else the one that gets the lock.
    The others wait, because a file's modification time identifies its token stores.

    Raises:
        UserError: if it cannot be written.
    """
    path = Path(path)
    if path.name not in FILES or path.resolve().parent != SAMPLE:
        return path
    version = sample_version(SEED)
    if _is_current(path, version):
        return path
    if "WORLD_SIZE" in os.environ and int(os.environ.get("LOCAL_RANK", "0")) > 0:
        while not _is_current(path, version):
            time.sleep(POLL_SECONDS)
        return path
    try:
        with FileLock(f"{path}.lock"):
            if not _is_current(path, version):
                write_sample(SAMPLE, names=[path.name])
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return path
