"""Records of files that keep them by column, and of data sets that their own libraries read."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from common import UserError

from .streams import need

ROWS = 256  # that are in memory together
SCHEMES = ("hf:", "ms:")  # what the paths of data sets on a hub begin with
MODELSCOPE = '-U "modelscope[datasets]"'  # what ms: needs; it takes datasets up to 4.8 alone

Row = tuple[int, dict[str, Any]]  # its number, from 1, and its values by column


def check_columns(names: Iterable[str], place: object) -> None:
    """Raise UserError, with the place of the names, if two columns have the same one."""
    for name, number in Counter(filter(None, names)).items():
        if number > 1:
            raise UserError(f'{place}: {number} columns have the name "{name}"; rename or drop one')


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file. UserError if it is damaged, or pyarrow is not installed."""
    pyarrow, parquet = need("pyarrow", path), need("pyarrow.parquet", path)
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            check_columns(file.schema_arrow.names, path)
            batches = file.iter_batches(ROWS, use_threads=False)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: broken Parquet ({_first_line(error)})") from None


def read_arrow(path: Path) -> Iterator[Row]:
    """The rows of an Arrow file, of either of its two formats; errors as of `read_parquet`."""
    pyarrow, ipc = need("pyarrow", path), need("pyarrow.ipc", path)
    try:
        with pyarrow.memory_map(str(path)) as file:
            is_stream = file.read(6) != b"ARROW1"
            file.seek(0)
            reader = ipc.open_stream(file) if is_stream else ipc.open_file(file)
            check_columns(reader.schema.names, path)
            if is_stream:
                batches = iter(reader)
            else:
                batches = map(reader.get_batch, range(reader.num_record_batches))
            parts = (batch[i : i + ROWS] for batch in batches for i in range(0, len(batch), ROWS))
            yield from enumerate((row for part in parts for row in part.to_pylist()), 1)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: broken Arrow data ({_first_line(error)})") from None


def saved_files(folder: Path) -> list[Path] | None:
    """The Arrow files of a folder that `Dataset.save_to_disk` wrote; None of any other folder.

    UserError if the folder holds several splits: one of them has to be named.
    """
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
        raise UserError(f"{folder}: holds splits; name one: {', '.join(names)} in this folder")
    state = folder / "state.json"
    if not (state.is_file() and (folder / "dataset_info.json").is_file()):
        return None
    files = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
    return [folder / file["filename"] for file in files]


def is_on_hub(path: Path) -> bool:
    """Whether a path is that of a data set on a hub, which `read_hub` takes."""
    return len(path.parts) > 1 and path.parts[0] in SCHEMES


def read_hub(path: Path) -> Iterator[Row]:
    """The records of a data set on the Hugging Face hub or ModelScope, as they are downloaded.

    The path is `hf://NAME[/CONFIG][:SPLIT]`, or `ms://…`; the split is train unless it names
    another, and `:SPLIT[:1000]` are its first thousand records. UserError if there is no such data
    set, it cannot be reached, or the hub's library is not installed.
    """
    scheme, *parts = path.parts
    parts[-1], _, split = parts[-1].partition(":")
    split, _, first = split.removesuffix("]").partition("[:")
    name, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
    failures: tuple[type[Exception], ...] = (OSError, ValueError)
    try:
        if scheme == "hf:":
            load = need("datasets", path).load_dataset
            records = load(name, config, split=split or "train", streaming=True)
        else:
            hub = need("modelscope.msdatasets", path, MODELSCOPE).MsDataset
            failures += (need("modelscope_hub.errors", path, MODELSCOPE).HubError,)
            records = hub.load(name, subset_name=config, split=split or "train", use_streaming=True)
        yield from zip(count(1), islice(records, int(first) if first else None))
    except failures as error:
        raise UserError(f"{hub_name(path)}: {_first_line(error)}") from None


def hub_name(path: Path) -> str:
    """The path of a data set on a hub as people write it, with both slashes."""
    return path.as_posix().replace(":/", "://", 1)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
