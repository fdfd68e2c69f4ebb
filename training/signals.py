"""Ctrl-C and SIGTERM as a request that the training loop answers when it is ready to save."""

import os
import signal
from contextlib import suppress
from types import FrameType

_NOTES = {
    signal.SIGINT: b"\nstopping after this step; Ctrl-C again stops at once\n",
    signal.SIGTERM: b"\nSIGTERM: stopping after this step\n",
}


class StopSignal:
    """While its block runs, the first signal is noted in `number`; a second Ctrl-C interrupts.

    `number` is 0 until then. It works in the main thread only, as Python's signal handlers do.
    """

    def __init__(self) -> None:
        self.number = 0

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
                os.write(2, _NOTES[signal.Signals(number)])  # print() may be interrupted just now
