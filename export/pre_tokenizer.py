"""Whether llama.cpp gives a tokenizer's ids.

Byte pair encoding merges within pre-tokens, and llama.cpp knows a fixed list of patterns that cut a
text into them, by name. None is ours. PRE_TOKENIZER cuts where a number meets anything else, and
inside runs of digits. These are cuts of ours too; but ours also cuts at newlines, between any two
numbers, and after letters. Ids are the same if no merge can ever join what stands on the two sides
of such a cut: the first merge that does would need to match there, and until then both engines have
done the same.
"""

import json
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import product
from typing import Any

from tokenizers import Regex, pre_tokenizers

from common import UserError
from model import Tokenizer

PRE_TOKENS = r"\n|\p{N}|[^\n\p{N}\p{L}\p{M}]*[\p{L}\p{M}]+|[^\n\p{N}\p{L}\p{M}]+"
PRE_TOKENIZER = "superbpe"  # llama.cpp's name
KINDS = {
    "newline": r"\n",
    "number": r"\p{N}",
    "letter": r"[\p{L}\p{M}]",
    "other": r"[^\n\p{N}\p{L}\p{M}]",
}
# The kinds of the two characters beside a cut that is ours alone.
CUTS_OF_OURS_ALONE = {
    ("number", "number"),
    ("letter", "other"),
    *product(["newline"], ["newline", "letter", "other"]),
    *product(["letter", "other"], ["newline"]),
}
PLAIN_BPE = {  # what byte pair encoding could do beside merging, and does not here
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "byte_fallback": False,
    "ignore_merges": False,
}


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise a UserError, naming the tokenizer, unless llama.cpp gives the same ids for any text.

    Left out are texts in which the characters of a control token stand, which llama.cpp may take
    for that token, and characters that only one of the two engines' versions of Unicode calls
    numbers.
    """
    name = tokenizer.name_or_path or "the tokenizer"
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if reason := difference(parts):
        raise UserError(f"{name}: llama.cpp would give other token ids: {reason}")


def difference(parts: dict[str, Any]) -> str | None:
    """What a tokenizer.json has that llama.cpp would do otherwise; None: nothing."""
    if any(parts["model"].get(key) != value for key, value in PLAIN_BPE.items()):
        return "its model is not plain byte pair encoding"
    if parts["normalizer"] is not None:
        return "it normalizes texts"
    if parts["pre_tokenizer"] != json.loads(make_pre_tokenizer().__getstate__()):
        return "it cuts texts otherwise than scripts/train_tokenizer.py"
    for token in parts["added_tokens"]:
        if not token["special"] or any(
            token[key] for key in ("single_word", "lstrip", "rstrip", "normalized")
        ):
            return f"its added token {token['content']!r} is no plain control token"
    if missing := byte_letters().keys() - parts["model"]["vocab"].keys():
        return f"it has no entry for the byte {byte_letters()[min(missing)]:#04x}"
    if pair := next(crossing_merges(merge_pairs(parts)), None):
        left, right = map(entry_bytes, pair)
        return f"it merges {left!r} and {right!r}, which meet at a cut that llama.cpp does not make"
    return None


def make_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """What cuts texts for our tokenizers; why so, scripts/train_tokenizer.py explains."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def merge_pairs(parts: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json, in which older releases wrote a pair as one string."""
    return [
        tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair)
        for pair in parts["model"]["merges"]
    ]


def crossing_merges(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The merges that some text could hold on the two sides of a cut of ours alone.

    A side that is only a part of a character stands for every character that has it.
    """
    for left, right in pairs:
        before, after = last_kinds(entry_bytes(left)), first_kinds(entry_bytes(right))
        if not CUTS_OF_OURS_ALONE.isdisjoint(product(before, after)):
            yield left, right


@cache
def byte_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def entry_bytes(entry: str) -> bytes:
    """The bytes of an entry of the vocabulary."""
    return bytes(map(byte_letters().__getitem__, entry))


def last_kinds(entry: bytes) -> frozenset[str]:
    """Kinds of characters that may end where the bytes end; none if they end inside of one."""
    start = len(entry) - 1
    while start >= 0 and is_continuation(entry[start]):
        start -= 1
    if start < 0:  # the end of some character of several bytes
        return frozenset({"number", "letter", "other"})
    tail = entry[start:]
    whole = len(tail) == character_length(tail[0])
    return kinds(tail.decode("utf-8", "ignore")) if whole else frozenset()


@cache
def first_kinds(entry: bytes) -> frozenset[str]:
    """Kinds of characters that may begin with the bytes; none if they begin inside of one."""
    if is_continuation(entry[0]):
        return frozenset()
    length = character_length(entry[0])
    head = entry[:length]
    # All characters whose first bytes these are have successive numbers.
    shift = 6 * (length - len(head))
    low = head[0] & (0x7F if length == 1 else 0x7F >> length)
    for byte in head[1:]:
        low = low << 6 | byte & 0x3F
    numbers = range(low << shift, min((low + 1) << shift, 0x110000))
    characters = "".join(chr(i) for i in numbers if not 0xD800 <= i < 0xE000)
    shortest = {1: 0, 2: 0x80, 3: 0x800, 4: 0x10000}[length]
    return kinds(characters[max(0, shortest - numbers.start) :])


@cache
def kinds(characters: str) -> frozenset[str]:
    """The kinds that occur among characters, by the engine that cuts texts with our pattern."""
    return frozenset(
        kind for kind, pattern in KINDS.items() if without(pattern, characters) != characters
    )


def without(pattern: str, characters: str) -> str:
    """The characters that do not match."""
    pieces = pre_tokenizers.Split(Regex(pattern), "removed").pre_tokenize_str(characters)
    return "".join(piece for piece, _ in pieces)


def is_continuation(byte: int) -> bool:
    """Whether a byte of UTF-8 is not the first of its character."""
    return byte & 0xC0 == 0x80


def character_length(first: int) -> int:
    """Bytes of a UTF-8 character, by its first byte."""
    return 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
