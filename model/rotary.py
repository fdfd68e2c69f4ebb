"""Rotary position embedding, by which attention depends on how far apart two tokens are."""

import torch
from torch import Tensor


def rotary_cos_sin(dim: int, positions: int | Tensor, theta: float = 1e6) -> Tensor:
    """Cosine and sine of every rotary angle (RoFormer, https://arxiv.org/abs/2104.09864).

    Pair i of a head of size `dim` is rotated by position · theta^(−2i / dim). The table, fp32, has
    the shape (…, dim / 2, 2) for positions (…), or for a number of positions, counted from 0.
    """
    if isinstance(positions, int):
        positions = torch.arange(positions)
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    angles = positions[..., None].float() * theta**-exponents
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rotary_emb(xq: Tensor, xk: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys (B, T, heads, head_dim) by their positions' angles.

    `cos_sin` is (T, head_dim / 2, 2) or (B, T, head_dim / 2, 2), from `rotary_cos_sin`.
    """
    cos_sin = cos_sin[..., None, :, :]  # (…, T, 1, head_dim / 2, 2)
    return rotate(xq, cos_sin), rotate(xk, cos_sin)


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of x (…, head_dim), in fp32, by a table that broadcasts to it."""
    pairs = x.float().unflatten(-1, (-1, 2))
    # Compilers generate no code for complex numbers, and older macOS has none.
    if torch.compiler.is_compiling() or x.device.type == "mps":
        (even, odd), (cos, sin) = pairs.unbind(-1), cos_sin.unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # one pass over memory instead of seven
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(cos_sin))
    return rotated.flatten(-2).type_as(x)
