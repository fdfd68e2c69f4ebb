"""The files of the sample: written when they are first asked for, the same bytes everywhere."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..records import DataError
from ..token_store import POLL_SECONDS
from .conversations import adapter_records, preference_records, test_records, tuning_records
from .documents import pretraining_texts
from .world import World, build_world

SAMPLE = Path(__file__).resolve().parent
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


def write_sample(folder: Path, seed: int = SEED, names: Iterable[str] = FILES) -> dict[str, int]:
    """Write files of the sample into a folder, each at once.

    Args:
        folder: made if it is missing.
        seed: of the world and of all else that is drawn.
        names: of the files, keys of FILES.

    Returns:
        The number of lines of each file.

    Raises:
        OSError: if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world, counts = build_world(seed), {}
    for name in names:
        lines = [
            json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"
            for record in FILES[name](world, seed)
        ]
        temporary = folder / f"{name}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(b"".join(lines))
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)
        counts[name] = len(lines)
    return counts


def ensure_sample(path: str | Path) -> Path:
    """Write a file of the sample if it is one and not there yet; any other path is left alone.

    One process writes it. The others wait, since a file's time of change tells its stores apart:
    under torchrun for the first process of their host, else for the one that holds the lock.

    Raises DataError if it cannot be written.
    """
    path = Path(path)
    if path.name not in FILES or path.exists() or path.resolve().parent != SAMPLE:
        return path
    if "WORLD_SIZE" in os.environ and int(os.environ.get("LOCAL_RANK", "0")) > 0:
        while not path.exists():
            time.sleep(POLL_SECONDS)
        return path
    try:
        with FileLock(f"{path}.lock"):
            if not path.exists():
                write_sample(SAMPLE, names=[path.name])
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None
    return path
