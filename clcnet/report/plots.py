"""The pictures of an evaluation, as PNG and SVG: readable in print, in greyscale, and without colour vision.

Lines are told apart by their dashes and points by their shapes first, and by colour (Okabe and Ito's palette) second.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clcnet import metrics
from clcnet.cascade.comparison import Contender
from clcnet.cascade.selection import Reference
from clcnet.confidence import SIMPLE_CONFIDENCES
from clcnet.files import atomic_path
from clcnet.intervals import exact_interval
from clcnet.metrics import Bools, Floats, format_flops

# whatever the user's matplotlibrc or session says; and the same figures give the same SVG
STYLE: dict[Any, Any] = {
    name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")
} | {"svg.hashsalt": "clcnet"}
_own_style = matplotlib.rc_context(STYLE)

BLACK, BLUE, ORANGE, GREEN, PINK, GREY = "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#767676"
SKY = "#56B4E9"
_STYLES = {  # name of a rule or confidence -> colour, dashes, width; those of `_FREE` go round for all others
    "CLCNet": (BLACK, "-", 2.2),
    "max softmax": (BLUE, (0, (5, 1.5)), 1.4),
    "fused": (ORANGE, "-", 1.8),
    "the paper's rule": (ORANGE, (0, (4, 1, 1, 1)), 1.5),
    "oracle": (GREY, "-", 1.0),
}
LEAST_IN_BIN = 20  # images; the share of right ones among fewer says little
_FREE = (ORANGE, GREEN, PINK, SKY), ((0, (1, 1)), (0, (4, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (7, 1, 1, 1)))
_MARKERS = "os^Dv<>ph*"


@_own_style
def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.svg; existing files are replaced only by finished ones."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


@_own_style
def plot_accuracy_and_cost(
    front: Sequence[Sequence[float]],
    points: Sequence[tuple[str, float, float]],
    lines: Mapping[str, tuple[Floats, Floats]],
    recommended: tuple[float, float] | None,
    unit: str,
    num_images: int,
    name: str = "cascades found",
) -> Figure:
    """Accuracy against cost: of cascades, and of what they are held against.

    Args:
        front: cost, accuracy and its interval, of the cascades that a search found or of one at all thresholds.
        points: name, cost and accuracy of models alone.
        lines: of other rules, cost and accuracy at all thresholds.
        recommended: cost and accuracy of what is.
        unit: of the costs.
        num_images: that all of it was measured on.
        name: of the front.
    """
    figure, axes = _figure(6, 5.2, dpi=72)  # an SVG's own points, for `places_of`
    for line, (cost, accuracy) in lines.items():
        colour, dashes, width = _style(line, list(lines))
        axes.plot(cost, accuracy, color=colour, linestyle=dashes, linewidth=width, label=line)
    if len(front):
        cost, accuracy, low, high = np.array(front).T
        axes.plot(cost, accuracy, color=BLACK, linewidth=2.2, label=name)
        axes.fill_between(cost, low, high, color=BLACK, alpha=0.12, linewidth=0, label="95% interval")
    for marker, (model, *point) in zip(_MARKERS * len(points), points, strict=False):
        axes.plot(*point, marker, color="white", markeredgecolor=BLACK, markersize=8, zorder=5, label=model)
    if recommended:
        axes.plot(*recommended, "*", color=ORANGE, markeredgecolor=BLACK, markersize=17, zorder=6, label="recommended")
    axes.set(xlabel=unit, ylabel="top-1 accuracy (%)", title=f"What accuracy costs, on {num_images:,} images")
    shown = [accuracy for _, _, accuracy in points] + [accuracy for _, accuracy, *_ in front]
    room = 0.12 * max(max(shown) - min(shown), 1)
    best = max([accuracy.max() for _, accuracy in lines.values()], default=0)
    axes.set_ylim(min(shown) - room, min(max(best, max(shown)) + room, max(100.5, max(shown))))
    costs = [cost for _, cost, _ in points]
    if max(costs) > 20 * min(costs):
        axes.set_xscale("log")
    if unit.startswith("multiply"):
        axes.xaxis.set_major_formatter(lambda flops, _: format_flops(flops))
    figure.legend(fontsize=9, loc="outside lower center", ncols=3, frameon=False)
    return figure


@_own_style
def plot_contenders(
    contenders: Sequence[Contender], models: Sequence[str], references: Sequence[Reference] = ()
) -> Figure:
    """Accuracy against FLOPs of the first rule of a comparison, the one-line scores, fused answers and the oracle.

    The comparison's table has the other rules too.
    """
    first, *others = contenders
    shown = {one.name: one.curve for one in others if one.name in (*_STYLES, *SIMPLE_CONFIDENCES)}
    curve, steps = first.curve, first.steps
    low, high = exact_interval((curve.accuracy * curve.num_images / 100).round(), curve.num_images)
    points = [
        *zip(models, steps.flops.tolist(), steps.own_accuracy.tolist(), strict=True),
        *((reference.name, reference.flops, reference.accuracy) for reference in references),
    ]
    return plot_accuracy_and_cost(
        np.stack([curve.flops, curve.accuracy, low, high], axis=1).tolist(),
        points,
        {name: (curve.flops, curve.accuracy) for name, curve in shown.items()},
        None,
        "multiply-adds an image",
        len(steps),
        first.name,
    )


def places_of(figure: Figure, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where points of the first axes lie in the SVG that was drawn of a figure: from its left upper corner."""
    places = figure.axes[0].transData.transform(points)
    return [(round(x, 2), round(figure.bbox.height - y, 2)) for x, y in places]


def _figure(width: float, height: float, dpi: float | None = None) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    axes = figure.subplots()
    axes.grid(color="#dddddd", linewidth=0.6)
    return figure, axes


def _style(name: str, others: Sequence[str]) -> tuple[str, Any, float]:
    """Colour, dashes and width of one of several lines; a name without a style of its own gets the next free one."""
    if name in _STYLES:
        return _STYLES[name]
    number = [other for other in others if other not in _STYLES].index(name)
    colours, dashes = _FREE
    return colours[number % len(colours)], dashes[(number + number // len(colours)) % len(dashes)], 1.5


@_own_style
def plot_risk_coverage(scores: Mapping[str, Floats], correct: Bools, model: str) -> Figure:
    """Share of wrong answers against share of images answered, the surest first."""
    figure, axes = _figure(6.4, 4.8)
    for name, confidence in scores.items():
        colour, dashes, width = _style(name, list(scores))
        coverage, risk = metrics.risk_coverage_curve(confidence, correct)
        label = f"{name} (AURC {metrics.aurc(confidence, correct):.4f})"
        axes.plot(100 * coverage, 100 * risk, color=colour, linestyle=dashes, linewidth=width, label=label)
    axes.set(xlabel="images answered (%), surest first", ylabel="wrong answers among them (%)", title=model)
    axes.set_ylim(0, 100 * (1 - correct.mean()) * 1.3 + 0.5)  # the few surest images make a ragged start
    axes.legend(fontsize=8, loc="upper left")
    return figure


@_own_style
def plot_reliability(scores: Mapping[str, Floats], correct: Bools, model: str) -> Figure:
    """Accuracy against confidence in bins of equal width; on the diagonal a confidence means what it says."""
    figure, axes = _figure(5.6, 5.2)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    for marker, (name, confidence) in zip(_MARKERS, scores.items(), strict=False):
        if confidence.min() < 0 or confidence.max() > 1:  # a released CLCNet's score is no probability
            continue
        bins = metrics.calibration_bins(confidence, correct)
        counts, mean_confidence, accuracy = (each[bins[0] >= LEAST_IN_BIN] for each in bins)
        low, high = exact_interval((accuracy * counts).round(), counts)
        colour, dashes, width = _style(name, list(scores))
        axes.errorbar(
            mean_confidence,
            accuracy,
            yerr=np.stack([accuracy - low / 100, high / 100 - accuracy]),
            color=colour,
            linestyle=dashes,
            linewidth=width,
            elinewidth=0.7,
            capsize=2,
            marker=marker,
            markersize=5,
            markerfacecolor=colour if colour == BLACK else "white",
            label=f"{name} (ECE {metrics.calibration_error(confidence, correct):.3f})",
        )
    label = f"share of right answers, in bins of {LEAST_IN_BIN} images or more"
    axes.set(xlabel="confidence", ylabel=label, title=model, xlim=(0, 1), ylim=(0, 1))
    axes.set_aspect("equal")
    axes.legend(fontsize=8, loc="upper left")
    return figure


@_own_style
def plot_histogram(confidence: Floats, name: str, correct: Bools, model: str) -> Figure:
    """How the confidences of right and of wrong answers are spread, each as shares of its own number."""
    figure, axes = _figure(6.4, 4.2)
    edges = np.linspace(min(confidence.min(), 0), max(confidence.max(), 1), 41)
    for answers, kind, colour, dashes in (("right", correct, BLACK, "-"), ("wrong", ~correct, ORANGE, (0, (4, 1.5)))):
        share = 100 * np.histogram(confidence[kind], edges)[0] / max(kind.sum(), 1)
        axes.stairs(share, edges, color=colour, linestyle=dashes, linewidth=1.6, label=f"{answers} ({kind.sum():,})")
    axes.set(xlabel=f"confidence ({name})", ylabel="share of them (%)", title=model)
    figure.legend(fontsize=9, loc="outside lower center", ncols=2, frameon=False)
    return figure
