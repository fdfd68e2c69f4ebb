"""What the curves of next-token prediction show: pretraining, fine-tuning, LoRA, distillation."""

import math
import statistics
from itertools import pairwise

from common import Text

from .findings import FEW_STEPS, LARGE_RISE, Finding, fine
from .metrics import (
    Metrics,
    column,
    count_rises,
    has_number,
    having,
    last_third,
    latest,
    moving_mean,
    training_loss_at,
)

# Untrained, the model's logits have a standard deviation s of about 0.02 · sqrt(dim), which puts
# the loss s²/2 above ln(vocabulary): 0.1 nats at dim 512, and 1 nat only beyond dim 5,000.
FIRST_LOSS_MARGIN = 1.0
# A first line that is a mean over more steps than this may honestly be far below ln(vocabulary).
FIRST_LINE_STEPS = 20
# How often tokens occur is learnt first, and saves about a quarter of ln(vocabulary). Half of it
# needs knowledge of what follows what, which so few steps cannot give.
FIRST_LINE_SHARE = 0.5
HARDLY_LEARNT = 0.1  # of ln(vocabulary), which the frequencies of tokens alone save

# The course of the loss is judged from so many lines on; in fewer, only a rise beyond scatter.
MIN_LINES = 12
FEW_LINES_RISE = 0.2
# Loss falls as a power of the tokens, with exponents of 0.05 to 0.1 (arXiv:2001.08361). So a last
# third brings 2 to 4 %; with less than half of that, more tokens will not bring much.
PLATEAU = 0.01
LR_NEAR_END = 0.25  # of its peak: below it curves flatten anyway
SWING = 0.1  # lines that average ten steps usually scatter by 1 to 2 %
SWINGS = 3  # fewer may be accidents

# The norm of the gradient over all weights, before clipping.
NORM_NOTHING_LEARNT = 0.01
NORM_USUAL = (0.1, 1.0)
NORM_UNSTABLE = 10.0


def loss_findings(metrics: Metrics, vocab_size: int | None) -> list[Finding | None]:
    """What the curves of next-token prediction show; None for what cannot be judged.

    An untrained model's loss is about the logarithm of `vocab_size`, which is None for a run that
    began with trained weights.
    """
    lines, evaluations = having(metrics, "loss"), having(metrics, "val_loss")
    # A student's loss holds its teacher's part as well; only the cross-entropy has a known start.
    data = having([{**m, "loss": m.get("cross_entropy", m["loss"])} for m in lines], "loss")
    whole = _whole_intervals(data)
    losses = column(whole, "loss")
    first = little = None
    if vocab_size is not None:
        first = _first_loss(data[0], vocab_size) if data else None
        little = _little_learnt(data, whole, evaluations, vocab_size)
    return [
        first,
        _divergence(whole, losses) or little or _course(whole, losses),
        _gap(lines, evaluations),
        _gradient_norm(lines),
    ]


def _whole_intervals(lines: Metrics) -> Metrics:
    """The lines without those that average much less than the others, as at an epoch's end."""
    counts = [after - before for before, after in pairwise([0, *column(lines, "tokens")])]
    half = statistics.median(counts) / 2 if counts else 0
    return [line for line, count in zip(lines, counts, strict=True) if count >= half]


def _first_loss(line: dict[str, float], vocab_size: int) -> Finding:
    loss, steps, uniform = line["loss"], line["step"], math.log(vocab_size)
    here = Text(
        "The first {name} is {loss:.2f}{mean}",
        name=Text("cross-entropy") if has_number(line, "kl") else Text("loss"),
        loss=loss,
        mean=Text(" (mean up to step {step})", step=steps) if steps > 1 else "",
    )
    start = Text(
        "the ln({size:,}) = {loss:.2f} of an untrained model", size=vocab_size, loss=uniform
    )
    if loss > uniform + FIRST_LOSS_MARGIN:
        text = Text(
            "{here}, far above {start}. Check the initialisation; if the loss rose in the first "
            "steps, try a smaller --learning_rate or a longer warm-up.",
            here=here,
            start=start,
        )
        return Finding(text)
    limit = uniform - FIRST_LOSS_MARGIN if steps == 1 else FIRST_LINE_SHARE * uniform
    if steps <= FIRST_LINE_STEPS and loss < limit:
        text = Text(
            "{here}, far below {start}. The input holds its targets, the mask leaves only easy "
            "ones, or the data repeat one text: inspect a few samples (scripts/show_batch.py).",
            here=here,
            start=start,
        )
        return Finding(text)
    return fine(Text("{here}, against {start}.", here=here, start=start))


def _divergence(lines: Metrics, losses: list[float]) -> Finding | None:
    """Whether the loss ends far above its lowest point."""
    few = len(lines) < MIN_LINES
    if not lines or (few and lines[-1]["step"] <= FIRST_LINE_STEPS):
        return None
    smooth = moving_mean(losses, 1 if few else max(3, len(lines) // 40))
    end, low = smooth[-1], min(smooth)
    if end <= (1 + (FEW_LINES_RISE if few else LARGE_RISE)) * low:
        return None
    text = Text(
        "The run diverges: the loss rose to {end:.2f} from {low:.2f} near step {step:,}, whose "
        "weights are better than the last ones. Try a smaller --learning_rate or a longer warm-up.",
        end=end,
        low=low,
        step=lines[smooth.index(low)]["step"],
    )
    return Finding(text, harmful=True)


def _little_learnt(
    lines: Metrics, whole: Metrics, evaluations: Metrics, vocab_size: int
) -> Finding | None:
    """Whether a model that was untrained ends near where it started; `whole` are whole intervals.

    Few steps are no excuse: what a run has not learnt, its user should know.
    """
    if len(whole) >= 2:
        end, step = statistics.fmean(last_third(column(whole, "loss"))), whole[-1]["step"]
    elif evaluations:
        end, step = evaluations[-1]["val_loss"], evaluations[-1]["step"]
    elif lines:  # the last one, however few steps it averages: the first one holds the start
        end, step = lines[-1]["loss"], lines[-1]["step"]
    else:
        return None
    uniform = math.log(vocab_size)
    if end <= (1 - HARDLY_LEARNT) * uniform:
        return None
    nothing = len(whole) >= MIN_LINES and end > (1 - PLATEAU) * uniform
    advice = Text(
        "Try a larger --learning_rate where the gradient norm is below {norm:g}, a smaller one "
        "where it is not, and inspect a few samples.",
        norm=NORM_USUAL[0],
    )
    if step < FEW_STEPS:
        advice = Text(
            "{step:,} optimizer steps are few: a smaller --batch_size, more --epochs or more data "
            "give more.",
            step=step,
        )
    text = Text(
        "{learnt}: the loss ends at {end:.2f}; uniform guessing gives {uniform:.2f}. {advice}",
        learnt=Text("Nothing was learnt") if nothing else Text("Hardly anything was learnt"),
        end=end,
        uniform=uniform,
        advice=advice,
    )
    return Finding(text, harmful=True)


def _course(lines: Metrics, losses: list[float]) -> Finding | None:
    """Sawtooth or plateau: one of them, since they share their causes."""
    if len(lines) < MIN_LINES:
        return None
    # Smoothed over a fortieth of the run, as the eye does: a long run is not all scatter.
    smooth = moving_mean(losses, max(1, len(lines) // 40))
    logs = [math.log(max(loss, 1e-9)) for loss in smooth]
    swings = count_rises(logs, math.log(1 + SWING))
    if swings >= SWINGS and swings > latest(lines, "spikes"):
        text = Text(
            "Sawtooth: the loss climbed by more than {climb:.0%} {swings} times. Try a smaller "
            "--learning_rate or a larger batch (--accumulation_steps).",
            climb=SWING,
            swings=swings,
        )
        return Finding(text)
    fall, error = _fall(last_third(losses))
    change = Text("the loss fell by {fall:.1%} over the last third of the run", fall=fall)
    if fall >= PLATEAU:
        return fine(Text("Still learning: {change}.", change=change))
    rates = column(lines, "lr")
    share = rates[-1] / max(rates) if rates and max(rates) else 0.0
    if fall + error >= PLATEAU or share < LR_NEAR_END:
        return None
    if fall <= 0:
        change = Text("the loss did not fall over the last third of the run")
    text = Text(
        "Plateau: {change}, with the learning rate still at {share:.0%} of its peak. Let it decay "
        "now (a shorter run, or another --lr_decay), or try a larger model or more data.",
        change=change,
        share=share,
    )
    return Finding(text)


def _fall(losses: list[float]) -> tuple[float, float]:
    """How far a least-squares line through the losses falls, by their mean; its standard error."""
    places = range(len(losses))
    slope, start = statistics.linear_regression(places, losses)
    squares = sum((loss - start - slope * i) ** 2 for i, loss in zip(places, losses, strict=True))
    spread = len(losses) * statistics.pvariance(places)
    error = math.sqrt(squares / (len(losses) - 2) / spread)
    scale = (len(losses) - 1) / statistics.fmean(losses)
    return -slope * scale, error * scale


def _gap(lines: Metrics, evaluations: Metrics) -> Finding | None:
    if not evaluations or having(lines, "kl"):
        return None  # a teacher is part of the training loss alone
    validation, step = evaluations[-1]["val_loss"], evaluations[-1]["step"]
    training = training_loss_at(lines, step)
    if training is None:
        return None
    both = Text(
        "The last validation loss is {validation:.3f}, the training loss there {training:.3f}",
        validation=validation,
        training=training,
    )
    if validation < (1 + LARGE_RISE) * training:
        return fine(Text("{here}.", here=both))
    text = Text(
        "{both}, a gap of {gap:.0%}. If it grew during the run, try more data, fewer --epochs or "
        "some --dropout; if it was there from the start, the validation text is of another kind "
        "than the training text.",
        both=both,
        gap=validation / training - 1,
    )
    return Finding(text)


def _gradient_norm(lines: Metrics) -> Finding | None:
    norms = column(lines, "grad_norm")
    if not norms:
        return None
    middle, (low, high) = statistics.median(norms), NORM_USUAL
    here = Text("The median gradient norm is {middle:.3g}", middle=middle)
    usual = Text("{low:g} to {high:g} is usual", low=low, high=high)
    if middle > NORM_UNSTABLE:
        text = Text(
            "{here}, above {limit:g}: training is unstable ({usual}). Try a third of the "
            "--learning_rate and a longer warm-up, and look for broken texts in the data.",
            here=here,
            limit=NORM_UNSTABLE,
            usual=usual,
        )
        return Finding(text)
    if middle < NORM_NOTHING_LEARNT:
        text = Text(
            "{here}, below {limit:g}: next to nothing is learnt ({usual}). Unless the loss is near "
            "0, check that there are targets, and try a larger --learning_rate.",
            here=here,
            limit=NORM_NOTHING_LEARNT,
            usual=usual,
        )
        return Finding(text)
    return fine(Text("{here}.", here=here))
