"""report.html: what the search for a cascade found, on one page that opens offline, is mailed, and needs no server."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from clcnet.cascade.curve import oracle, sweep
from clcnet.cascade.rule import CLCNET, Surest, known
from clcnet.cascade.rules import cross_fitted, steps_of
from clcnet.cascade.search import Cascades, Found
from clcnet.cascade.verdict import Single, Units, Verdict
from clcnet.confidence import SIMPLE_CONFIDENCES
from clcnet.data.images import ImageSet
from clcnet.data.outputs import Outputs, Record
from clcnet.metrics import Bools, Floats, Ints, format_flops
from clcnet.report import html, plots

MOST_CASCADES = 500  # on the slider
COLUMNS = {
    "models": "Models",
    "accuracy": "Accuracy",
    "cost": "Cost an image",
    "deferred": "Go on to the second model",
    "time": "Time an image",
    "money": "Money a month",
    "thresholds": "Thresholds",
}
_SVG = plots.STYLE | {"svg.fonttype": "none", "font.size": 11}  # text stays text


def write_page(
    path: Path,
    outputs: Sequence[Outputs],
    folds: Ints,
    cascades: Cascades,
    verdict: Verdict,
    units: Units,
    singles: Sequence[Single],
    texts: dict[str, str],
    price_per_hour: float | None = None,
    images_per_month: float | None = None,
    images: ImageSet | None = None,
    fitted_elsewhere: bool = False,
) -> Figure:
    """Write the page; returns its picture of accuracy and cost.

    Args:
        path: of the page.
        outputs: of all models over the same N images.
        folds: (N,).
        cascades: what was found; the first goal's is the one that is recommended.
        verdict: on that.
        units: of the costs.
        singles: the models alone.
        texts: `verdict`, in words, and `give_up`, a Markdown table.
        price_per_hour, images_per_month: what turns time into money.
        images: where the images lie; without them there are no thumbnails.
        fitted_elsewhere: whether the recommended one was fitted on other images than these.
    """
    found = cascades.goals[0]
    names = [single.name for single in singles if not single.corrected]
    shown = [*cascades.front, *([] if verdict.single and cascades.front else [found])]
    shown = sorted(shown, key=lambda each: float(each.cross_fitted.costs[0]))[:MOST_CASCADES]
    rows = [_row(each, names, units, price_per_hour, images_per_month) for each in shown]
    start = 0 if verdict.single else next(place for place, each in enumerate(shown) if each is found)
    with matplotlib.rc_context(_SVG):
        figure = plots.plot_accuracy_and_cost(
            [_point(each) for each in shown],
            [(single.name, single.cost, single.scored.accuracy) for single in singles if not single.corrected],
            _lines(outputs, cascades),
            _recommended(verdict, found),
            ("multiply-adds" if units.names[0] == "FLOPs" else units.names[0]) + " an image",
            len(folds),
        )
        curve, places = _inline(figure), plots.places_of(figure, [_point(each)[:2] for each in shown])
        chain = [outputs[model] for model in found.choice.chain]
        steps = steps_of(found.rule, chain) if fitted_elsewhere else cross_fitted(found.rule, chain, folds)
        last = found.choice.decide(steps.confidence)
        everyone = np.arange(len(folds))
        confidence, correct = steps.confidence[last, everyone], steps.correct[last, everyone]
        sure = plots.plot_reliability({found.rule.confidence: confidence}, correct, "the cascade's answers")
        reliability = _inline(sure) if 0 <= confidence.min() and confidence.max() <= 1 else ""
    first, best = known(chain[0].correct, chain[0]), verdict.rival.scored.correct
    gained, lost = correct & ~best, ~correct & best
    named = np.array(outputs[0].record.class_names or range(outputs[0].num_classes))[outputs[0].targets]
    figures = {"deferred": (last > 0).astype(float), "gained": gained, "lost": lost, "right": correct.astype(float)}
    classes = [
        (row["name"], row["images"], f"{row['deferred']:.0f}%", row["gained"], row["lost"], f"{row['right']:.1f}%")
        for row in html.class_rows(named, **figures)
    ]
    kinds = (
        (f"Rescued: {names[found.choice.chain[0]]} is wrong, the cascade is right", ~first & correct & (last > 0)),
        (f"Lost: {verdict.rival.name} is right, the cascade is wrong", lost),
    )
    columns = [(name, title) for name, title in COLUMNS.items() if name in rows[0]]
    html.write_page(
        path,
        "page.html",
        verdict=texts["verdict"],
        give_up=[line.strip("| ").split(" | ") for line in texts["give_up"].splitlines() if "--" not in line],
        rows=rows,
        columns=columns,
        cells=[[row[name] for name, _ in columns] for row in rows],
        start=start,
        recommended=not verdict.single,
        places=places,
        curve=curve,
        reliability=reliability,
        classes=classes[: html.MOST_CLASSES],
        left_out=len(classes[html.MOST_CLASSES :]),
        rival=verdict.rival.name,
        thumbnails=[(title, _thumbnails(outputs[0], images, of)) for title, of in kinds] if images else [],
        num_images=len(folds),
        num_folds=len(np.unique(folds)),
        models=[_model_row(name, each.record) for name, each in zip(names, outputs, strict=True)],
    )
    return figure


def _point(found: Found) -> tuple[float, float, float, float]:
    fitted = found.cross_fitted
    return float(fitted.costs[0]), fitted.accuracy, *fitted.accuracy_interval


def _row(
    found: Found, names: Sequence[str], units: Units, price: float | None, images_per_month: float | None
) -> dict[str, str]:
    """What the slider shows of a cascade."""
    fitted = found.cross_fitted
    low, high = fitted.accuracy_interval
    row = {
        "models": " > ".join(names[model] for model in found.choice.chain),
        "thresholds": " ".join(f"{threshold:.4g}" for threshold in found.choice.thresholds) or "none",
        "accuracy": f"{fitted.accuracy:.2f}% [{low:.2f}, {high:.2f}]",
        "cost": units.format(float(fitted.costs[0])),
        "deferred": f"{100 * found.shares[1]:.1f}%" if len(found.shares) > 1 else "0%",
    }
    milliseconds = units.of(fitted.costs, "milliseconds")
    if milliseconds is not None:
        row["time"] = f"{milliseconds:.3g} ms"
        if price is not None and images_per_month is not None:
            row["money"] = f"{milliseconds * images_per_month / 3.6e6 * price:,.2f}"
    return row


def _recommended(verdict: Verdict, found: Found) -> tuple[float, float]:
    scored = found.cross_fitted if verdict.single is None else verdict.single.scored
    return float(scored.costs[0]), scored.accuracy


def _lines(outputs: Sequence[Outputs], cascades: Cascades) -> dict[str, tuple[Floats, Floats]]:
    """Cost and accuracy, at all thresholds, of the rules that the cascade is held against."""
    costs = np.array([float(scored.costs[0]) for scored in cascades.raw])
    order = np.argsort(costs, kind="stable")
    chain = [outputs[model] for model in order]
    rules = {"the paper's rule": Surest(CLCNET), **{name: Surest(name) for name in SIMPLE_CONFIDENCES}}
    steps = {name: steps_of(rule, chain) for name, rule in rules.items() if rule.applies_to(chain)}
    steps["oracle"] = oracle([known(each.correct, each) for each in chain], costs[order])
    lines = {}
    for name, each in steps.items():
        curve = sweep(each)
        kept = np.unique(np.linspace(0, len(curve) - 1, 200).astype(int))  # a page need not hold 50,000 points
        lines[name] = (curve.cost(costs[order])[kept], curve.accuracy[kept])
    return lines


def _inline(figure: Figure) -> str:
    """A figure as an SVG element, without what only a file of its own needs."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    tag, rest = text.split(">", 1)  # which holds its size, that the page decides on
    return re.sub(r' (width|height)="[^"]*"', "", tag) + ">" + rest


def _model_row(name: str, record: Record) -> list[str]:
    size = record.preprocessing.get("input_size") or ["", "", ""]
    versions = " ".join(f"{library} {version}" for library, version in record.versions.items())
    flops = format_flops(record.flops) if record.flops else ""
    return [name, flops, "x".join(map(str, size[1:])), record.weights[:12], record.device, versions]


def _thumbnails(outputs: Outputs, images: ImageSet, wanted: Bools) -> list[tuple[str, str]]:
    place_of = {name: place for place, name in enumerate(images.names)}
    places = [place_of.get(outputs.names[row]) for row in np.flatnonzero(wanted)]
    return html.thumbnails(images, np.array([place for place in places if place is not None], dtype=np.int64))
