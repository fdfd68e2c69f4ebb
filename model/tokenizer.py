"""Loading and identifying a tokenizer."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from common import UserError

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
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("padding", "truncation", "post_processor"):
        parts.pop(name)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()
