"""The optimizer of every stage."""

import argparse
import re

import torch
from torch import nn

from common import UserError
from model import MiniMindLM

from .muon import Muon


def make_optimizer(
    model: MiniMindLM,
    args: argparse.Namespace,
    dtype: torch.dtype = torch.float32,
    embedding_scale: float = 1.0,
) -> torch.optim.Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101), or with --optimizer muon Muon and AdamW as one.

    Muon takes the model's hidden matrices, AdamW all else. Norm scales and the embedding, which is
    also the output layer, are not decayed; parameters that do not require gradients are left out.
    Each group's `initial_lr` is the peak of its learning rate; beside Muon, the embedding's is
    `embedding_scale` times --learning_rate. Of the patterns of --lr_scale and --weight_decay_for
    that match a name the first counts; one that no parameter's name matches is a
    UserError, and so is Muon without a matrix. `dtype` is that of the run's matrix products.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for flag in ("lr_scale", "weight_decay_for"):
        for pattern, _ in getattr(args, flag):
            if not any(re.search(pattern, name) for name in trained):
                raise UserError(f"--{flag} {pattern}: no parameter has such a name")
    hidden = {id(p) for p in model.hidden_matrices()} if args.optimizer == "muon" else ()

    def is_matrix(parameter: nn.Parameter) -> bool:
        return parameter.dim() >= 2 and id(parameter) not in embeddings

    groups: dict[tuple[bool, bool, float, float], list[nn.Parameter]] = {}
    # Matrices first: resume files number the parameters in this order.
    for name, parameter in sorted(trained.items(), key=lambda item: not is_matrix(item[1])):
        matrix = is_matrix(parameter)
        decay = _matching(args.weight_decay_for, name, args.weight_decay if matrix else 0.0)
        beside_muon = args.optimizer == "muon" and id(parameter) in embeddings
        scale = _matching(args.lr_scale, name, embedding_scale if beside_muon else 1.0)
        groups.setdefault((id(parameter) in hidden, matrix, scale, decay), []).append(parameter)
    by_muon, by_adamw = [], []
    for (muon, _, scale, decay), params in groups.items():
        group = {"params": params, "weight_decay": decay, "initial_lr": args.learning_rate * scale}
        (by_muon if muon else by_adamw).append(group)
    adamw = torch.optim.AdamW(
        by_adamw,
        lr=args.learning_rate,
        betas=(args.beta1, args.beta2),
        eps=1e-8,
        fused=next(model.parameters()).device.type in ("cuda", "cpu"),
    )
    if args.optimizer == "adamw":
        return adamw
    if not by_muon:
        raise UserError("--optimizer muon: no matrix that it updates is trained here; use adamw")
    return Muon(by_muon, adamw, args.learning_rate, dtype)


def _matching(patterns: list[tuple[str, float]], name: str, default: float) -> float:
    """The number of the first pattern that a name matches."""
    return next((value for pattern, value in patterns if re.search(pattern, name)), default)
