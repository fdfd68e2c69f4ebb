"""Shows an answer in a terminal while it comes."""

import sys

from .parts import Delta

ASIDES = ("reasoning", "call", "result")


class AnswerPrinter:
    """Prints content to stdout; thoughts, calls and results to stderr, dimmed in a terminal.

    So what a program reads from stdout is the answer alone.
    """

    def __init__(self) -> None:
        self._kind = ""  # of the part that is open
        self._is_terminal = sys.stderr.isatty()

    def show(self, delta: Delta) -> None:
        """Print a piece of the answer."""
        if self._kind and (delta.kind != self._kind or delta.kind in ("call", "result")):
            self.end_part()
        self._kind = delta.kind
        if delta.kind == "call":
            self._print_aside(f"→ {delta.name} {delta.text}")
        elif delta.kind == "result":
            self._print_aside(f"← {delta.text}")
        elif delta.kind == "reasoning":
            self._print_aside(delta.text)
        else:
            print(delta.text, end="", flush=True)

    def end_part(self) -> None:
        """End the line of the part that is open."""
        print(file=sys.stderr if self._kind in ASIDES else sys.stdout, flush=True)
        self._kind = ""

    def _print_aside(self, text: str) -> None:
        if text and self._is_terminal:
            text = f"\033[2m{text}\033[0m"
        print(text, end="", file=sys.stderr, flush=True)
