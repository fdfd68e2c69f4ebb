"""What the metrics of a run of any stage show, good or bad."""

import statistics
from typing import NamedTuple

from common import Text

from .metrics import (
    Metrics,
    best_evaluation,
    column,
    has_number,
    having,
    last_third,
    latest,
    training_loss_at,
)

FEW_STEPS = 200  # optimizer steps, in which little can be learnt
VALIDATION_RISE = 0.01  # the set is the same each time, so the loss scatters less than in training
LARGE_RISE = 0.1  # halves of one shuffled text differ by 1 to 2 %
ACCURACY_GAP = 0.1  # between validation and test data of one kind, that may be an accident
LEAST_RISE = 0.005  # nats: a loss of 0.001 that doubles is still next to nothing
MOST_SKIPPED = 0.5  # above this share of skipped updates a run has hardly trained
SPIKES_PER_STEP = 1e-3  # a spike in thousands of steps is no news
STARVED = 0.25  # an expert below this share of an even load sees too few tokens
DEAD = 0.01


class Finding(NamedTuple):
    """One thing that the metrics show."""

    text: Text  # what it is and, if it stands out, what to try
    stands_out: bool = True  # it is not as it should be
    harmful: bool = False  # the run made the model worse, or was in vain


def fine(text: Text) -> Finding:
    """A finding of something that is as it should be."""
    return Finding(text, stands_out=False)


def general_findings(metrics: Metrics, n_routed_experts: int) -> list[Finding | None]:
    """What the metrics of any stage show; None for what cannot be judged, as experts if dense."""
    lines, evaluations = having(metrics, "loss"), having(metrics, "val_loss")
    return [
        _not_finite(metrics),
        _validation(lines, evaluations),
        _worse_sets(evaluations),
        _test_gap(metrics, evaluations),
        _skipped_updates(metrics),
        _spikes(metrics),
        _expert_load(lines, n_routed_experts),
    ]


def rose(low: float, end: float, share: float) -> bool:
    """Whether a validation loss rose by more than that share of it."""
    return end - low > max(share * low, LEAST_RISE)


def _not_finite(metrics: Metrics) -> Finding | None:
    """Scores that are not a number, which all other findings pass over."""
    scores = (("val_loss", Text("validation loss")), ("test_loss", Text("test loss")))
    for name, loss in scores:
        steps = [m.get("step", 0) for m in metrics if name in m and not has_number(m, name)]
        if steps:
            text = Text(
                "The {loss} is not finite at step {step:,}. Go back to earlier weights "
                "(--save_best, --keep_every) and try a smaller --learning_rate, a longer warm-up "
                "or, if it is float16, another --dtype.",
                loss=loss,
                step=steps[0],
            )
            return Finding(text, harmful=True)
    return None


def _validation(lines: Metrics, evaluations: Metrics) -> Finding | None:
    """Whether the validation loss ends where it is lowest: end against start and against best."""
    if len(evaluations) < 2:
        return None
    first, best, last = evaluations[0], best_evaluation(evaluations), evaluations[-1]
    start, low, end = (m["val_loss"] for m in (first, best, last))
    advice = Text("Try a smaller --learning_rate or fewer --epochs")
    if has_number(last, "val_margin"):
        advice = Text("Try a smaller --learning_rate or fewer --epochs or a larger --beta")
    step = best["step"]
    if rose(start, end, VALIDATION_RISE):
        better = Text(
            "the best weights (--save_best) are those of step {step:,} with {low:.3f}",
            step=step,
            low=low,
        )
        if best is first and first["step"] == 0:
            better = Text("the starting weights are better than the last ones")
        text = Text(
            "The run made the model worse: the validation loss ends at {end:.3f}, up from "
            "{start:.3f} at step {first:,}; {better}. {advice}, and check that the "
            "training data are of the same kind as the validation data.",
            end=end,
            start=start,
            first=first["step"],
            better=better,
            advice=advice,
        )
        return Finding(text, harmful=True)
    then, now = (training_loss_at(lines, m["step"]) for m in (best, last))
    if rose(low, end, VALIDATION_RISE) and None not in (then, now) and now < then:
        text = Text(
            "Over-fitting: the validation loss rose from {low:.3f} at step {step:,} to {end:.3f}, "
            "while the training loss fell from {then:.3f} to {now:.3f}. Use the best weights "
            "(--save_best), or try fewer --epochs, more data or some --dropout.",
            low=low,
            step=step,
            end=end,
            then=then,
            now=now,
        )
        return Finding(text)
    if rose(low, end, LARGE_RISE):
        text = Text(
            "The validation loss rose again, from {low:.3f} at step {step:,} to {end:.3f}. Use the "
            "best weights (--save_best). {advice}.",
            low=low,
            step=step,
            end=end,
            advice=advice,
        )
        return Finding(text)
    at = Text("at the end") if best is last else Text("at step {step:,}", step=step)
    return fine(Text("The validation loss is lowest {at}, {low:.3f}.", at=at, low=low))


def _worse_sets(evaluations: Metrics) -> Finding | None:
    """Validation sets whose own loss rose though that of all sets together did not."""
    if len(evaluations) < 2:
        return None
    first, last = evaluations[0], evaluations[-1]
    if rose(first["val_loss"], last["val_loss"], VALIDATION_RISE):
        return None
    worse = [
        Text(
            "{name} from {first:.3f} to {last:.3f}",
            name=name.removeprefix("val_loss/"),
            first=first[name],
            last=last[name],
        )
        for name in last
        if name.startswith("val_loss/") and has_number(first, name) and has_number(last, name)
        if rose(first[name], last[name], LARGE_RISE)
    ]
    if not worse:
        return None
    text = Text(
        "The loss rose on some of the validation sets: {worse}. The model forgets what they hold: "
        "mix such texts into the training data, or try a smaller --learning_rate.",
        worse=worse,
    )
    return Finding(text)


def _test_gap(metrics: Metrics, evaluations: Metrics) -> Finding | None:
    """The test is of the best weights, so it is compared with the best validation."""
    tests = having(metrics, "test_loss")
    if not tests or not evaluations:
        return None
    test, best = tests[-1], best_evaluation(evaluations)
    if has_number(test, "test_accuracy"):
        score, validation = test["test_accuracy"], best["val_accuracy"]
        here = Text(
            "The test accuracy is {test:.1%}, that of validation {validation:.1%}",
            test=score,
            validation=validation,
        )
        worse = score < validation - ACCURACY_GAP
    else:
        score, validation = test["test_loss"], best["val_loss"]
        here = Text(
            "The test loss is {test:.3f}, the best validation loss {validation:.3f}",
            test=score,
            validation=validation,
        )
        worse = rose(validation, score, LARGE_RISE)
    if not worse:
        return fine(Text("{here}.", here=here))
    text = Text(
        "{here}, far from it. Trust the test, and validate on more data of its kind.", here=here
    )
    return Finding(text)


def _skipped_updates(metrics: Metrics) -> Finding | None:
    if not having(metrics, "skipped"):
        return None
    skipped, steps = latest(metrics, "skipped"), latest(metrics, "step")
    if not skipped:
        return fine(Text("No update was skipped."))
    most = skipped > MOST_SKIPPED * steps
    text = Text(
        "{skipped:,} of {steps:,} updates were skipped{most}: loss or gradient was not finite; "
        "training_log.txt names the texts. Except for a few at the start with --dtype float16, try "
        "a smaller --learning_rate or a longer warm-up.",
        skipped=skipped,
        steps=steps,
        most=Text(", most of the run") if most else "",
    )
    return Finding(text, harmful=most)


def _spikes(metrics: Metrics) -> Finding | None:
    if not having(metrics, "spikes"):
        return None
    spikes, steps = latest(metrics, "spikes"), latest(metrics, "step")
    times = {0: Text("never spiked"), 1: Text("spiked once")}
    spiked = times.get(spikes, Text("spiked {spikes:,} times", spikes=spikes))
    here = Text("The loss {spiked} in {steps:,} steps.", spiked=spiked, steps=steps)
    if spikes < 2 or spikes <= SPIKES_PER_STEP * steps:
        return fine(here)
    advice = Text("Try a smaller --learning_rate or --grad_clip, or a longer warm-up.")
    return Finding(Text("{here} {advice}", here=here, advice=advice))


def _expert_load(lines: Metrics, n_routed_experts: int) -> Finding | None:
    loads = column(lines, "expert_load_min")
    if not loads or not n_routed_experts:
        return None
    late, even = statistics.fmean(last_third(loads)), 1 / n_routed_experts  # uneven at first
    if late >= STARVED * even:
        text = Text(
            "The least used expert gets {late:.1%} of its layer's tokens (even load: {even:.1%}).",
            late=late,
            even=even,
        )
        return fine(text)
    text = Text(
        "{name}: the least used expert gets {late:.1%} of its layer's tokens (even load: "
        "{even:.1%}). Try a larger --aux_loss_alpha or fewer experts.",
        name=Text("Dead expert") if late < DEAD * even else Text("Starved expert"),
        late=late,
        even=even,
    )
    return Finding(text)
