"""The language-modelling loss: of each token, and the scores of a data set."""

import math

import torch.nn.functional as F
from torch import Tensor, nn


def token_losses(
    model: nn.Module, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the cross-entropy of every position, weighted by the loss mask.

    Args:
        model: a MiniMindLM, perhaps wrapped.
        batch: what `dataset.collate` makes: input_ids, attention_mask, position_ids, targets and
            loss_mask, each (B, T).

    Returns:
        Losses in nats, (B, T) float32; the auxiliary loss, 0 for dense models; and the load of each
        expert, (layers, experts), None for dense models.
    """
    output = model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
    )
    logits = output.logits.flatten(0, 1).float()  # (B · T, vocab)
    losses = F.cross_entropy(logits, batch["targets"].flatten(), reduction="none")
    losses = losses.view_as(batch["loss_mask"]) * batch["loss_mask"]
    return losses, output.aux_loss, output.expert_load  # not the logits, which would stay in memory


def summarise(sums: dict[str, tuple[float, float, int]], prefix: str) -> dict[str, float]:
    """Scores of a data set from its sums.

    Args:
        sums: by the name of the set: loss summed over target tokens in nats, target tokens, and
            UTF-8 bytes of the text.
        prefix: "val" or "test", which the names of the scores begin with.

    Returns:
        Mean loss of a target token in nats, perplexity, and bits per byte: the bits that the model
        needs for the whole text, `</s>` included, by its bytes. Unlike the other two, that can be
        compared between tokenizers; where there is no text, as in empty answers, it is left out.
        Of all sets together, and of each as `…/name` if there are several.
    """
    named = {f"/{name}": values for name, values in sums.items()} if len(sums) > 1 else {}
    together = tuple(map(sum, zip(*sums.values(), strict=True)))
    scores = {}
    for name, (nats, tokens, text_bytes) in {"": together, **named}.items():
        loss = nats / tokens
        scores[f"{prefix}_loss{name}"] = loss
        scores[f"{prefix}_perplexity{name}"] = math.exp(loss) if loss < 700 else math.inf
        if text_bytes:
            scores[f"{prefix}_bits_per_byte{name}"] = nats / math.log(2) / text_bytes
    return scores
