"""Detection of loss spikes, their samples, and an explanation where memory runs out."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from common import LESS_MEMORY, UserError
from dataset.stored import StoredDataset

from .distributed import Distributed

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


@dataclass
class SpikeWatch:
    """Recognises a loss that is far above the running mean of the steps before it."""

    DEVIATIONS = 5.0  # standard deviations above the mean that make a spike
    WEIGHT = 0.05  # of a step in mean and variance: it halves every 14 steps
    FIRST_STEPS = 20  # until then the variance is not yet known

    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def is_spike(self, loss: float) -> bool:
        """Whether this finite loss is a spike; it then counts among the losses seen."""
        above, limit = loss - self.mean, self.DEVIATIONS * math.sqrt(self.variance)
        spike = self.steps >= self.FIRST_STEPS and above > limit
        weight = max(self.WEIGHT, 1 / (self.steps + 1))
        self.mean += weight * above
        self.variance = (1 - weight) * (self.variance + weight * above**2)
        self.steps += 1
        return spike


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn running out of memory inside the block into a UserError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not any(sign in str(error).lower() for sign in OUT_OF_MEMORY):
            raise
        raise UserError(f"out of memory; {LESS_MEMORY}", every_rank=True) from None


def find_sample(
    world: Distributed,
    dataset: StoredDataset,
    batches: Sequence[dict[str, torch.Tensor]],
    losses: torch.Tensor,
) -> str:
    """`file:line` of the first sample of the first batch whose loss is not finite, else of all.

    All processes call this, each with its own micro-batches and their losses, (len(batches),).
    """
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    own = bool(bad), int(batches[bad[0] if bad else 0]["sample"][0])
    samples = world.all_gather(own)
    sample = next((sample for is_bad, sample in samples if is_bad), samples[0][1])
    return dataset.place(sample)
