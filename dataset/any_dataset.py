"""Open a JSONL file of either kind, whichever it is."""

from pathlib import Path
from typing import Any

from .lm_dataset import PretrainDataset, SFTDataset
from .records import check_file


def open_dataset(
    path: str | Path,
    tokenizer: Any,
    max_length: int,
    *,
    cache_dir: str | Path | None = None,
    skip_bad_lines: bool = False,
) -> PretrainDataset | SFTDataset:
    """The samples of a file, whichever `dataset_kind` it is.

    Args:
        path: of the file.
        tokenizer: with this project's chat template.
        max_length: the most ids of an item.
        cache_dir, skip_bad_lines: as for `TokenStore.open_or_build`.

    Raises:
        DataError: as the classes.
    """
    kind = dataset_kind(path)
    return kind(path, tokenizer, max_length, cache_dir=cache_dir, skip_bad_lines=skip_bad_lines)


def dataset_kind(path: str | Path) -> type[PretrainDataset] | type[SFTDataset]:
    """What a file holds: texts if its first line has a "text", else conversations.

    Blank lines do not count: what is wrong with them is told of either kind.

    Raises:
        DataError: if there is no such file.
    """
    path = Path(path)
    check_file(path)
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    # A bad line of either kind must be named as what it is.
    is_chat = any(name in first for name in (b'"conversations"', b'"messages"', b'"instruction"'))
    return PretrainDataset if b'"text"' in first and not is_chat else SFTDataset
