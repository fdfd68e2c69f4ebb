"""Pictures of a run: its figures over its tokens, alone or with other runs, and its rate."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import write_atomically

from .metrics import Metrics, column, having

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNITS = {1e9: "billion ", 1e6: "million ", 1e3: "thousand ", 1: ""}
# Runs whose ratio of bits per byte to nats per token differs by more than this share differ in
# tokenizer or text, so that their nats cannot be compared.
SAME_RATIO = 1e-3
# A peak so many times above the 95th percentile (and the first loss) would flatten all the rest.
PEAK = 1.5
LR_POINTS = 2000


def draw_curves(
    runs: Mapping[str, Metrics], path: Path, *, tokenizers_differ: bool = False
) -> None:
    """Draw loss, validation loss, learning rate and gradient norm over tokens into one PNG.

    The legend shows the names of the runs. Losses are in nats per token; where the runs differ in
    tokenizer or validation text, the validation loss is in bits per byte. With `tokenizers_differ`
    so is the training loss, by the bytes per token of the run's validation text, if all have one.
    A single run's validation sets are drawn one by one as well. ImportError without matplotlib;
    OSError if it cannot be written.
    """
    from matplotlib.figure import Figure

    curves = {name: having(metrics, "tokens") for name, metrics in runs.items()}
    every = [line for metrics in curves.values() for line in metrics]
    most = max((line["tokens"] for line in every), default=1)
    scale = next(size for size in UNITS if most >= size or size == 1)

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    loss, validation, lr, grad_norm = panels.flat

    unit = "per pair" if having(every, "margin") else "nats per token"
    ratios = {name: _bits_per_nat(metrics) for name, metrics in curves.items()}
    known = [ratio for ratio in ratios.values() if ratio is not None]
    losses, loss_unit = curves, unit
    if tokenizers_differ and len(known) == len(curves):
        losses = {name: _scaled(metrics, ratios[name]) for name, metrics in curves.items()}
        loss_unit = "bits per byte, estimated"
    elif tokenizers_differ:
        loss_unit += " of different tokenizers"
    _draw(loss, losses, "loss", scale)
    loss.set_title(f"training loss ({loss_unit})")
    _cut_peaks(loss, losses)
    in_bits = bool(known) and max(known) - min(known) > SAME_RATIO * max(known)
    _draw_validation(validation, curves, scale, unit, in_bits)
    _draw(lr, curves, "lr", scale)
    lr.set_title("learning rate")
    _fit_rates(lr)
    _draw(grad_norm, curves, "grad_norm", scale)
    grad_norm.set_title("gradient norm")
    norms = [norm for norm in column(every, "grad_norm") if norm > 0]
    if norms and max(norms) > 10 * min(norms):
        grad_norm.set_yscale("log")
        grad_norm.yaxis.set_major_formatter("{x:g}")

    for panel in panels.flat:
        panel.grid(alpha=0.3)
        if not panel.has_data():
            panel.text(0.5, 0.5, "none logged", ha="center", va="center", transform=panel.transAxes)
    for panel in panels[-1]:
        panel.set_xlabel(f"{UNITS[scale]}tokens")
    if len(runs) > 1:
        handles = [loss.plot([], [], color=f"C{i}")[0] for i in range(len(runs))]
        place = "outside lower center"
        figure.legend(handles, map(_label, runs), loc=place, ncols=min(4, len(runs)))
    _save(figure, path)


def draw_lr_curve(path: Path, lr_at: Callable[[int], float], total_steps: int) -> None:
    """Draw the learning rate over the optimizer steps into a PNG; raises as `draw_curves`."""
    from matplotlib.figure import Figure

    steps = range(0, total_steps, math.ceil(total_steps / LR_POINTS) or 1)
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [lr_at(step) for step in steps])
    axes.set(xlabel="step", ylabel="learning rate")
    axes.grid(alpha=0.3)
    _fit_rates(axes)
    _save(figure, path)


def _fit_rates(axes: "Axes") -> None:
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 2))


def _save(figure: "Figure", path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))


def _label(name: str) -> str:
    """As text: an underscore in front would hide it, and dollar signs would make it a formula."""
    return " " + name.replace("$", r"\$")


def _draw(
    axes: "Axes", curves: Mapping[str, Metrics], name: str, scale: float, **look: Any
) -> None:
    for i, metrics in enumerate(curves.values()):
        points = [(line["tokens"] / scale, line[name]) for line in having(metrics, name)]
        if points:
            usual = {"marker": "." if len(points) < 30 else None, "color": f"C{i}"}
            axes.plot(*zip(*points, strict=True), **(usual | look))


def _cut_peaks(axes: "Axes", curves: Mapping[str, Metrics]) -> None:
    """Leave the tops of rare high peaks outside the panel, and note it in its title."""
    runs = [column(metrics, "loss") for metrics in curves.values()]
    losses = sorted(loss for run in runs for loss in run)
    if not losses:
        return
    low, highest = losses[0], losses[-1]
    top = PEAK * max(losses[int(0.95 * (len(losses) - 1))], *(run[0] for run in runs if run))
    if highest > top:
        axes.set_ylim(low - 0.05 * (top - low), top)
        axes.set_title(f"{axes.get_title()}, peaks up to {highest:.4g}")


def _bits_per_nat(metrics: Metrics) -> float | None:
    """Bits per byte over nats per token of a run's validation text; None where it has none."""
    evaluations = having(having(metrics, "val_loss"), "val_bits_per_byte")
    ratios = (m["val_bits_per_byte"] / m["val_loss"] for m in evaluations if m["val_loss"] > 0)
    return next((ratio for ratio in ratios if ratio > 0), None)


def _scaled(metrics: Metrics, factor: float) -> Metrics:
    """The training lines with their losses times a factor."""
    return [line | {"loss": line["loss"] * factor} for line in having(metrics, "loss")]


def _draw_validation(
    axes: "Axes", curves: Mapping[str, Metrics], scale: float, unit: str, in_bits: bool
) -> None:
    evaluations = [line for metrics in curves.values() for line in having(metrics, "val_loss")]
    name, title = "val_loss", f"validation loss ({unit})"
    if in_bits:
        name, title = "val_bits_per_byte", "validation loss (bits per byte)"
    axes.set_title(title)
    _draw(axes, curves, name, scale, label=_label("all together"))
    parts = sorted({key for m in evaluations for key in m if key.startswith(f"{name}/")})
    if len(curves) == 1 and parts:
        for i, part in enumerate(parts, start=1):
            label = _label(part.removeprefix(f"{name}/"))
            _draw(axes, curves, part, scale, color=f"C{i}", linewidth=0.8, label=label)
        axes.legend(fontsize="small")
