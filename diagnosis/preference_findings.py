"""What the curves of preference training show: does the model learn to prefer, and at what price.

The log-odds of chosen against rejected replies are judged by the margin, their growth beyond the
reference times beta. It is 0 at the start for every batch, so that a single line can be judged.
"""

import math
import statistics
from itertools import combinations

from common import Text

from .findings import Finding, fine
from .metrics import Metrics, column, count_rises, having, last_third, moving_mean

# From so many lines on each third has four, whose scatter shows what is clear.
MIN_LINES = 12
CLEAR = 3.0  # standard errors between two thirds of a run that are no accident
# Of fewer lines their order alone is judged: so many standard deviations of Kendall's S, as four
# values in order have (https://doi.org/10.2307/2332226), are hardly an accident.
CLEAR_ORDER = 2.0
SWING = 0.5  # a swing, or a fall, takes back at least this share of all that the run has gained
SWINGS = 3
SWING_STEPS = 10  # swings are counted in means over so many steps: single batches differ more
LITTLE = 0.1  # a margin of next to nothing: at 0 either reply is as likely to be taken, here 52 %
PRICE = 0.5  # share of the margin that the chosen replies may lose of their reward for it
ACCURACY_FALL = 0.02  # that a small validation set loses by accident
LOSS_RISE = 0.1  # of the loss at the start, where model and reference are equal


def preference_findings(metrics: Metrics) -> list[Finding | None]:
    """What the curves of preference training show; None for what cannot be judged."""
    lines, evaluations = having(metrics, "loss"), having(metrics, "val_loss")
    return [
        _training_loss(lines),
        _margin(having(lines, "margin")),
        _accuracy(evaluations),
        _price_of_margin(lines, evaluations),
    ]


def _training_loss(lines: Metrics) -> Finding | None:
    """Whether the loss of the last third of the run is above that of the first line."""
    last = last_third(column(lines, "loss"))
    start, end = lines[0]["loss"], statistics.fmean(last)
    error = statistics.stdev(last) / math.sqrt(len(last)) if len(last) > 1 else 0.0
    if end - start <= max(LOSS_RISE * start, CLEAR * error):
        return None
    text = Text(
        "The loss rose from {start:.3f} up to step {step:,} to {end:.3f} in the last third of the "
        "run: the model is worse than its reference. Try a smaller --learning_rate, a larger "
        "--beta or a longer warm-up.",
        start=start,
        step=lines[0]["step"],
        end=end,
    )
    return Finding(text, harmful=True)


def _margin(lines: Metrics) -> Finding:
    """Whether the log-odds of chosen against rejected replies grow, stall, fall or swing."""
    margins = column(lines, "margin")
    thirds = moving_mean(margins, max(1, len(margins) // 3))
    low, high = thirds[0], thirds[-1]
    here = Text(
        "from a margin of {low:.3f} in the first third of the run to {high:.3f} in the last",
        low=low,
        high=high,
    )
    if len(margins) < 3:
        low = 0.0
        here = Text("from a margin of 0 at the start to {high:.3f} at the end", high=high)
    grown, fallen = _clear_change(margins)

    width = max(1, round(SWING_STEPS * len(lines) / lines[-1]["step"]))
    coarse = moving_mean(margins, width)[::width] or [0.0]
    gained = max(coarse) - min(0.0, *coarse)
    falls = count_rises([-margin for margin in coarse], SWING * gained)
    if falls >= SWINGS and max(coarse) > LITTLE:
        text = Text(
            "The log-odds swing, {here}, with {falls} falls by half of all that was gained. Try "
            "a smaller --learning_rate, a larger --beta or more --accumulation_steps.",
            here=here,
            falls=falls,
        )
        return Finding(text)
    taken_back = max(thirds) > LITTLE and high < (1 - SWING) * max(thirds)
    if fallen or taken_back or high < -LITTLE:
        text = Text(
            "The log-odds {fall}, {here}. Try a smaller --learning_rate, fewer --epochs or a "
            "larger --beta.",
            fall=Text("fall again") if low > 0 or taken_back else Text("fall"),
            here=here,
        )
        return Finding(text)
    if not grown and high <= LITTLE:
        text = Text(
            "The log-odds stall, {here}. Try a larger --learning_rate or more --epochs; a smaller "
            "--beta lets the model move further from the reference.",
            here=here,
        )
        return Finding(text)
    early = not grown and len(margins) >= 3
    course = Text("have grown early and hold") if early else Text("grow")
    text = Text("The log-odds of the chosen replies {course}, {here}.", course=course, here=here)
    return fine(text)


def _clear_change(values: list[float]) -> tuple[bool, bool]:
    """Whether values that start from 0 clearly grow, and whether they clearly fall."""
    if len(values) >= MIN_LINES:
        first, last = values[: len(values) // 3], last_third(values)
        error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / len(last))
        change, clear = statistics.fmean(last) - statistics.fmean(first), CLEAR * error
    else:
        path = [0.0, *values]
        change = sum((b > a) - (b < a) for a, b in combinations(path, 2))
        n = len(path)
        clear = CLEAR_ORDER * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    return change > clear, change < -clear


def _accuracy(evaluations: Metrics) -> Finding | None:
    """Whether more or fewer validation pairs are ranked correctly than before."""
    shares = column(evaluations, "val_accuracy")
    if len(shares) < 2:
        return None
    here = Text(
        "{start:.1%} at the start, {best:.1%} at best, {end:.1%} at the end",
        start=shares[0],
        best=max(shares),
        end=shares[-1],
    )
    if shares[-1] >= max(shares) - ACCURACY_FALL:
        return fine(Text("The validation accuracy: {here}.", here=here))
    text = Text(
        "The validation accuracy falls: {here}. Use the best weights (--save_best); for better "
        "ones try fewer --epochs, a smaller --learning_rate or a larger --beta.",
        here=here,
    )
    return Finding(text)


def _price_of_margin(lines: Metrics, evaluations: Metrics) -> Finding | None:
    """Whether the chosen replies have become improbable themselves.

    DPO asks for a difference alone, and may get it where both replies lose and the rejected one
    only loses more. Judged from the last evaluation, or from the last third of the training lines.
    """
    place, prefix = having(evaluations[-1:], "val_margin"), "val_"
    if not place:
        place, prefix = last_third(lines), ""
    rewards, margins = (column(place, f"{prefix}{name}") for name in ("chosen_reward", "margin"))
    if not rewards or not margins:
        return None
    reward, margin = statistics.fmean(rewards), statistics.fmean(margins)
    here = Text(
        "the reward of chosen replies is {reward:.3f}, the margin {margin:.3f}",
        reward=reward,
        margin=margin,
    )
    if reward >= -LITTLE:
        return fine(Text("The chosen replies keep their log-probability: {here}.", here=here))
    if -reward <= margin * PRICE:
        text = Text(
            "The chosen replies lose some log-probability, the rejected more: {here}.", here=here
        )
        return fine(text)
    text = Text(
        "The log-probability of the chosen replies collapses: {here}; both replies lose. Try a "
        "larger --beta, a smaller --learning_rate or fewer --epochs.",
        here=here,
    )
    return Finding(text)
