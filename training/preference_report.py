"""What the curves of preference training say: does it learn to prefer, and at what price."""

import math
import statistics

from .curves import Metrics, has_number

# The course is judged from so many lines on: then each third has four.
MIN_LINES = 12
# Between two thirds of a run, a difference of so many standard errors is no accident.
CLEAR = 3.0
# A swing takes back at least this share of all that the run has gained, from line to line.
SWING = 0.5
SWINGS = 3
# A margin below this is next to nothing: at 0 either reply is as likely to be taken, here 52 %.
LITTLE = 0.1
# What the chosen replies may lose of their reward for the margin, as a share of it.
PRICE = 0.5
# Points of accuracy that a small validation set loses by accident.
ACCURACY_FALL = 0.02


def course_of_margin(lines: Metrics) -> tuple[bool, str] | None:
    """Whether the log-odds of chosen against rejected replies grow, stall or swing.

    Read from the margin, their growth beyond the reference times beta, which unlike the log-odds is
    not another for every batch from the start.

    Args:
        lines: those of metrics.jsonl that tell of training steps.

    Returns:
        Whether that is an alarm, and the sentence; None if there are too few lines.
    """
    margins = [m["margin"] for m in lines if has_number(m, "margin")]
    if len(margins) < MIN_LINES:
        return None
    third = len(margins) // 3
    first, last = margins[:third], margins[-third:]
    low, high = statistics.fmean(first), statistics.fmean(last)
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / third)
    here = f"from a margin of {low:.3f} in the first third of the run to {high:.3f} in the last"
    swings = _count_falls(margins, SWING * (max(margins) - min(0.0, min(margins))))
    if swings >= SWINGS and max(margins) > LITTLE:
        return True, (
            f"The log-odds swing, {here}, with {swings} falls by half of all that was gained. Try "
            "a smaller --learning_rate, a larger --beta or more --accumulation_steps."
        )
    if high - low < -CLEAR * error:
        return True, (
            f"The log-odds fall again, {here}. Try a smaller --learning_rate, fewer --epochs or a "
            "larger --beta."
        )
    grown = high - low > CLEAR * error
    if not grown and high <= LITTLE:
        return True, (
            f"The log-odds stall, {here}. Try a larger --learning_rate or more --epochs; with a "
            "smaller --beta the model may go further from the reference."
        )
    course = "grow" if grown else "have grown early and hold"
    return False, f"The log-odds of the chosen replies {course}, {here}."


def _count_falls(values: list[float], depth: float) -> int:
    """How often the values fall by more than `depth` from a peak, after climbing as far before."""
    falls, falling, turn = 0, False, values[0]
    for value in values:
        if falling and value > turn + depth:
            falling, turn = False, value
        elif not falling and value < turn - depth:
            falling, turn = True, value
            falls += 1
        else:
            turn = min(turn, value) if falling else max(turn, value)
    return falls


def course_of_accuracy(evaluations: Metrics) -> tuple[bool, str] | None:
    """Whether the preferred replies are told apart better on the validation data, or worse.

    Args:
        evaluations: those lines of metrics.jsonl that tell of validation data.

    Returns:
        As `course_of_margin`; None if there are fewer than two.
    """
    shares = [m["val_accuracy"] for m in evaluations if has_number(m, "val_accuracy")]
    if len(shares) < 2:
        return None
    here = f"{shares[0]:.1%} at the start, {max(shares):.1%} at best, {shares[-1]:.1%} at the end"
    if shares[-1] < max(shares) - ACCURACY_FALL:
        return True, (
            f"The validation accuracy falls: {here}. Take the best weights (--save_best); for "
            "better ones fewer --epochs, a smaller --learning_rate or a larger --beta."
        )
    return False, f"The validation accuracy: {here}."


def price_of_margin(lines: Metrics, evaluations: Metrics) -> tuple[bool, str] | None:
    """Whether the chosen replies have become improbable themselves.

    DPO asks for a difference alone, and may get it where both replies lose and the rejected one
    only loses more. Judged from the last evaluation, or from the last third of the training lines.

    Args:
        lines, evaluations: as for the other two.

    Returns:
        As `course_of_margin`; None without lines.
    """
    place, prefix = lines[-max(1, len(lines) // 3) :], ""
    if evaluations and has_number(evaluations[-1], "val_margin"):
        place, prefix = evaluations[-1:], "val_"
    found = [
        (m[f"{prefix}chosen_reward"], m[f"{prefix}margin"])
        for m in place
        if has_number(m, f"{prefix}chosen_reward") and has_number(m, f"{prefix}margin")
    ]
    if not found:
        return None
    reward, margin = (statistics.fmean(values) for values in zip(*found, strict=True))
    here = f"the reward of chosen replies is {reward:.3f}, the margin {margin:.3f}"
    if reward >= -LITTLE:
        return False, f"The chosen replies keep their log-probability: {here}."
    if -reward <= margin * PRICE:
        return False, f"The chosen replies lose some log-probability, the rejected more: {here}."
    return True, (
        f"The log-probability of the chosen replies collapses: {here}; both replies lose. Try a "
        "larger --beta, a smaller --learning_rate or fewer --epochs."
    )
