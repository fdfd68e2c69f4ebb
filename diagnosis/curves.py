"""A run's figures over its tokens: read metrics.jsonl, draw the curves of one or several runs."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNITS = {1e9: "billion ", 1e6: "million ", 1e3: "thousand ", 1: ""}
# Runs whose bits per byte stand in another ratio to their nats per token than this share apart
# differ in tokenizer or text, so that their nats cannot be compared.
SAME_RATIO = 1e-3
# A peak so many times above the 95th percentile (and the first loss) would flatten all the rest.
PEAK = 1.5

Metrics = list[dict[str, Any]]


def read_metrics(path: Path) -> Metrics:
    """The lines of a metrics.jsonl, without a last one that was cut off when its run was killed.

    Raises:
        OSError: if the file cannot be read.
        ValueError: names the line, as file:line, that is not a JSON object.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    metrics = []
    for number, line in enumerate([*lines, rest], start=1):
        is_rest = number > len(lines)  # only a killed run leaves a line without its end
        if is_rest and not line:
            break
        try:
            figures = json.loads(line.decode("utf-8"))
        except ValueError:
            figures = None
        if isinstance(figures, dict):
            metrics.append(figures)
        elif not is_rest:
            raise ValueError(f"{path}:{number}: not a JSON object")
    return metrics


def draw_curves(runs: Mapping[str, Metrics], path: Path) -> None:
    """Draw loss, validation loss, learning rate and gradient norm over tokens into one PNG.

    The validation panel is in nats per token, with bits per byte on its right. Where the runs
    differ in tokenizer or validation text it is in bits per byte alone. A single run's validation
    sets are drawn one by one as well.

    Args:
        runs: metrics by the name that the legend shows.
        path: the PNG file; what is there is replaced.

    Raises:
        ImportError: without matplotlib.
        OSError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    curves = {
        name: [m for m in metrics if has_number(m, "tokens")] for name, metrics in runs.items()
    }
    most = max((m["tokens"] for metrics in curves.values() for m in metrics), default=1)
    scale = next(size for size in UNITS if most >= size or size == 1)

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    loss, validation, lr, grad_norm = panels.flat

    pairs = any(has_number(m, "margin") for metrics in curves.values() for m in metrics)
    unit = "per pair" if pairs else "nats per token"
    _draw(loss, curves, "loss", scale)
    loss.set_title(f"training loss ({unit})")
    _cut_peaks(loss, curves)
    _draw_validation(validation, curves, scale, unit)
    _draw(lr, curves, "lr", scale)
    lr.set_title("learning rate")
    lr.set_ylim(bottom=0)
    lr.ticklabel_format(axis="y", scilimits=(-2, 2))
    _draw(grad_norm, curves, "grad_norm", scale)
    grad_norm.set_title("gradient norm")
    norms = [norm for line in grad_norm.lines for norm in line.get_ydata() if norm > 0]
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
        handles = [loss.plot([], [], **_style(i))[0] for i in range(len(runs))]
        figure.legend(
            handles, map(_label, runs), loc="outside lower center", ncols=min(4, len(runs))
        )
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))


def has_number(figures: dict[str, Any], name: str) -> bool:
    """Whether a line holds a figure of that name; one that was not finite is null there."""
    value = figures.get(name)
    return isinstance(value, (int, float)) and math.isfinite(value)


def _style(index: int) -> dict[str, str]:
    """Ten colours, then the same ones dashed."""
    return {"color": f"C{index % 10}", "linestyle": ("-", "--", ":", "-.")[index // 10 % 4]}


def _label(name: str) -> str:
    """As text: an underscore in front would hide it, and dollar signs would make it a formula."""
    return " " + name.replace("$", r"\$")


def _draw(
    axes: "Axes", curves: Mapping[str, Metrics], name: str, scale: float, **look: Any
) -> None:
    for i, metrics in enumerate(curves.values()):
        points = [(m["tokens"] / scale, m[name]) for m in metrics if has_number(m, name)]
        if points:
            marker = "." if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), **({"marker": marker} | _style(i) | look))


def _cut_peaks(axes: "Axes", curves: Mapping[str, Metrics]) -> None:
    """Leave the tops of rare high peaks outside the panel, and say so in its title."""
    losses = [[m["loss"] for m in metrics if has_number(m, "loss")] for metrics in curves.values()]
    every = sorted(value for run in losses for value in run)
    if not every:
        return
    usual = max(every[int(0.95 * (len(every) - 1))], *(run[0] for run in losses if run))
    if every[-1] > PEAK * usual:
        low, top = every[0], PEAK * usual
        axes.set_ylim(low - 0.05 * (top - low), top)
        axes.set_title(f"{axes.get_title()}, peaks up to {every[-1]:.4g}")


def _draw_validation(axes: "Axes", curves: Mapping[str, Metrics], scale: float, unit: str) -> None:
    evaluations = [m for metrics in curves.values() for m in metrics if has_number(m, "val_loss")]
    ratios = [
        m["val_bits_per_byte"] / m["val_loss"]
        for m in evaluations
        if has_number(m, "val_bits_per_byte") and m["val_bits_per_byte"] > 0
    ]
    if ratios and max(ratios) - min(ratios) > SAME_RATIO * max(ratios):
        name, title = "val_bits_per_byte", "validation loss (bits per byte)"
    else:
        name, title = "val_loss", f"validation loss ({unit})"
    axes.set_title(title)
    _draw(axes, curves, name, scale, label=_label("all together"))
    if len(curves) == 1:
        parts = sorted({key for m in evaluations for key in m if key.startswith(f"{name}/")})
        for i, part in enumerate(parts, start=1):
            look = _style(i) | {"linewidth": 0.8, "markersize": 3}
            look["label"] = _label(part.removeprefix(f"{name}/"))
            _draw(axes, curves, part, scale, **look)
        if parts:
            axes.legend(fontsize="small")
    if name == "val_loss" and ratios:
        ratio = ratios[0]
        right = axes.secondary_yaxis("right", functions=(lambda y: y * ratio, lambda y: y / ratio))
        together = len(axes.lines) > len(curves)
        right.set_ylabel("bits per byte" + (", all together" if together else ""))
