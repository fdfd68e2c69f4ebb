"""The tokenizer of a run."""

from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer from a local folder; nothing is fetched.

    Raises:
        UserError: if the folder holds none, or one without tokens that begin and end a text.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast  # which takes a second: not for --help

    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer_path {folder}: no tokenizer.json there")
    try:
        Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # which is what the tokenizers library raises
        raise UserError(f"--tokenizer_path {folder}: cannot be loaded ({error})") from None
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"--tokenizer_path {folder}: it has no bos or no eos token")
    return tokenizer
