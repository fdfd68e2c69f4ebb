"""Evaluation of a model on data sets, and what follows from it: best weights, early stopping."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model import mean_scores, token_losses

from .setup import Rows

if TYPE_CHECKING:
    from .run import Run

Batch = dict[str, Tensor]
# Gives for a batch, by name, what is summed over a data set: `targets`, what its figures are means
# over, and these figures, `loss` first.
Score = Callable[[nn.Module, Batch], dict[str, Tensor]]


@torch.no_grad()
def evaluate(
    run: "Run", model: nn.Module, sets: dict[str, Rows], score: Score, prefix: str
) -> dict[str, float] | None:
    """Score the model on data sets, each on its own if there are several, and on all together.

    Args:
        run: the run, in whose precision the model computes.
        model: what is called.
        sets: the data sets by name.
        score: of a batch.
        prefix: "val" or "test", which the names of the scores begin with.

    Returns:
        As `mean_scores`; None if a signal to stop came.
    """
    world, was_training = run.world, model.training
    model.eval()
    sums = {}
    for name, rows in sets.items():
        totals: dict[str, Tensor] = {}
        for batch in run.loader(rows):
            if run.check_signal():
                return None
            with run.autocast:
                scores = score(model, world.to_device(batch))
            for figure, values in scores.items():
                totals[figure] = totals.get(figure, 0) + values.sum(dtype=world.sum_dtype)
        values = world.all_reduce_sum(torch.stack(list(totals.values()))).tolist()
        sums[name] = dict(zip(totals, values, strict=True))
        if run.stage.scores_text:
            sums[name]["text_bytes"] = rows.dataset.text_bytes
    model.train(was_training)
    return mean_scores(sums, prefix)


def score_tokens(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A `Score`: the loss of each token, weighted by the loss mask."""
    losses, *_ = token_losses(model, batch)
    return {"loss": losses, "targets": batch["loss_mask"]}
