"""The files of the sample: written when they are first asked for, the same bytes everywhere.

Beside each stands a `.version`: a digest of the generator and its seed. A file of another version
is written anew; one without is somebody's own.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
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
    "test.jsonl": test_records,
    "dpo.jsonl": lambda world, seed: preference_records(world, seed, testing=False),
    "dpo_test.jsonl": lambda world, seed: preference_records(world, seed, testing=True),
    "lora.jsonl": lambda world, seed: adapter_records(world, seed, testing=False),
    "lora_test.jsonl": lambda world, seed: adapter_records(world, seed, testing=True),
}


def sample_version(seed: int) -> str:
    """A digest of all that decides what the files hold."""
    digest = hashlib.sha256(str(seed).encode("utf-8"))
    for source in sorted(Path(__file__).parent.glob("*.py")):
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
    """Write files of the sample into a folder, each at once, and none that is there already.

    Args:
        folder: made if it is missing.
        seed: of the world and of all else that is drawn.
        names: of the files, keys of FILES.

    Returns:
        The files that it wrote.

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
    """Write a file of the sample if it is one and not there yet; any other path is left alone.

    One process writes it. The others wait, since a file's time of change tells its stores apart:
    under torchrun for the first process of their host, else for the one that holds the lock.

    Raises UserError if it cannot be written.
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
