"""The learning rate of a step."""

import math

DECAYS = ("cosine", "linear", "step", "constant", "wsd")
WSD_DECAY = 0.2  # of the steps after the warm-up; 0.1 to 0.2 is what the papers below found enough


def get_lr(
    step: float,
    total_steps: float,
    lr: float,
    warmup_iters: float,
    min_lr: float,
    decay: str = "cosine",
) -> float:
    """Linear warm-up from 0 to `lr`, then a decay to `min_lr`.

    Args:
        step: optimizer steps taken before this one; a fraction where the batch size was changed.
        total_steps: optimizer steps of the run, at whose end the rate is `min_lr`.
        decay: how the rate falls over the steps that follow the warm-up:
            "cosine" as SGDR's without restarts (https://arxiv.org/abs/1608.03983);
            "linear";
            "step" to a tenth after a half and again after three quarters, never below `min_lr`;
            "constant" not at all;
            "wsd" (warm-up, stable, decay; https://arxiv.org/abs/2404.06395) linearly in the last
            fifth, as https://arxiv.org/abs/2405.18392; another one is a ValueError.
    """
    if decay not in DECAYS:
        raise ValueError(f"decay {decay!r} is none of {', '.join(DECAYS)}")
    if step < warmup_iters:
        return lr * step / warmup_iters
    if decay == "constant":
        return lr
    if step >= total_steps:
        return min_lr
    progress = (step - warmup_iters) / (total_steps - warmup_iters)
    if decay == "step":
        drops = (progress >= 0.5) + (progress >= 0.75)
        return max(min_lr, lr * 0.1**drops)
    if decay == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    elif decay == "linear":
        left = 1 - progress
    else:
        left = min(1.0, (1 - progress) / WSD_DECAY)
    return min_lr + (lr - min_lr) * left


def warmup_steps(warmup_iters: int | None, warmup_ratio: float | None, total_steps: int) -> int:
    """The warm-up that was asked for, in steps or as a share of the run; else 3 % of the run."""
    if warmup_iters is not None:
        return warmup_iters
    return round((0.03 if warmup_ratio is None else warmup_ratio) * total_steps)
