"""The optimizer of every stage."""

import re
from collections.abc import Sequence

import torch
from torch import nn

from common import UserError

PatternValues = Sequence[tuple[str, float]]


def make_optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    lr_scale: PatternValues = (),
    weight_decay_for: PatternValues = (),
) -> torch.optim.AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101) with decay on weight matrices only.

    Norm scales and the embedding, which is also the output layer, are not decayed; parameters that
    do not require gradients are left out. Each group's `initial_lr` is the peak of its learning
    rate.

    Args:
        model: the model without wrappers.
        lr, weight_decay, betas: of all parameters that nothing else is said of.
        lr_scale: factors of the learning rate, by regular expressions of which one matches a
            parameter's name; the first that does counts.
        weight_decay_for: weight decays, likewise.

    Raises:
        UserError: for a pattern that no parameter's name matches.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for flag, patterns in (("lr_scale", lr_scale), ("weight_decay_for", weight_decay_for)):
        for pattern, _ in patterns:
            if not any(re.search(pattern, name) for name in trained):
                raise UserError(f"--{flag} {pattern}: no parameter has such a name")

    def is_matrix(parameter: nn.Parameter) -> bool:
        return parameter.dim() >= 2 and id(parameter) not in embeddings

    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    # Matrices first: resume files number the parameters in this order.
    for name, parameter in sorted(trained.items(), key=lambda item: not is_matrix(item[1])):
        matrix = is_matrix(parameter)
        decay = _matching(weight_decay_for, name, weight_decay if matrix else 0.0)
        scale = _matching(lr_scale, name, 1.0)
        groups.setdefault((matrix, scale, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": group, "weight_decay": decay, "initial_lr": lr * scale}
            for (_, scale, decay), group in groups.items()
        ],
        lr=lr,
        betas=betas,
        eps=1e-8,
        fused=next(model.parameters()).device.type in ("cuda", "cpu"),
    )


def _matching(patterns: PatternValues, name: str, default: float) -> float:
    """The number of the first pattern that a name matches."""
    return next((value for pattern, value in patterns if re.search(pattern, name)), default)
