"""Text as token ids: the tokenizer as training uses it, and the documents of pretraining."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from common import UserError
from model import tokenizer_hash

from .reader import Place, Record
from .records import DEFAULT, BadLines, RecordOptions, parse_text
from .token_store import Encoded, Parsed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE_CHARS = 1 << 16  # longer texts are encoded in pieces
BATCH_PIECES = 1024  # that are encoded together: enough to occupy all cores

LANGUAGES = ("Chinese", "English", "code/other")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LATIN = re.compile(r"[A-Za-z]")
_SPACE = re.compile(r"\s+")


class TextTokenizer:
    """Text to ids by a private copy of a tokenizer, such that no text can produce a control token.

    `special` has the ids that no text gives, by token; `dtype`, uint16 or uint32, holds all ids.
    """

    @staticmethod
    def prepare(
        records: Iterable[tuple[Place, Record]], bad_lines: BadLines
    ) -> Iterable[tuple[Place, Record]]:
        """The records of a source as `parse` gets them: as they are."""
        return records

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UserError("--tokenizer_path: this tokenizer has no tokenizer.json")
        # The tokenizers library warns in every process that is forked after it ran in parallel,
        # DataLoader workers included, unless this is set.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self.hash = tokenizer_hash(tokenizer)
        self._added = self._backend.get_added_tokens_decoder()
        self.special = {token.content: id_ for id_, token in self._added.items() if token.special}
        largest_id = max(self._backend.get_vocab(with_added_tokens=True).values())
        self.dtype = np.dtype("<u2" if largest_id < 1 << 16 else "<u4")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, of `dtype`, without `<s>` and `</s>`.

        Long texts are encoded in pieces, cut after a newline if possible; where newlines are no
        tokens of their own, that may split one token in tens of thousands.
        """
        self._backend.encode_special_tokens = True  # here, since the library does not pickle it
        pieces = [(owner, piece) for owner, text in enumerate(texts) for piece in _cut(text)]
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        for start in range(0, len(pieces), BATCH_PIECES):
            owners, batch = zip(*pieces[start : start + BATCH_PIECES], strict=True)
            encodings = self._backend.encode_batch_fast(batch, add_special_tokens=False)
            for owner, encoding in zip(owners, encodings, strict=True):
                parts[owner].append(np.array(encoding.ids, dtype=self.dtype))
        return [np.concatenate(part) for part in parts]

    @cached_property
    def byte_counts(self) -> np.ndarray:
        """(largest id + 1,) int64, the UTF-8 bytes of text that each id stands for.

        Special tokens stand for none. A byte-level tokenizer writes each byte as one character; of
        others, ids are decoded one by one, which may miss a space or part of a character.
        """
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        is_byte_level = '"ByteLevel"' in json.dumps(json.loads(self._backend.to_str())["decoder"])
        counts = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
        for token, id_ in vocabulary.items():
            if id_ in self._added:
                counts[id_] = 0 if self._added[id_].special else len(token.encode("utf-8"))
            elif is_byte_level:
                counts[id_] = len(token)
            else:
                counts[id_] = len(self._backend.decode([id_]).encode("utf-8"))
        return counts


def _cut(text: str) -> Iterator[str]:
    """Cut a text into pieces of at most PIECE_CHARS, at the end of a line if possible."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        newline = text.rfind("\n", start, start + PIECE_CHARS)
        end = newline + 1 if newline >= 0 else start + PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


class TextEncoder(TextTokenizer):
    """Encodes texts as documents `<s>` text `</s>`, and counts their UTF-8 bytes."""

    is_chat = False
    counted = ("bytes",)

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", options: RecordOptions = DEFAULT
    ) -> None:
        super().__init__(tokenizer)
        self.options = options
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if self._bos is None or self._eos is None:
            raise UserError("--tokenizer_path: this tokenizer lacks a bos_token or an eos_token")
        self.key = f"pretrain {self._bos} {self._eos} {self.hash}{options.key}"

    def parse(self, record: Record) -> Parsed:
        """The text of a record and its UTF-8 bytes. Raises RecordError."""
        text = parse_text(record, self.options)
        return text, (len(text.encode("utf-8")),)

    def encode(self, records: Sequence[str]) -> Encoded:
        """Ids of the documents, `<s>` and `</s>` included."""
        texts = self.encode_batch(records)
        bos, eos = (np.array([id_], dtype=self.dtype) for id_ in (self._bos, self._eos))
        parts = [part for text in texts for part in (bos, text, eos)]
        lengths = np.array([len(text) + 2 for text in texts], dtype=np.int64)
        return Encoded(np.concatenate([np.empty(0, dtype=self.dtype), *parts]), lengths)


def language(text: str) -> str:
    """One of LANGUAGES, by shares of the characters that are not white space.

    Chinese from 30 % CJK characters on; else English from 85 % ASCII letters on (prose has 90 % and
    more, source code and tables less); else code/other.
    """
    characters = len(_SPACE.sub("", text))
    if len(_CJK.findall(text)) >= 0.3 * characters:
        return "Chinese"
    return "English" if len(_LATIN.findall(text)) >= 0.85 * characters else "code/other"
