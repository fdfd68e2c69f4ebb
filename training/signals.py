"""Ctrl-C and SIGTERM as a request that the training loop answers when it is ready to save."""

import os
import signal
from contextlib import suppress
from types import FrameType

from common import Text, translate

from .distributed import Distributed

_NOTES = {
    signal.SIGINT: Text("stopping after this step; Ctrl-C again stops at once"),
    signal.SIGTERM: Text("SIGTERM: stopping after this step"),
}


class StopSignal:
    """While its block runs, the first signal is noted in `number`; a second Ctrl-C interrupts.

    `number` is 0 until then. It works in the main thread only, as Python's signal handlers do.
    """

    def __init__(self, world: Distributed) -> None:
        self.number = 0
        shown = {signal_: translate(note, world.language) for signal_, note in _NOTES.items()}
        self._notes = {signal_: f"\n{note}\n".encode() for signal_, note in shown.items()}

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in _NOTES}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # who reads our output may have got the signal too
                os.write(2, self._notes[number])  # print() may be interrupted just now
