"""New tokens to text, as they come."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextStream:
    """Turns tokens into pieces of text, and notices where the text must stop.

    A piece holds whole characters, and is held back while it may be the beginning of a stop string.

    Args:
        tokenizer: of the tokens.
        stop: strings at which the text ends; they are not part of it.

    Attributes:
        stopped: whether a stop string came.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str] = ()):
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._text = ""  # all so far
        self._given = 0  # characters of it that were handed out
        self._stop = tuple(stop)
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that a further token makes certain; empty once the text has stopped."""
        self._ids.append(token)
        self._text += self._decoder.step(self._tokenizer, token) or ""
        return self._hand_out(self._held_back())

    def finish(self) -> str:
        """What was held back, when no token follows; the bytes of half a character as �."""
        if not self.stopped:
            self._text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return self._hand_out(0)

    def _hand_out(self, held_back: int) -> str:
        if self.stopped:
            return ""
        ends = [self._text.find(s, max(0, self._given - len(s) + 1)) for s in self._stop]
        ends = [end for end in ends if end >= 0]
        if ends:
            self.stopped = True
            self._text = self._text[: min(ends)]
            held_back = 0
        piece = self._text[self._given : len(self._text) - held_back]
        self._given += len(piece)
        return piece

    def _held_back(self) -> int:
        """How many last characters may begin a stop string."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        for length in range(min(longest, len(self._text) - self._given), 0, -1):
            if any(s.startswith(self._text[-length:]) for s in self._stop):
                return length
        return 0
