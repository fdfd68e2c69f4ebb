"""Open a data file of either kind, whichever it is."""

from pathlib import Path
from typing import Any

from .lm_dataset import PretrainDataset, SFTDataset
from .reader import read_records


def open_dataset(
    path: str | Path,
    tokenizer: Any,
    max_length: int,
    *,
    cache_dir: str | Path | None = None,
    skip_bad_lines: float = 0.0,
) -> PretrainDataset | SFTDataset:
    """The samples of a file, whichever `dataset_kind` it is.

    Args:
        path: of the file.
        tokenizer: with this project's chat template.
        max_length: the most ids of an item.
        cache_dir, skip_bad_lines: as for `TokenStore.open_or_build`.

    Raises:
        UserError: as the classes.
    """
    kind = dataset_kind(path)
    return kind(path, tokenizer, max_length, cache_dir=cache_dir, skip_bad_lines=skip_bad_lines)


def dataset_kind(path: str | Path) -> type[PretrainDataset] | type[SFTDataset]:
    """What a file holds: texts if its first record has a "text", else conversations.

    Raises:
        UserError: as `read_records`.
    """
    _, first = next(read_records(Path(path)), (0, b""))
    # A bad record of either kind must be named as what it is.
    is_chat = any(name in first for name in (b'"conversations"', b'"messages"', b'"instruction"'))
    return PretrainDataset if b'"text"' in first and not is_chat else SFTDataset
