"""The loss of a language model: of every position of a batch, and of a whole data set."""

import math

import torch.nn.functional as F
from torch import Tensor, nn


def token_losses(
    model: nn.Module, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cross-entropy of every position, weighted by the loss mask.

    Args:
        model: a MiniMindLM, or a wrapper of one.
        batch: as `dataset.collate` makes it: input_ids, targets, position_ids (B, T) int64,
            attention_mask (B, T), loss_mask (B, T) fp32.

    Returns:
        (B, T) fp32 in nats, 0 where nothing is learnt; the auxiliary loss (0 for dense models); the
        load of each expert (n_layers, n_experts), None for dense models. The logits are not among
        them, as they would stay in memory.
    """
    output = model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
    )
    logits = output.logits.flatten(0, 1).float()  # (B · T, vocab)
    losses = F.cross_entropy(logits, batch["targets"].flatten(), reduction="none")
    losses = losses.view_as(batch["loss_mask"]) * batch["loss_mask"]
    return losses, output.aux_loss, output.expert_load


def mean_scores(sums: dict[str, dict[str, float]], prefix: str) -> dict[str, float]:
    """Means over data sets from their sums.

    Args:
        sums: by the name of the data set: figures summed over its targets, the number (or sum of
            weights) of `targets`, and, where the loss is one of tokens, `text_bytes`: UTF-8 bytes
            of the text.
        prefix: "val" or "test", which the names of the scores begin with.

    Returns:
        The mean of each figure; with `text_bytes` also the perplexity, and bits per byte: the bits
        that the model needs for the whole text, `</s>` included, by its bytes. Unlike the other
        two, that can be compared between tokenizers; where there is no text, as in empty answers,
        it is left out. Of all sets together, and of each as `…/name` if there are several.
    """
    named = {f"/{name}": values for name, values in sums.items()} if len(sums) > 1 else {}
    names = next(iter(sums.values()))
    together = {name: sum(values[name] for values in sums.values()) for name in names}
    scores = {}
    for name, values in {"": together, **named}.items():
        means = {
            figure: value / values["targets"]
            for figure, value in values.items()
            if figure not in ("targets", "text_bytes")
        }
        if "text_bytes" in values:
            loss = means["loss"]
            means["perplexity"] = math.exp(loss) if loss < 700 else math.inf
            if values["text_bytes"]:
                means["bits_per_byte"] = values["loss"] / math.log(2) / values["text_bytes"]
        scores |= {f"{prefix}_{figure}{name}": value for figure, value in means.items()}
    return scores
