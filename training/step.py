"""The counts and sums of a training step, and the scores of a validation batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from model import token_losses

from .distributed import Distributed

Batch = dict[str, Tensor]
# Gives for a batch, by name, what is summed over a data set: `targets`, what its figures are means
# over, and these figures, `loss` first.
Score = Callable[[nn.Module, Batch], dict[str, Tensor]]


def score_tokens(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A `Score`: the loss of each token, weighted by the loss mask."""
    losses, *_ = token_losses(model, batch)
    return {"loss": losses, "targets": batch["loss_mask"]}


def count_targets(batches: Sequence[Batch], world: Distributed) -> tuple[float, float, float]:
    """What a step over all processes learns from: weights of its targets, targets, rows with text.

    Each of this process's micro-batches has a loss_mask and an attention_mask (B, T).
    """
    masks = [batch["loss_mask"] for batch in batches]
    rows = [rows_with_text(batch) for batch in batches]  # the others are padding
    counts = (sum(m.sum() for m in masks), sum((m > 0).sum() for m in masks), sum(rows))
    weights, targets, n_rows = world.all_reduce_sum(torch.stack(counts)).tolist()
    return weights, targets, n_rows


def rows_with_text(batch: Batch) -> Tensor:
    """How many rows of a batch are not padding: a scalar int64."""
    return batch["attention_mask"].any(1).sum()


class StepTotals:
    """Sums over the micro-batches of an optimizer step, without gradients."""

    def __init__(self, world: Distributed):
        self.world = world
        self.figures: list[dict[str, Tensor]] = []  # sums of each micro-batch, `loss` first
        self.sums: dict[str, float] = {}  # result of `add_up`
        self.expert_load: Tensor | None = None  # (layers, experts)

    def add(
        self, losses: Tensor, aux_loss: Tensor, expert_load: Tensor | None, **figures: Tensor
    ) -> None:
        """Count a micro-batch: its losses, its share of the auxiliary loss, its figures."""
        values = {"loss": losses, "aux_loss": aux_loss, **figures}
        self.figures.append({name: value.detach().sum() for name, value in values.items()})
        if expert_load is not None and self.expert_load is not None:
            expert_load = self.expert_load + expert_load
        self.expert_load = expert_load

    def add_up(self) -> dict[str, float]:
        """The sums over all micro-batches of all processes, by name."""
        sums = torch.stack([torch.stack(list(each.values())) for each in self.figures]).sum(0)
        totals = self.world.all_reduce_sum(sums.to(self.world.sum_dtype)).tolist()
        self.sums = dict(zip(self.figures[0], totals, strict=True))
        return self.sums
