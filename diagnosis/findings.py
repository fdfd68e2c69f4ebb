"""The report of a run: its key figures, what its curves say, and a picture of them."""

import json
import math
import shlex
import statistics
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from common import write_atomically

from .curves import Metrics, draw_curves, has_number, read_metrics
from .preference_findings import (
    accuracy_gap,
    course_of_accuracy,
    course_of_margin,
    course_of_training_loss,
    price_of_margin,
)

# Untrained, the model's logits have a standard deviation s of about 0.02 · sqrt(dim), which puts
# the loss s²/2 above ln(vocabulary): 0.1 nats at dim 512, and 1 nat only beyond dim 5,000.
FIRST_LOSS_MARGIN = 1.0
# A first line that is a mean over more steps than this may honestly be far below ln(vocabulary).
FIRST_LINE_STEPS = 20
# How often tokens occur is learnt first, and saves about a quarter of ln(vocabulary). Half of it
# needs knowledge of what follows what, which so few steps cannot give.
FIRST_LINE_SHARE = 0.5

# How often tokens occur is all that a run must have learnt to save a tenth of ln(vocabulary).
HARDLY_LEARNT = 0.1

# The course of the loss is judged from so many lines on: then its last third has four. Of fewer
# lines only what stands out far beyond their scatter is told.
MIN_LINES = 12
FEW_LINES_RISE = 0.2
# Loss falls as a power of the tokens, with exponents of 0.05 to 0.1 (arXiv:2001.08361). So a last
# third brings 2 to 4 %; with less than half of that, more tokens will not bring much.
PLATEAU = 0.01
# Below this share of its peak the learning rate is near its end, where curves flatten anyway.
LR_NEAR_END = 0.25
# Lines that average ten steps usually scatter by 1 to 2 %; a swing is well above that.
SWING = 0.1
SWINGS = 3  # fewer may be accidents
# At least so many lines before an epoch's end are compared with as many after it; their means
# differ by 1 to 2 % by accident.
BORDER_LINES = 3
BORDER_JUMP = 0.05

# Halves of one shuffled text differ by 1 to 2 %.
GAP = 0.1
# A validation set is the same each time, so that its loss scatters less than the training loss.
VALIDATION_RISE = 0.01
LEAST_RISE = 0.005  # nats: a loss of 0.001 that doubles is still next to nothing
# The training loss at a step is a mean over so many steps before it, and at least three lines.
TRAINING_LOSS_STEPS = 30

# The norm of the gradient over all weights, before clipping.
NORM_NOTHING_LEARNT = 0.01
NORM_USUAL = (0.1, 1.0)
NORM_UNSTABLE = 10.0

# Above this share of skipped updates a run has hardly trained.
MOST_SKIPPED = 0.5
# A spike in thousands of steps is no news.
SPIKES_PER_STEP = 1e-3
# An expert below this share of an even load sees too few tokens to become good at anything.
STARVED = 0.25
DEAD = 0.01


LINE_LENGTH = 95  # of a command in the report


class Reading(NamedTuple):
    """What one look at the curves gave.

    Attributes:
        alarm: something stands out.
        text: what, and what to try.
        harm: the run made the model worse, or was in vain; reported before all else.
    """

    alarm: bool
    text: str
    harm: bool = False


def findings(
    metrics: Metrics, vocab_size: int, from_scratch: bool, n_routed_experts: int = 0
) -> list[str]:
    """What stands out in the curves of a run, each with what to try; empty if nothing does.

    What did harm comes first.

    Args:
        metrics: lines of metrics.jsonl.
        vocab_size: an untrained model's loss is about its logarithm.
        from_scratch: the run began with untrained weights.
        n_routed_experts: of a layer; 0 for a dense model.
    """
    readings = read_curves(metrics, vocab_size, from_scratch, n_routed_experts)
    return [reading.text for reading in readings if reading.alarm]


def read_curves(
    metrics: Metrics, vocab_size: int, from_scratch: bool, n_routed_experts: int = 0
) -> list[Reading]:
    """Everything that can be said of the curves, good or bad; arguments as for `findings`.

    What did harm comes first. What a run is too short for is left out.
    """
    lines = [m for m in metrics if has_number(m, "loss")]
    evaluations = [m for m in metrics if has_number(m, "val_loss")]
    if any(has_number(m, "margin") for m in lines):  # of preference training
        found = [
            course_of_training_loss(lines),
            course_of_margin(lines),
            course_of_accuracy(evaluations),
            price_of_margin(lines, evaluations),
            accuracy_gap(metrics),
        ]
        own = [Reading(*reading) for reading in found if reading is not None]
    else:
        # Of a taught student, what it makes of the data: a teacher's word has another floor.
        data = [{**m, "loss": m.get("cross_entropy", m["loss"])} for m in lines]
        whole = _whole_intervals(data)
        little = _little_learnt(whole, evaluations, vocab_size) if from_scratch else None
        own = [
            _first_loss(data, vocab_size) if from_scratch else None,
            _divergence(whole) or little or _course(whole),
            _epoch_borders(whole),
            _gap(lines, evaluations),
            _test_gap(metrics, evaluations),
            _gradient_norm(lines),
        ]
    readings = [
        _not_finite(metrics),
        _validation(lines, evaluations),
        *own,
        _worse_sets(evaluations),
        _skipped_updates(metrics),
        _spikes(metrics),
        _expert_load(lines, n_routed_experts),
    ]
    found = [reading for reading in readings if reading is not None]
    return sorted(found, key=lambda reading: not reading.harm)


def _whole_intervals(lines: Metrics) -> Metrics:
    """The lines without those that average much less than the others, as at an epoch's end."""
    tokens = [m["tokens"] for m in lines]
    counts = [count - before for before, count in pairwise([0, *tokens])]
    half = statistics.median(counts) / 2 if counts else 0
    return [line for line, count in zip(lines, counts, strict=True) if count >= half]


def _mean(lines: Metrics, name: str = "loss") -> float:
    return statistics.fmean(m[name] for m in lines)


def _smooth(lines: Metrics, width: int) -> list[float]:
    """The moving mean of the loss over `width` lines."""
    return [_mean(lines[i : i + width]) for i in range(len(lines) - width + 1)]


def _first_loss(lines: Metrics, vocab_size: int) -> Reading | None:
    if not lines:
        return None
    loss, steps, even = lines[0]["loss"], lines[0]["step"], math.log(vocab_size)
    name = "cross-entropy" if has_number(lines[0], "kl") else "loss"
    here = f"The first {name} is {loss:.2f}" + (f", a mean up to step {steps}" if steps > 1 else "")
    start = f"ln({vocab_size:,}) = {even:.2f}, where a model that knows nothing starts"
    if loss > even + FIRST_LOSS_MARGIN:
        return Reading(
            True,
            f"{here}, far above {start}: it is confident and wrong. Look at the initialisation; if "
            "the loss rose in the first steps, try a smaller --learning_rate or a longer warm-up.",
        )
    limit = even - FIRST_LOSS_MARGIN if steps == 1 else FIRST_LINE_SHARE * even
    if steps <= FIRST_LINE_STEPS and loss < limit:
        return Reading(
            True,
            f"{here}, far below {start}. Either the model sees what it should predict (targets not "
            "shifted, attention to later tokens), or the mask leaves only easy targets, or the "
            "data repeats one text. Look at a few samples.",
        )
    return Reading(False, f"{here}; {start}.")


def _divergence(lines: Metrics) -> Reading | None:
    """Whether the loss ends far above its lowest point."""
    few = len(lines) < MIN_LINES
    if not lines or (few and lines[-1]["step"] <= FIRST_LINE_STEPS):
        return None
    smooth = _smooth(lines, 1 if few else max(3, len(lines) // 40))
    end, low = smooth[-1], min(smooth)
    if end <= (1 + (FEW_LINES_RISE if few else SWING)) * low:
        return None
    step = lines[smooth.index(low)]["step"]
    return Reading(
        True,
        f"The loss rose to {end:.2f} after {low:.2f} near step {step:,}: the run diverges. "
        "Try a smaller --learning_rate or a longer warm-up; weights from before that step are "
        "better than the last ones.",
        harm=True,
    )


def _little_learnt(lines: Metrics, evaluations: Metrics, vocab_size: int) -> Reading | None:
    """Whether a model that was untrained ends near where it started."""
    if len(lines) >= 2:  # the first line holds the start
        end, step = _mean(lines[-max(1, len(lines) // 3) :]), lines[-1]["step"]
    elif evaluations:
        end, step = evaluations[-1]["val_loss"], evaluations[-1]["step"]
    else:
        return None
    even = math.log(vocab_size)
    if step <= FIRST_LINE_STEPS or end <= (1 - HARDLY_LEARNT) * even:
        return None
    nothing = len(lines) >= MIN_LINES and end > (1 - PLATEAU) * even
    return Reading(
        True,
        f"{'Nothing' if nothing else 'Hardly anything'} was learnt: the loss ends at {end:.2f}, "
        f"even odds for all tokens give {even:.2f}, and how often each token occurs saves about a "
        f"quarter of that. If {step:,} steps are few, train longer; else with a gradient norm "
        f"below {NORM_USUAL[0]:g} try a larger --learning_rate, with another a smaller one, and "
        "look at a few samples, too.",
        harm=True,
    )


def _course(lines: Metrics) -> Reading | None:
    """Sawtooth or plateau: one of them, since they share their causes."""
    if len(lines) < MIN_LINES:
        return None
    # Seen at a fortieth of the run, as by eye, a long run is not all scatter.
    width = max(1, len(lines) // 40)
    swings = _count_swings(_smooth(lines, width))
    if swings >= SWINGS and swings > _latest(lines, "spikes"):
        return Reading(
            True,
            f"Sawtooth: the loss climbed by more than {SWING:.0%} {swings} times. Try a smaller "
            "--learning_rate or a larger batch (--accumulation_steps).",
        )
    fall, uncertainty = _fall(lines[-(len(lines) // 3) :])
    at_end = f"the loss fell by {fall:.1%} over the last third of the run"
    if fall >= PLATEAU:
        return Reading(False, f"Still learning: {at_end}.")
    rates = [m["lr"] for m in lines if has_number(m, "lr")] or [0.0]
    share = rates[-1] / max(rates) if max(rates) else 0.0
    if fall + uncertainty < PLATEAU and share >= LR_NEAR_END:
        change = at_end if fall > 0 else "the loss did not fall over the last third of the run"
        return Reading(
            True,
            f"Plateau: {change}, with the learning rate still at {share:.0%} of its peak. Let it "
            "decay now (a shorter run, or another --lr_decay), or try another --learning_rate; if "
            "neither helps, the size of the model or the data may be the limit.",
        )
    return None


def _count_swings(values: list[float]) -> int:
    """How often the values climb by more than SWING from a low, after falling as far before."""
    swings, climbing, turn = 0, False, values[0]
    for value in values:
        if climbing and value < (1 - SWING) * turn:
            climbing, turn = False, value
        elif not climbing and value > (1 + SWING) * turn:
            climbing, turn = True, value
            swings += 1
        else:
            turn = max(turn, value) if climbing else min(turn, value)
    return swings


def _fall(lines: Metrics) -> tuple[float, float]:
    """How far a straight line through the losses falls, as a share of their mean; standard error.

    Ordinary least squares over the lines, which are about equally far apart.
    """
    losses = [m["loss"] for m in lines]
    places = range(len(losses))
    slope, start = statistics.linear_regression(places, losses)
    squares = sum((loss - start - slope * i) ** 2 for i, loss in zip(places, losses, strict=True))
    spread = len(losses) * statistics.pvariance(places)
    error = math.sqrt(squares / (len(losses) - 2) / spread)
    length, mean = len(losses) - 1, statistics.fmean(losses)
    return -slope * length / mean, error * length / mean


def _epoch_borders(lines: Metrics) -> Reading | None:
    """Compare the change at each border with the changes within the two epochs beside it."""
    starts = [
        i for i in range(len(lines)) if i == 0 or lines[i].get("epoch") != lines[i - 1].get("epoch")
    ]
    starts.append(len(lines))

    def change(i: int, side: int) -> float:
        return _mean(lines[i : i + side]) / _mean(lines[i - side : i]) - 1

    jumps, judged = [], 0
    for (start, border), (_, end) in pairwise(pairwise(starts)):
        shorter = min(border - start, end - border)
        side = max(BORDER_LINES, shorter // 8)
        if shorter < 2 * side:
            continue
        judged += 1
        within = [
            change(i, side) for i in range(start + side, end - side + 1) if abs(i - border) >= side
        ]
        usual = statistics.median(within)
        scatter = statistics.median(abs(c - usual) for c in within)
        jump = change(border, side) - usual
        if abs(jump) > max(BORDER_JUMP, 4 * scatter):
            jumps.append(jump)
    if not judged:
        return None
    if 2 * len(jumps) < judged:
        return Reading(False, "The loss passes from epoch to epoch without a jump.")
    jump = statistics.median(jumps)
    if jump < 0:
        cause = (
            "the model recognises the texts it has read. Watch the validation loss, and try fewer "
            "--epochs or more data."
        )
    else:
        cause = (
            "an epoch begins with harder texts than it ends with, so their order is not random. "
            "Shuffle the data."
        )
    return Reading(True, f"Sawtooth: where an epoch ends, the loss jumps by {jump:+.0%}: {cause}")


def _training_loss_at(lines: Metrics, step: int) -> float | None:
    """Mean of the last lines up to a step: a line alone scatters."""
    before = [m for m in lines if m["step"] <= step]
    recent = [m for m in before if m["step"] > step - TRAINING_LOSS_STEPS]
    return _mean(max(recent, before[-3:], key=len)) if before else None


def _not_finite(metrics: Metrics) -> Reading | None:
    """Scores that are not a number: `has_number` passes them over, and so do all other readings."""
    for name, data in (("val_loss", "validation"), ("test_loss", "test")):
        steps = [m.get("step", 0) for m in metrics if name in m and not has_number(m, name)]
        if steps:
            return Reading(
                True,
                f"The {data} loss is not finite at step {steps[0]:,}: the weights are broken, or "
                "--dtype float16 overflows. Take weights from before (--save_best, --keep_every), "
                "and try a smaller --learning_rate, a longer warm-up or another --dtype.",
                harm=True,
            )
    return None


def _rose(low: float, end: float, share: float) -> bool:
    """Whether a validation loss rose by more than that share of it."""
    return end - low > max(share * low, LEAST_RISE)


def _validation(lines: Metrics, evaluations: Metrics) -> Reading | None:
    """Whether the validation loss ends where it is lowest: end against start and against best."""
    if len(evaluations) < 2:
        return None
    first, last = evaluations[0], evaluations[-1]
    best = min(evaluations, key=lambda m: m["val_loss"])
    start, low, end = (m["val_loss"] for m in (first, best, last))
    advice = "Try a smaller --learning_rate or fewer --epochs"
    if has_number(last, "val_margin"):
        advice += " or a larger --beta"
    if _rose(start, end, VALIDATION_RISE):
        before = "the starting weights had" if first["step"] == 0 else "it was"
        better = (
            "the starting weights are better than the last ones"
            if best is first and first["step"] == 0
            else f"take the best weights (--save_best), of step {best['step']:,} with {low:.3f}"
        )
        return Reading(
            True,
            f"The run made the model worse: the validation loss ends at {end:.3f}, and {before} "
            f"{start:.3f} at step {first['step']:,}; {better}. {advice}, and look whether the "
            "training data are of the kind that is validated.",
            harm=True,
        )
    then, now = (_training_loss_at(lines, m["step"]) for m in (best, last))
    known = then is not None and now is not None
    if _rose(low, end, VALIDATION_RISE) and known and now < then:
        return Reading(
            True,
            f"Over-fitting: the validation loss was {low:.3f} at step {best['step']:,} "
            f"and is {end:.3f} now, while the training loss fell from {then:.3f} to "
            f"{now:.3f}. Take the best weights (--save_best, --early_stopping_patience); for "
            "better ones: fewer --epochs, more data, some --dropout.",
        )
    if _rose(low, end, SWING):
        return Reading(
            True,
            f"The validation loss rose again, from {low:.3f} at step {best['step']:,} to "
            f"{end:.3f}. Take the best weights (--save_best). {advice}.",
        )
    at = "at the end" if best is last else f"at step {best['step']:,}"
    return Reading(False, f"The validation loss is lowest {at}, {low:.3f}.")


def _worse_sets(evaluations: Metrics) -> Reading | None:
    """Validation sets whose own loss rose though that of all sets together did not."""
    if len(evaluations) < 2:
        return None
    first, last = evaluations[0], evaluations[-1]
    if _rose(first["val_loss"], last["val_loss"], VALIDATION_RISE):
        return None
    worse = [
        f"{name.removeprefix('val_loss/')} from {first[name]:.3f} to {last[name]:.3f}"
        for name in last
        if name.startswith("val_loss/") and has_number(first, name) and has_number(last, name)
        if _rose(first[name], last[name], GAP)
    ]
    if not worse:
        return None
    return Reading(
        True,
        f"The loss rose on some of the validation sets: {', '.join(worse)}. The model forgets what "
        "they hold: mix such texts into the training data, or try a smaller --learning_rate.",
    )


def _gap(lines: Metrics, evaluations: Metrics) -> Reading | None:
    if not evaluations or any(has_number(m, "kl") for m in lines):
        return None  # a teacher is part of the training loss alone
    validation, step = evaluations[-1]["val_loss"], evaluations[-1]["step"]
    training = _training_loss_at(lines, step)
    if training is None:
        return None
    both = f"The last validation loss is {validation:.3f}, the training loss there {training:.3f}"
    if validation < (1 + GAP) * training:
        return Reading(False, f"{both}.")
    return Reading(
        True,
        f"{both}, a gap of {validation / training - 1:.0%}. If it grew with the run, texts are "
        "learnt by heart: more data, fewer --epochs, some --dropout. If it was there from the "
        "start, the validation text is of another kind than the training text.",
    )


def _test_gap(metrics: Metrics, evaluations: Metrics) -> Reading | None:
    """The test is taken by the best weights, so that it compares with the best validation."""
    tests = [m["test_loss"] for m in metrics if has_number(m, "test_loss")]
    if not tests or not evaluations:
        return None
    test, validation = tests[-1], min(m["val_loss"] for m in evaluations)
    if not _rose(validation, test, GAP):
        both = f"The test loss is {test:.3f}, the best validation loss {validation:.3f}."
        return Reading(False, both)
    return Reading(
        True,
        f"The test loss is {test:.3f}, far above the best validation loss of {validation:.3f}: the "
        "test text is of another kind than the validation text, or that one is so small that the "
        "best weights are best by chance. Trust the test, and validate on more text, of its kind.",
    )


def _gradient_norm(lines: Metrics) -> Reading | None:
    norms = sorted(m["grad_norm"] for m in lines if has_number(m, "grad_norm"))
    if not norms:
        return None
    middle = statistics.median(norms)
    low, high = NORM_USUAL
    here = f"The median gradient norm is {middle:.3g}"
    usual = f"{low:g} to {high:g} is usual"
    if middle > NORM_UNSTABLE:
        text = (
            f"{here}, above {NORM_UNSTABLE:g}: training is unstable ({usual}). Try a third of the "
            "--learning_rate and a longer warm-up, and look for broken texts in the data."
        )
    elif middle > high:
        text = (
            f"{here}, above {high:g}: clipping to 1 shortens many updates ({usual}). If the "
            "loss falls smoothly, let it be; else try a smaller --learning_rate or a larger batch."
        )
    elif middle < NORM_NOTHING_LEARNT:
        text = (
            f"{here}, below {NORM_NOTHING_LEARNT:g}: next to nothing is learnt ({usual}). With a "
            "loss near 0 there is nothing left to learn; else look whether the mask leaves targets "
            "at all, and try a larger --learning_rate."
        )
    else:
        return Reading(False, f"{here}; {usual}.")
    return Reading(True, text)


def _latest(metrics: Metrics, name: str) -> int:
    """The last value of a count; 0 if it was never logged."""
    return next((m[name] for m in reversed(metrics) if has_number(m, name)), 0)


def _skipped_updates(metrics: Metrics) -> Reading | None:
    if not any(has_number(m, "skipped") for m in metrics):
        return None
    skipped, steps = _latest(metrics, "skipped"), _latest(metrics, "step")
    if not skipped:
        return Reading(False, "No update was skipped.")
    if skipped > MOST_SKIPPED * steps:
        return Reading(
            True,
            f"{skipped:,} of {steps:,} updates were skipped, most of the run, since loss or "
            "gradient was not finite: the model has hardly trained. training_log.txt names the "
            "texts. Try --dtype bfloat16 or float32, a smaller --learning_rate, a longer warm-up.",
            harm=True,
        )
    return Reading(
        True,
        f"{skipped:,} of {steps:,} updates were skipped, since loss or gradient was not finite; "
        "training_log.txt names the texts. With --dtype float16 a few at the start are usual, "
        "while the loss scale is found; else try --dtype bfloat16 or a smaller --learning_rate.",
    )


def _spikes(metrics: Metrics) -> Reading | None:
    if not any(has_number(m, "spikes") for m in metrics):
        return None
    spikes, steps = _latest(metrics, "spikes"), _latest(metrics, "step")
    if spikes >= 2 and spikes > SPIKES_PER_STEP * steps:
        return Reading(
            True,
            f"The loss spiked {spikes:,} times in {steps:,} steps. Try a smaller --learning_rate, "
            "a longer warm-up or a smaller --grad_clip.",
        )
    times = {0: "never spiked", 1: "spiked once"}.get(spikes, f"spiked {spikes:,} times")
    return Reading(False, f"The loss {times} in {steps:,} steps.")


def _expert_load(lines: Metrics, n_routed_experts: int) -> Reading | None:
    loads = [m["expert_load_min"] for m in lines if has_number(m, "expert_load_min")]
    if not loads or not n_routed_experts:
        return None
    late = statistics.fmean(loads[-max(1, len(loads) // 3) :])  # the start may be uneven
    here = (
        f"the least used expert gets {late:.1%} of its layer's tokens; "
        f"an even load is {1 / n_routed_experts:.1%}"
    )
    if late >= STARVED / n_routed_experts:
        return Reading(False, f"{here[0].upper()}{here[1:]}.")
    name = "Dead expert" if late < DEAD / n_routed_experts else "Starved expert"
    return Reading(
        True,
        f"{name}: {here}. Its weights are hardly trained: try a larger --aux_loss_alpha or "
        "fewer experts.",
    )


def write_report(
    folder: Path,
    *,
    ending: str,
) -> str:
    """Write report.md and, where matplotlib is installed, curves.png into a run's folder.

    Args:
        folder: holds the run's metrics.jsonl and, as a rule, config.json.
        ending: how the run ended, such as "finished" or "stopped by SIGTERM at step 120 of 500".

    Returns:
        A line that says where the report is and how much stands out in it.

    Raises:
        OSError: if a file cannot be read or written; what was there before is kept.
        ValueError: if metrics.jsonl or config.json is damaged.
    """
    metrics = read_metrics(folder / "metrics.jsonl")
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = about["config"]
    n_routed_experts = config["n_routed_experts"] if config["use_moe"] else 0
    from_scratch = about["arguments"]["from_weight"] == "none"
    readings = read_curves(metrics, config["vocab_size"], from_scratch, n_routed_experts)
    alarms = [reading.text for reading in readings if reading.alarm]
    fine = [reading.text for reading in readings if not reading.alarm]
    try:
        draw_curves({folder.name: metrics}, folder / "curves.png")
        picture = "![loss, validation loss, learning rate and gradient norm](curves.png)"
    except ImportError:
        run, out = folder.as_posix(), (folder / "curves.png").as_posix()
        command = shlex.join(["python", "scripts/plot_run.py", run, "--out", out])
        picture = (
            "Drawing them needs matplotlib, which is not installed:\n\n"
            f"```bash\npip install -r scripts/requirements.txt\n{command}\n```"
        )
    n_lines = sum(has_number(m, "loss") for m in metrics)
    short = (
        f"\n\nThe course of the loss is judged from {MIN_LINES} training lines on; this run has "
        f"{n_lines}. A smaller --log_interval gives more."
    )
    is_short = n_lines < MIN_LINES and not any(has_number(m, "margin") for m in metrics)
    text = f"""# {folder.name}

Ended: {ending}.

{_table(_key_figures(metrics))}

## What stands out

{_bullets(alarms) or "Nothing stands out."}{short if is_short else ""}

## What is as it should be

{_bullets(fine) or "Nothing could be judged."}

## Curves

{picture}
{_by_domain(metrics)}{_start(folder / "config.json")}"""
    path = folder / "report.md"
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))
    count = {0: "nothing stands out", 1: "one thing stands out"}
    return f"{path}: {count.get(len(alarms), f'{len(alarms)} things stand out')}"


def _bullets(texts: list[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _table(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table whose first row is its head."""
    head, *body = [" | ".join(cell.replace("|", r"\|") for cell in row) for row in rows]
    rule = " | ".join("---" for _ in rows[0])
    return "\n".join(f"| {line} |" for line in (head, rule, *body))


def _scores(line: dict[str, Any], kind: str, name: str = "") -> str:
    """The scores of a line, as far as it holds them."""
    units = {"loss": ("", ".4f"), "perplexity": ("perplexity ", ",.2f")}
    units["bits_per_byte"] = ("bits per byte ", ".4f")
    units |= {"accuracy": ("accuracy ", ".1%"), "margin": ("margin ", ".3f")}
    return ", ".join(
        f"{word}{line[f'{kind}_{unit}{name}']:{style}}"
        for unit, (word, style) in units.items()
        if has_number(line, f"{kind}_{unit}{name}")
    )


def _key_figures(metrics: Metrics) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "")]
    lines = [m for m in metrics if has_number(m, "loss")]
    evaluations = [m for m in metrics if has_number(m, "val_loss")]
    if lines:
        first, last = lines[0], lines[-1]
        rows.append(("optimizer steps", f"{last['step']:,}"))
        rows.append(("target tokens", f"{last['tokens']:,}"))
        minutes, seconds = divmod(round(last["seconds"]), 60)
        rows.append(("training time", f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"))
        if last["seconds"]:
            rows.append(("tokens per second", f"{last['tokens'] / last['seconds']:,.0f}"))
        rows.append(("first loss", f"{first['loss']:.4f} (up to step {first['step']:,})"))
        rows.append(("last loss", f"{last['loss']:.4f}"))
        if mfu := [m["mfu"] for m in lines if has_number(m, "mfu")]:
            rows.append(("MFU", f"{statistics.median(mfu):.1%}"))
        if memory := [m["memory_gb"] for m in lines if has_number(m, "memory_gb")]:
            rows.append(("memory", f"{max(memory):.2f} GB"))
    if evaluations:
        best, last = min(evaluations, key=lambda m: m["val_loss"]), evaluations[-1]
        rows.append(("best validation", f"{_scores(best, 'val')} (step {best['step']:,})"))
        if last is not best:
            rows.append(("last validation", f"{_scores(last, 'val')} (step {last['step']:,})"))
    for line in metrics:
        if has_number(line, "test_loss"):
            rows.append(("test", _scores(line, "test")))
    return rows


def _by_domain(metrics: Metrics) -> str:
    """A table of the validation sets at the best evaluation; nothing if there is only one set."""
    evaluations = [m for m in metrics if has_number(m, "val_loss")]
    if not evaluations:
        return ""
    best = min(evaluations, key=lambda m: m["val_loss"])
    names = [key.removeprefix("val_loss") for key in best if key.startswith("val_loss/")]
    if not names:
        return ""
    rows = [("validation set", f"at step {best['step']:,}")]
    rows += [(name.removeprefix("/"), _scores(best, "val", name)) for name in names]
    return f"\n## By validation set\n\n{_table(rows)}\n"


def _start(path: Path) -> str:
    """The command that started the run, and the versions it ran with; nothing without a file."""
    if not path.is_file():
        return ""
    config = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    command = _in_lines([*config["launcher"], *config["command"]])
    commit = config.get("commit") or "unknown"
    return (
        f"\n## How it was started\n\nWith {versions}; commit {commit}.\n\n```bash\n{command}\n```\n"
    )


def _in_lines(words: list[str]) -> str:
    """A command as a shell takes it, broken in front of flags where a line is full."""
    lines = [shlex.quote(words[0])]
    for i, word in enumerate(words[1:], start=1):
        flag = word
        if word.startswith("--"):  # with its values
            values = takewhile(lambda w: not w.startswith("--"), words[i + 1 :])
            flag = shlex.join([word, *values])
        if word.startswith("--") and len(lines[-1]) + len(flag) > LINE_LENGTH:
            lines.append("   ")
        lines[-1] += f" {shlex.quote(word)}"
    return " \\\n".join(lines)
