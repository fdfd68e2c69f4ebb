"""The learning rate of a step."""

import math


def get_lr(step: int, total_steps: int, lr: float, warmup_iters: int, min_lr: float) -> float:
    """Linear warm-up from 0 to `lr`, then a cosine to `min_lr`.

    Args:
        step: optimizer step, from 0.
        total_steps: optimizer steps of the run; `min_lr` is reached there.
        lr: peak.
        warmup_iters: optimizer steps of the warm-up.
        min_lr: where the cosine ends.

    Returns:
        The learning rate (SGDR's cosine without restarts, https://arxiv.org/abs/1608.03983).
    """
    if step < warmup_iters:
        return lr * step / warmup_iters
    progress = (step - warmup_iters) / max(1, total_steps - warmup_iters)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


def warmup_steps(warmup_iters: int | None, total_steps: int) -> int:
    """The warm-up that was asked for, or 3 % of the run."""
    return round(0.03 * total_steps) if warmup_iters is None else warmup_iters
