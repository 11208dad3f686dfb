"""What the search for a cascade came to: the verdict in words, cascades.csv, recommendation.json, and the policy."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clcnet.cascade.drift import Expected, quantiles
from clcnet.cascade.fused import Fused, folds_of_classes
from clcnet.cascade.policy import Policy
from clcnet.cascade.promises import alone_on, choosing_images, on_others, promised_by
from clcnet.cascade.rule import Surest
from clcnet.cascade.search import Cascades, Found, find_cascades
from clcnet.cascade.selection import Goal
from clcnet.cascade.verdict import Scored, Single, Units, Verdict, judge, rival_of
from clcnet.data.images import ImageSet
from clcnet.data.outputs import Outputs
from clcnet.report import plots
from clcnet.report.page import write_page
from clcnet.report.paper_table import distinct_names
from clcnet.report.tables import format_interval, markdown, write_csv, write_text
from clcnet.report.wanted import CostFile, Wanted

GIVE_UP = (0.0, 0.5, 1.0, 2.0)  # points of accuracy in the table of what they save
_HOURS = 3600 * 1000  # milliseconds
_UNITS = {"FLOPs": "FLOPs", "time": "milliseconds"}  # by what is to be saved


def _costs(costs: np.ndarray, units: Units, prefix: str = "") -> dict[str, float | None]:
    """Costs (U,) by unit; the usual ones are there, empty, where they were not counted."""
    return {prefix + name: units.of(costs, name) for name in dict.fromkeys(("FLOPs", "milliseconds", *units.names))}


def _figures(found: Found, names: Sequence[str], units: Units) -> dict[str, Any]:
    """What cascades.csv and recommendation.json both say of a cascade."""
    fitted = found.cross_fitted
    return {
        "models": [names[model] for model in found.choice.chain],
        "rule": found.rule.name,
        "confidence": found.rule.confidence,
        "thresholds": list(found.choice.thresholds),
        "accuracy": found.choice.accuracy,
        **_costs(found.costs, units),
        "shares": found.shares.tolist(),
        "cross_fitted_accuracy": fitted.accuracy,
        "cross_fitted_accuracy_interval": fitted.accuracy_interval,
        **_costs(fitted.costs, units, "cross_fitted_"),
    }


def cascades_frame(cascades: Cascades, names: Sequence[str], singles: Sequence[Single], units: Units) -> pd.DataFrame:
    """The Pareto front, a cascade a row, cheapest first."""
    records = []
    for found in cascades.front:
        record = _figures(found, names, units)
        del record["shares"]
        record["models"] = " > ".join(record["models"])
        record["thresholds"] = " ".join(f"{threshold:.17g}" for threshold in record["thresholds"])
        for name, corrected in (("saving", False), ("saving_corrected", True)):
            group = [single for single in singles if single.corrected == corrected]
            rival = rival_of(group, found.cross_fitted.accuracy)
            record[name], record[f"{name}_interval"] = found.cross_fitted.saving(rival.cost)
        records.append(_without_intervals(record))
    return pd.DataFrame(records)


def _without_intervals(record: dict[str, Any]) -> dict[str, Any]:
    """The ends of intervals as figures of their own, in their places."""
    columns: dict[str, Any] = {}
    for name, value in record.items():
        if name.endswith("_interval"):
            columns |= {name.replace("_interval", end): one for end, one in zip(("_low", "_high"), value, strict=True)}
        else:
            columns[name] = value
    return columns


def recommendation_of(
    verdict: Verdict, found: Found, goal: Goal, names: Sequence[str], singles: Sequence[Single], units: Units
) -> dict[str, Any]:
    """What recommendation.json holds."""
    figures = _figures(found, names, units)
    figures["thresholds"] = [each if math.isfinite(each) else str(each) for each in found.choice.thresholds]
    unit = units.names[0] if goal.kind == "flops" else "percent"
    return {
        "goal": {"kind": goal.kind, "target": found.target, "unit": unit},
        "choice": verdict.choice,
        "reason": verdict.reason,
        **figures,
        "saving": verdict.saving,
        "saving_interval": verdict.saving_interval,
        "saving_against": verdict.rival.name,
        "rivals": [
            {
                "model": names[single.model],
                "corrected": single.corrected,
                "accuracy": single.scored.accuracy,
                "accuracy_interval": single.scored.accuracy_interval,
                **_costs(single.scored.costs, units),
            }
            for single in singles
        ],
    }


def policy_of(verdict: Verdict, found: Found, outputs: Sequence[Outputs], units: Units) -> Policy:
    """What the verdict says to use, ready to run: the cascade, or the one model."""
    single = verdict.single
    scored = found.cross_fitted if single is None else single.scored
    expected = Expected(
        num_images=len(scored.correct),
        accuracy=scored.accuracy,
        accuracy_interval=scored.accuracy_interval,
        shares=found.shares.tolist() if single is None else [1.0],
        flops=units.of(scored.costs, "FLOPs") or math.nan,
        milliseconds=units.of(scored.costs, "milliseconds"),
        quantiles=found.quantiles,
    )
    if single is None:
        models = [outputs[model].record for model in found.choice.chain]
        return Policy(models, found.rule, list(found.choice.thresholds), expected)
    alone = outputs[single.model]
    rule = Fused(found.rule.confidence).fit([alone]) if single.corrected else Surest("max softmax")
    expected = dataclasses.replace(expected, quantiles=quantiles([rule.step([alone]).confidence]))
    return Policy([alone.record], rule, [], expected)


def describe(verdict: Verdict, found: Found, names: Sequence[str], units: Units) -> str:
    """For who pays the bill, a line each: what to use and how right it is, what it costs, how sure that is."""
    fitted, rival = found.cross_fitted, verdict.rival
    alone = f"{rival.name} alone is right on {rival.scored.accuracy:.2f}%"
    sure = (
        f"Measured on {len(fitted.correct):,} images, each judged by what was chosen and fitted without it; brackets "
        "are 95% intervals."
    )
    if rival.corrected:
        sure += " Corrected: with a temperature and an offset for each class, which the policy holds."
    if verdict.single is not None:
        cost = units.format(rival.cost)
        return f"Verdict: use {verdict.choice} alone: {alone}, at {cost} an image.\n{_sentence(verdict.reason)}\n{sure}"
    chain = " > ".join(names[model] for model in found.choice.chain)
    shares = [f"{_share(fitted, rival, unit)} of its {noun}" for unit, noun in enumerate(units.nouns)]
    return (
        f"Verdict: use the cascade {chain}: it is right on {fitted.accuracy:.2f}% of the images"
        f"{format_interval(fitted.accuracy_interval)}, {alone}.\nIt takes {' and '.join(shares)}: "
        f"{units.format(float(fitted.costs[0]))} an image in place of {units.format(rival.cost)}, "
        f"{verdict.saving:.2f} times less.\n{sure}"
    )


def _share(fitted: Scored, single: Single, unit: int, digits: int = 0) -> str:
    saving, (low, high) = fitted.saving(float(single.scored.costs[unit]), unit)
    return f"{100 / saving:.{digits}f}% [{100 / high:.{digits}f}, {100 / low:.{digits}f}]"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def give_up_markdown(
    found: Sequence[Found], best: Single, units: Units, price_per_hour: float | None, images_per_month: float | None
) -> str:
    """What giving up 0, 0.5, 1 and 2 points of the best single model's accuracy saves, cross-fitted."""
    priced = price_per_hour and images_per_month and "milliseconds" in units.names
    header = ["Give up", "Accuracy", "Cost", *(f"Of {best.name}'s {noun}" for noun in units.nouns)]
    header += ["Hours a month", "Money a month"] if priced else []
    rows = []
    for each in found:
        fitted = each.cross_fitted
        cells = [
            f"{best.scored.accuracy - each.target:.1f} points",
            f"{fitted.accuracy:.2f}%{format_interval(fitted.accuracy_interval)}",
            units.format(float(fitted.costs[0])),
            *(_share(fitted, best, unit, 1) for unit in range(len(units.names))),
        ]
        if price_per_hour and images_per_month and priced:
            times = (units.of(scored.costs, "milliseconds") or 0 for scored in (fitted, best.scored))
            hours, whole = (milliseconds * images_per_month / _HOURS for milliseconds in times)
            cells += [f"{hours:.1f} of {whole:.1f}", f"{hours * price_per_hour:.2f} of {whole * price_per_hour:.2f}"]
        rows.append(cells)
    return markdown(header, rows)


def search_and_report(
    outputs: Sequence[Outputs],
    folds: np.ndarray,
    wanted: Wanted,
    folder: Path,
    policy: Path,
    images: ImageSet | None = None,
) -> dict[str, Any]:
    """Search, write cascades.csv, recommendation.json, the page and the policy, and print the verdict.

    Args:
        outputs: of two models or more over the same images, with classes and targets.
        folds: (N,).
        wanted: what is asked for.
        folder: of the tables.
        policy: the file to write.
        images: where the images lie, for the page; None where that is not known.

    Returns:
        The recommendation, the frame of the front, and the policy's file.
    """
    models = [out.record.model for out in outputs]
    names = distinct_names(models)
    table = {"FLOPs": [out.record.flops for out in outputs]}
    if wanted.milliseconds is not None:
        table["milliseconds"] = list(wanted.milliseconds)
    if isinstance(wanted.cost, CostFile):
        saved = wanted.cost.unit
        table[saved] = [*wanted.cost.of(models, names)]
    else:
        saved = _UNITS[wanted.cost]
    if saved not in table:
        raise ValueError("what the models take in time is not known; run them (step 4 with their names) to measure it")
    units = Units((saved, *(name for name in table if name != saved)))
    promised, held = None, list[Outputs]()
    if wanted.promise:
        chosen = choosing_images(folds)
        outputs, held = ([out.subset(places) for out in outputs] for places in (chosen, ~chosen))
        folds = folds_of_classes(np.asarray(outputs[0].targets))
    best = max(out.accuracy for out in outputs)
    goals = [wanted.goal, *(Goal("accuracy", best - points) for points in GIVE_UP)]
    costs = np.array([table[name] for name in units.names], dtype=np.float64)
    cascades = find_cascades(
        outputs, folds, goals, costs, wanted.max_stages, confidence=wanted.confidence, progress=True
    )
    singles = cascades.singles(names)
    rival = max((single for single in singles if not single.corrected), key=lambda single: single.scored.accuracy)
    found = cascades.goals[0]
    if wanted.promise:
        path = [found] if wanted.promise.any_cascade_will_do else cascades.front[::-1] or [found]
        deep = int(np.argmax([scored.accuracy for scored in cascades.raw]))
        promised = promised_by(path, outputs, held, costs, deep, wanted.promise)
        raw, corrected = alone_on(held, outputs, costs, wanted.confidence)
        found = promised.found or found
        front, others = (on_others(group, held, costs) for group in (cascades.front, cascades.goals[1:]))
        cascades = Cascades([found, *others], front, raw, corrected, cascades.dropped)
        singles = cascades.singles(names)
        verdict = promised.judge(singles[deep], units, wanted.least_saving)
    else:
        verdict = judge(found.cross_fitted, wanted.goal, found.target, singles, units, wanted.least_saving)
    frame = cascades_frame(cascades, names, singles, units)
    recommendation = recommendation_of(verdict, found, wanted.goal, names, singles, units)
    ready = policy_of(verdict, found, outputs, units)
    if promised and verdict.single is None:
        ready = dataclasses.replace(ready, certificate=promised.certificate, unsure_below=promised.unsure_below)
    if promised:
        recommendation["certificate"] = ready.certificate and dataclasses.asdict(ready.certificate)
        recommendation["unsure_below"] = ready.unsure_below
        print(f"{len(folds):,} images chose and fitted, {len(held[0]):,} others certify how far that may go")
    write_csv(frame, folder / "cascades.csv")
    write_text(json.dumps(recommendation, indent=1), folder / "recommendation.json")
    ready.save(policy)
    texts = {"verdict": describe(verdict, found, names, units)}
    money = wanted.price_per_hour, wanted.images_per_month
    texts["give_up"] = give_up_markdown(cascades.goals[1:], rival, units, *money)
    if ready.certificate:
        texts["verdict"] += f"\n{ready.certificate.describe()}"
    print(texts["verdict"])
    print(f"\n{texts['give_up']}", flush=True)
    page = folder / "report.html"
    shown = held or outputs
    everyone = folds if promised is None else np.zeros(len(shown[0]), dtype=np.int64)
    figure = write_page(
        page, shown, everyone, cascades, verdict, units, singles, texts, *money, images, fitted_elsewhere=bool(promised)
    )
    plots.save(figure, folder, "accuracy-cost")
    for reason in cascades.dropped.values():
        print(f"left out: {reason}")
    print(f"\n{len(frame)} cascades in {folder / 'cascades.csv'}; what is recommended runs from {policy}")
    print(f"all of it on one page: {page}")
    return {"recommendation": recommendation, "front": frame, "policy": policy}
