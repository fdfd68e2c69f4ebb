"""Muon for the matrices of the blocks and AdamW for all else, as one optimizer."""

import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
A, B, C = 3.4445, -4.7750, 2.0315  # of the polynomial in `orthogonalize`, steep at 0
BATCH = 2**22  # numbers that are orthogonalized at once, which bounds the memory it takes


class Muon(torch.optim.Optimizer):
    """Moves a matrix along its momentum with the singular values made equal, about.

    Nesterov momentum and Newton–Schulz are those of https://kellerjordan.github.io/posts/muon/;
    decoupled weight decay, and the factor 0.2 · sqrt(max(rows, columns)) that makes updates as
    large as AdamW's, so that both take the same learning rates, of https://arxiv.org/abs/2502.16982.
    torch.optim.Muon always rounds to bf16, and then splitting a batch changes its update by 3e-4.

    Args:
        matrices: groups of matrices, each with its `weight_decay`.
        adamw: the optimizer of all other parameters; its groups become groups of this one.
        lr: learning rate of the matrices.
        dtype: what Newton–Schulz's matrix products are computed in.
    """

    def __init__(
        self,
        matrices: Iterable[dict[str, Any]],
        adamw: torch.optim.AdamW,
        lr: float,
        dtype: torch.dtype,
    ):
        groups = [{**group, "momentum": MOMENTUM} for group in matrices]
        super().__init__([*groups, *adamw.param_groups], {"lr": lr})
        self.adamw, self.dtype = adamw, dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        self.adamw.state = self.state  # `load_state_dict` replaces it and the groups
        self.adamw.param_groups = [g for g in self.param_groups if "momentum" not in g]
        self.adamw.step()
        for group in self.param_groups:
            for params in equal_shapes(group["params"]) if "momentum" in group else ():
                for p in params:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                grads = [p.grad for p in params]
                momenta = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))
                updates = orthogonalize(nesterov, self.dtype).to(nesterov.dtype)
                scale = 0.2 * math.sqrt(max(params[0].shape))
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates.unbind(), alpha=-group["lr"] * scale)


def equal_shapes(matrices: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Those with gradients in batches of one shape, of up to BATCH numbers or a single matrix."""
    trained = sorted((m for m in matrices if m.grad is not None), key=lambda m: m.shape)
    for shape, group in groupby(trained, lambda m: m.shape):
        batch, size = list(group), max(1, BATCH // shape.numel())
        yield from (batch[i : i + size] for i in range(0, len(batch), size))


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices (n, rows, columns) with singular values of about 0.7 to 1.2: Newton–Schulz."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(5):  # x ← (A + B·xxᵀ + C·(xxᵀ)²) x
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x
