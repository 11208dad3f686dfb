"""report.html: what the search for a cascade found, on one page that opens offline, is mailed, and needs no server."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from clcnet.cascade.curve import oracle, sweep
from clcnet.cascade.rules import Surest, cross_fitted, known, steps_of
from clcnet.cascade.search import Found
from clcnet.confidence import CLCNET, SIMPLE_CONFIDENCES
from clcnet.data.images import ImageSet
from clcnet.data.outputs import Outputs
from clcnet.metrics import Bools, Floats, format_flops
from clcnet.report import html, plots
from clcnet.report.search_cli import SearchResult
from clcnet.report.tables import format_interval

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
    result: SearchResult,
    verdict: str,
    give_up: tuple[list[str], list[list[str]]],
    images: ImageSet | None = None,
) -> Figure:
    """Write the page; returns its picture of accuracy and cost.

    Args:
        path: of the page.
        result: what the search came to.
        verdict: in words.
        give_up: what giving up accuracy saves, header and rows.
        images: where the images lie; without them there are no thumbnails.
    """
    front, found, folds = result.cascades.front, result.found, result.folds
    single, rival = result.verdict.single, result.verdict.rival
    shown = [*front, *([] if single and front else [found])]
    shown = sorted(shown, key=lambda each: float(each.cross_fitted.costs[0]))[:MOST_CASCADES]
    rows = [_row(result, each) for each in shown]
    start = 0 if single else next(place for place, each in enumerate(shown) if each is found)
    recommended, unit = found.cross_fitted if single is None else single.scored, result.units.names[0]
    with matplotlib.rc_context(_SVG):
        figure = plots.plot_accuracy_and_cost(
            [_point(each) for each in shown],
            [(each.name, each.cost, each.scored.accuracy) for each in result.raw],
            _lines(result),
            (float(recommended.costs[0]), recommended.accuracy),
            ("multiply-adds" if unit == "FLOPs" else unit) + " an image",
            len(folds),
        )
        curve, places = _inline(figure), plots.places_of(figure, [_point(each)[:2] for each in shown])
        chain = [result.outputs[model] for model in found.choice.chain]
        steps = steps_of(found.rule, chain) if result.request.promise else cross_fitted(found.rule, chain, folds)
        last = found.choice.decide(steps.confidence)
        everyone = np.arange(len(folds))
        confidence, correct = steps.confidence[last, everyone], steps.correct[last, everyone]
        sure = plots.plot_reliability({found.rule.confidence: confidence}, correct, "the cascade's answers")
        reliability = _inline(sure) if 0 <= confidence.min() and confidence.max() <= 1 else ""
    outputs, first, best = result.outputs[0], known(chain[0].correct, chain[0]), rival.scored.correct
    lost = ~correct & best
    named = np.array(outputs.record.class_names or range(outputs.num_classes))[outputs.targets]
    shares = {"deferred": (last > 0).astype(float), "right": correct.astype(float)}
    classes = [
        (row["name"], row["images"], f"{row['deferred']:.0f}%", row["gained"], row["lost"], f"{row['right']:.1f}%")
        for row in html.class_rows(named, gained=correct & ~best, lost=lost, **shares)
    ]
    kinds = {
        f"Rescued: {result.names[found.choice.chain[0]]} is wrong, the cascade is right": ~first & correct & (last > 0),
        f"Lost: {rival.name} is right, the cascade is wrong": lost,
    }
    columns = [(name, title) for name, title in COLUMNS.items() if name in rows[0]]
    html.write_page(
        path,
        "search.html",
        verdict=verdict,
        give_up=[give_up[0], *give_up[1]],
        rows=rows,
        columns=columns,
        cells=[[row[name] for name, _ in columns] for row in rows],
        start=start,
        recommended=single is None,
        places=places,
        curve=curve,
        reliability=reliability,
        classes=classes,
        rival=rival.name,
        thumbnails=[(title, _thumbnails(outputs, images, of)) for title, of in kinds.items()] if images else [],
        num_images=len(folds),
        num_folds=len(np.unique(folds)),
        models=[_model_row(*each) for each in zip(result.names, result.outputs, strict=True)],
    )
    return figure


def _point(found: Found) -> tuple[float, float, float, float]:
    fitted = found.cross_fitted
    return float(fitted.costs[0]), fitted.accuracy, *fitted.accuracy_interval


def _row(result: SearchResult, found: Found) -> dict[str, str]:
    """What the slider shows of a cascade."""
    fitted, units = found.cross_fitted, result.units
    row = {
        "models": result.chain_of(found),
        "thresholds": " ".join(f"{threshold:.4g}" for threshold in found.choice.thresholds) or "none",
        "accuracy": f"{fitted.accuracy:.2f}%{format_interval(fitted.accuracy_interval)}",
        "cost": units.format(float(fitted.costs[0])),
        "deferred": f"{100 * found.shares[1]:.1f}%" if len(found.shares) > 1 else "0%",
    }
    milliseconds = units.of(fitted.costs, "milliseconds")
    if milliseconds is not None:
        row["time"] = f"{milliseconds:.3g} ms"
    month = result.a_month(fitted)
    if month:
        row["money"] = f"{month[1]:,.2f}"
    return row


def _lines(result: SearchResult) -> dict[str, tuple[Floats, Floats]]:
    """Cost and accuracy, at all thresholds, of the rules that the cascade is held against."""
    costs = np.array([single.cost for single in result.raw])
    order = np.argsort(costs, kind="stable")
    chain = [result.outputs[model] for model in order]
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


def _model_row(name: str, outputs: Outputs) -> list[str]:
    record = outputs.record
    size = record.preprocessing.get("input_size") or ["", "", ""]
    versions = " ".join(f"{library} {version}" for library, version in record.versions.items())
    flops = format_flops(record.flops) if record.flops else ""
    return [name, flops, "x".join(map(str, size[1:])), record.weights[:12], record.device, versions]


def _thumbnails(outputs: Outputs, images: ImageSet, wanted: Bools) -> list[tuple[str, str]]:
    place_of = {name: place for place, name in enumerate(images.names)}
    places = [place_of.get(outputs.names[row]) for row in np.flatnonzero(wanted)]
    return html.thumbnails(images, np.array([place for place in places if place is not None], dtype=np.int64))
