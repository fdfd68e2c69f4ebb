"""The loss of a language model: of every position of a batch, and of a whole data set."""

import math

import torch.nn.functional as F
from torch import Tensor, nn


def find_targets(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The targets of a flattened batch: positions, ids (N,) int64, and weights (N,) fp32."""
    where = batch["loss_mask"].flatten().nonzero().squeeze(1)
    return where, batch["targets"].flatten()[where], batch["loss_mask"].flatten()[where]


def target_logits(
    model: nn.Module, batch: dict[str, Tensor], where: Tensor | slice
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A model's logits at the N positions `where` of a flattened batch: (N, vocab) fp32.

    Also the auxiliary loss and the load of each expert, as `token_losses` returns them.
    """
    output = model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
    )
    return output.logits.flatten(0, 1)[where].float(), output.aux_loss, output.expert_load


def token_losses(
    model: nn.Module, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cross-entropy of every position of a batch that `dataset.collate` made, times its loss mask.

    Returns (B, T) fp32 in nats, 0 where nothing is learnt; `aux_loss` and `expert_load` of
    MiniMindOutput. The logits are not among them, as they would stay in memory.
    """
    logits, aux_loss, expert_load = target_logits(model, batch, slice(None))
    losses = F.cross_entropy(logits, batch["targets"].flatten(), reduction="none")
    losses = losses.view_as(batch["loss_mask"]) * batch["loss_mask"]
    return losses, aux_loss, expert_load


def mean_scores(sums: dict[str, dict[str, float]], prefix: str) -> dict[str, float]:
    """Means over all data sets together, and over each as `…/name` if there are several.

    `sums` are, by the name of the data set, figures summed over its targets, the number (or sum of
    weights) of `targets`, and, where the loss is one of tokens, the UTF-8 `text_bytes`. With these
    there are also the perplexity and, unless they are 0, bits per byte, for the whole text with
    `</s>`, which can be compared between tokenizers. The names of scores begin with `prefix`.
    """
    named = {f"/{name}": values for name, values in sums.items()} if len(sums) > 1 else {}
    names = next(iter(sums.values()))
    together = {name: sum(values[name] for values in sums.values()) for name in names}
    scores = {}
    for name, values in {"": together, **named}.items():
        summed = values.keys() - {"targets", "text_bytes"}
        means = {
            figure: values[figure] / values["targets"] for figure in values if figure in summed
        }
        if "text_bytes" in values:
            loss = means["loss"]
            means["perplexity"] = math.exp(loss) if loss < 700 else math.inf
            if values["text_bytes"]:
                means["bits_per_byte"] = values["loss"] / math.log(2) / values["text_bytes"]
        scores |= {f"{prefix}_{figure}{name}": value for figure, value in means.items()}
    return scores
