"""Decoding of new tokens to text, token by token."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

from tokenizers.decoders import DecodeStream

from model import Tokenizer


@cache
def _byte_of() -> dict[str, int]:
    """The byte that each character in the name of a token stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # slow to import

    return {character: byte for byte, character in bytes_to_unicode().items()}


def token_bytes(tokenizer: Tokenizer, id_: int) -> bytes:
    """The bytes of the text that a token stands for; those of its name if it is a control token."""
    name, byte_of = tokenizer.convert_ids_to_tokens(id_), _byte_of()
    if all(character in byte_of for character in name):
        return bytes(byte_of[character] for character in name)
    return name.encode("utf-8")


class TextStream:
    """Decodes tokens to pieces of text, and ends the text before a stop string.

    A piece consists of whole characters. What may be the beginning of a stop string is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._text = ""  # all so far
        self._n_returned = 0  # characters of it that were returned
        self._stop = tuple(stop)
        self.stopped = False  # whether the text has ended before a stop string

    def add(self, token: int) -> str:
        """Add a token, and return the text that it makes certain; none once the text has ended."""
        self._ids.append(token)
        self._text += self._decoder.step(self._tokenizer, token) or ""
        return self._release(self._held_back())

    def finish(self) -> str:
        """Return what was held back, when no token follows; half a character becomes �."""
        if not self.stopped:
            self._text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return self._release(0)

    def decode(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the pieces of a whole text."""
        for token in tokens:
            if piece := self.add(token):
                yield piece
        if piece := self.finish():
            yield piece

    def _release(self, held_back: int) -> str:
        if self.stopped:
            return ""
        ends = [self._text.find(s, max(0, self._n_returned - len(s) + 1)) for s in self._stop]
        ends = [end for end in ends if end >= 0]
        if ends:
            self.stopped = True
            self._text = self._text[: min(ends)]
            held_back = 0
        piece = self._text[self._n_returned : len(self._text) - held_back]
        self._n_returned += len(piece)
        return piece

    def _held_back(self) -> int:
        """Number of last characters that may begin a stop string."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        for length in range(min(longest, len(self._text) - self._n_returned), 0, -1):
            if any(s.startswith(self._text[-length:]) for s in self._stop):
                return length
        return 0
