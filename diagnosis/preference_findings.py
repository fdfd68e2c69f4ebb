"""What the curves of preference training say: does it learn to prefer, and at what price."""

import math
import statistics
from itertools import accumulate, combinations

from .curves import Metrics, has_number

# From so many lines on each third has four, whose scatter says what is clear.
MIN_LINES = 12
# Between two thirds of a run, a difference of so many standard errors is no accident.
CLEAR = 3.0
# Of fewer lines their order alone is looked at: so many standard deviations of Kendall's S, as four
# values in order have (https://doi.org/10.2307/2332226), are hardly an accident.
CLEAR_ORDER = 2.0
# A swing, or a fall, takes back at least this share of all that the run has gained.
SWING = 0.5
SWINGS = 3
# Swings are looked for in means over at least so many steps: single batches differ more than that.
SWING_STEPS = 10
# A margin below this is next to nothing: at 0 either reply is as likely to be taken, here 52 %.
LITTLE = 0.1
# What the chosen replies may lose of their reward for the margin, as a share of it.
PRICE = 0.5
# Points of accuracy that a small validation set loses by accident.
ACCURACY_FALL = 0.02
# Points between the accuracies of validation and test data of one kind that may be accident.
ACCURACY_GAP = 0.1
# The loss starts where model and reference are one, without any scatter, and rises by that share.
LOSS_RISE = 0.1


def course_of_training_loss(lines: Metrics) -> tuple[bool, str, bool] | None:
    """Whether the loss of the last third of the run is above that of the first line.

    Args:
        lines: those of metrics.jsonl that tell of training steps.

    Returns:
        As `course_of_margin`, and True, for it did harm; None if it is not above.
    """
    losses = [m["loss"] for m in lines]
    last = losses[-max(1, len(losses) // 3) :]
    start, end = losses[0], statistics.fmean(last)
    error = statistics.stdev(last) / math.sqrt(len(last)) if len(last) > 1 else 0.0
    if end - start <= max(LOSS_RISE * start, CLEAR * error):
        return None
    return (
        True,
        f"The loss rose from {start:.3f} up to step {lines[0]['step']:,} to {end:.3f} in the last "
        "third of the run: the model is worse than its reference. Try a smaller --learning_rate, a "
        "larger --beta or a longer warm-up.",
        True,
    )


def course_of_margin(lines: Metrics) -> tuple[bool, str] | None:
    """Whether the log-odds of chosen against rejected replies grow, stall, fall or swing.

    Read from the margin, their growth beyond the reference times beta, which unlike the log-odds is
    not another for every batch from the start: it is 0 there. So a single line can be judged.

    Args:
        lines: those of metrics.jsonl that tell of training steps.

    Returns:
        Whether that is an alarm, and the sentence; None if there are no lines.
    """
    told = [m for m in lines if has_number(m, "margin")]
    margins = [m["margin"] for m in told]
    if not margins:
        return None
    third = max(1, len(margins) // 3)
    sums = [0.0, *accumulate(margins)]
    means = [(sums[i + third] - sums[i]) / third for i in range(len(margins) - third + 1)]
    low, high = means[0], means[-1]
    here = f"from a margin of {low:.3f} in the first third of the run to {high:.3f} in the last"
    if len(margins) < 3:
        low, here = 0.0, f"from a margin of 0 at the start to {high:.3f} at the end"
    grown, fallen = _clear_change(margins)

    width = max(1, round(SWING_STEPS * len(told) / told[-1]["step"]))
    coarse = [
        statistics.fmean(margins[i : i + width]) for i in range(0, len(margins) - width + 1, width)
    ]
    swings = _count_falls(coarse, SWING * (max(coarse) - min(0.0, *coarse))) if coarse else 0
    if swings >= SWINGS and max(coarse) > LITTLE:
        return True, (
            f"The log-odds swing, {here}, with {swings} falls by half of all that was gained. Try "
            "a smaller --learning_rate, a larger --beta or more --accumulation_steps."
        )
    taken_back = max(means) > LITTLE and high < (1 - SWING) * max(means)
    if fallen or taken_back or high < -LITTLE:
        return True, (
            f"The log-odds fall{' again' if low > 0 or taken_back else ''}, {here}. Try a smaller "
            "--learning_rate, fewer --epochs or a larger --beta."
        )
    if not grown and high <= LITTLE:
        return True, (
            f"The log-odds stall, {here}. Try a larger --learning_rate or more --epochs; with a "
            "smaller --beta the model may go further from the reference."
        )
    course = "grow" if grown or len(margins) < 3 else "have grown early and hold"
    return False, f"The log-odds of the chosen replies {course}, {here}."


def _clear_change(values: list[float]) -> tuple[bool, bool]:
    """Whether values that start from 0 clearly grow, and whether they clearly fall."""
    if len(values) >= MIN_LINES:
        third = len(values) // 3
        first, last = values[:third], values[-third:]
        error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / third)
        change, clear = statistics.fmean(last) - statistics.fmean(first), CLEAR * error
    else:
        path = [0.0, *values]
        change = sum((b > a) - (b < a) for a, b in combinations(path, 2))
        n = len(path)
        clear = CLEAR_ORDER * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    return change > clear, change < -clear


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


def accuracy_gap(metrics: Metrics) -> tuple[bool, str] | None:
    """Whether the test data are told apart much worse than the validation data.

    Args:
        metrics: all lines of metrics.jsonl.

    Returns:
        As `course_of_margin`; None if either was not measured.
    """
    tests = [m["test_accuracy"] for m in metrics if has_number(m, "test_accuracy")]
    evaluations = [m for m in metrics if has_number(m, "val_accuracy")]
    if not tests or not evaluations:
        return None
    best = min(evaluations, key=lambda m: m["val_loss"])["val_accuracy"]  # of the weights tested
    here = f"The test accuracy is {tests[-1]:.1%}, that of validation {best:.1%}"
    if tests[-1] >= best - ACCURACY_GAP:
        return False, f"{here}."
    return True, (
        f"{here}: the test pairs are of another kind, or too few pairs are validated. Trust the "
        "test, and validate on more pairs, of its kind."
    )
