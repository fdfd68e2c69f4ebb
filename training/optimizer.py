"""The optimizer of every stage."""

import argparse
import re

import torch
from torch import nn

from common import UserError


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101) with decay on weight matrices only.

    Norm scales and the embedding, which is also the output layer, are not decayed; parameters that
    do not require gradients are left out. Each group's `initial_lr` is the peak of its learning
    rate. Of the patterns of --lr_scale and --weight_decay_for that match a name the first counts;
    one that no parameter's name matches is a UserError.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for flag in ("lr_scale", "weight_decay_for"):
        for pattern, _ in getattr(args, flag):
            if not any(re.search(pattern, name) for name in trained):
                raise UserError(f"--{flag} {pattern}: no parameter has such a name")

    def is_matrix(parameter: nn.Parameter) -> bool:
        return parameter.dim() >= 2 and id(parameter) not in embeddings

    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    # Matrices first: resume files number the parameters in this order.
    for name, parameter in sorted(trained.items(), key=lambda item: not is_matrix(item[1])):
        matrix = is_matrix(parameter)
        decay = _matching(args.weight_decay_for, name, args.weight_decay if matrix else 0.0)
        scale = _matching(args.lr_scale, name, 1.0)
        groups.setdefault((matrix, scale, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": group, "weight_decay": decay, "initial_lr": args.learning_rate * scale}
            for (_, scale, decay), group in groups.items()
        ],
        lr=args.learning_rate,
        betas=(args.beta1, args.beta2),
        eps=1e-8,
        fused=next(model.parameters()).device.type in ("cuda", "cpu"),
    )


def _matching(patterns: list[tuple[str, float]], name: str, default: float) -> float:
    """The number of the first pattern that a name matches."""
    return next((value for pattern, value in patterns if re.search(pattern, name)), default)
