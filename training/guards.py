"""What keeps a run from wasting its time: loss spikes are noticed, lack of memory is explained."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .arguments import UserError

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


@dataclass
class SpikeWatch:
    """Tells the loss of a step that leaps out of those before it.

    It keeps a running mean and variance, in which a step's weight halves every 14 steps, and calls
    a spike what lies more than `DEVIATIONS` standard deviations above the mean.
    """

    DEVIATIONS = 5.0
    WEIGHT = 0.05
    FIRST_STEPS = 20  # until then the variance is not yet known

    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def is_spike(self, loss: float) -> bool:
        """Whether this finite loss is a spike; it then counts among the losses seen."""
        above = loss - self.mean
        spike = self.steps >= self.FIRST_STEPS and above > self.DEVIATIONS * math.sqrt(
            self.variance
        )
        weight = max(self.WEIGHT, 1 / (self.steps + 1))
        self.mean += weight * above
        self.variance = (1 - weight) * (self.variance + weight * above**2)
        self.steps += 1
        return spike


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn running out of memory inside the block into one line that says what to do.

    Raises:
        UserError: with that line, on whichever process it happens.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            if not any(sign in str(error).lower() for sign in OUT_OF_MEMORY):
                raise
        raise UserError(
            "out of memory; what helps, in this order: a smaller --batch_size; with more "
            "--accumulation_steps the updates stay the same; --gradient_checkpointing; a shorter "
            "--max_seq_len",
            every_rank=True,
        ) from None
