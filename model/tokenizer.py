"""Loading and identifying a tokenizer."""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from common import TOKENIZER, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"  # by its name: slow to import


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a tokenizer from a local folder; nothing is fetched.

    Raises UserError if the folder holds none, or one without tokens that begin and end a text.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast  # slow to import: not for --help

    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer_path {folder}: no tokenizer.json there")
    try:
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise UserError(f"--tokenizer_path {folder}: cannot be loaded ({error})") from None
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"--tokenizer_path {folder}: it has no bos or no eos token")
    return tokenizer


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of tokenizer.json, without limits of lengths and what adds control tokens to a text.

    The latter is not used here, and differs between versions of transformers.
    """
    return _hash(json.loads(tokenizer.backend_tokenizer.to_str()))


def _hash(parts: dict[str, Any]) -> str:
    """`tokenizer_hash` of the parsed tokenizer.json."""
    unused = ("padding", "truncation", "post_processor")
    parts = {name: part for name, part in parts.items() if name not in unused}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()


def kept_tokenizer(out_dir: Path, hash_: str) -> Path:
    """The folder in which runs keep the tokenizer of their weights."""
    return out_dir / "tokenizers" / hash_


def keep_tokenizer(tokenizer: Tokenizer, out_dir: Path, hash_: str) -> None:
    """Write a tokenizer to its `kept_tokenizer`, unless it is there. Raises OSError."""
    folder = kept_tokenizer(out_dir, hash_)
    if (folder / "tokenizer.json").is_file():
        return
    temporary = folder.with_name(f".{hash_}.{os.getpid()}.tmp")
    try:
        tokenizer.save_pretrained(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "tokenizer.json").is_file():  # else another run was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def find_tokenizer(folder: Path, hash_: str) -> Path | None:
    """The folder of the tokenizer of that hash, for weights in `folder`; None if it is not found.

    It is one of `tokenizer_files`.
    """
    folders = [path.parent for path in tokenizer_files(folder, hash_)]
    for has_hash in (text_has_hash, _tokenizer_has_hash):
        for candidate in folders:
            if has_hash(candidate, hash_):
                return candidate
    return None


def tokenizer_files(folder: Path, hash_: str) -> list[Path]:
    """The tokenizer.json files that weights in `folder` may belong to, the nearest first.

    They are in `kept_tokenizer`, the folder itself or its `tokenizer`, or one of the folders above,
    as of out/lora and out/replaced/NAME; the last one ships with the project.
    """
    places = (folder, folder.parent, folder.parent.parent)
    near = [
        path for place in places for path in (kept_tokenizer(place, hash_), place / "tokenizer")
    ]
    files = (candidate / "tokenizer.json" for candidate in (*near, folder, TOKENIZER))
    return [path for path in files if path.is_file()]


def text_has_hash(folder: Path, hash_: str) -> bool:
    """Whether tokenizer.json is as today's versions write it, and of that hash. Loads nothing."""
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return _hash(json.loads(text)) == hash_
    except (OSError, ValueError, AttributeError):  # gone meanwhile, or damaged
        return False


def _tokenizer_has_hash(folder: Path, hash_: str) -> bool:
    """Whether the tokenizer is of that hash once it is loaded, which brings it into one form."""
    with suppress(UserError):
        return tokenizer_hash(load_tokenizer(folder)) == hash_
    return False
