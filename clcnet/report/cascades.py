"""What the search for a cascade came to: the verdict in words, cascades.csv, recommendation.json, and the policy."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clcnet.cascade.drift import Expected, quantiles
from clcnet.cascade.policy import Policy
from clcnet.cascade.rules import Fused, Surest
from clcnet.cascade.search import Found
from clcnet.cascade.selection import Goal
from clcnet.cascade.verdict import Scored, Single, Units, rival_of
from clcnet.data.images import ImageSet
from clcnet.data.outputs import Outputs
from clcnet.metrics import Ints
from clcnet.report import plots
from clcnet.report.page import write_page
from clcnet.report.searched import Searched, search
from clcnet.report.tables import format_interval, markdown, write_csv, write_text
from clcnet.report.wanted import Wanted

_HOURS = 3600 * 1000  # milliseconds


def _costs(costs: np.ndarray, units: Units, prefix: str = "") -> dict[str, float | None]:
    """Costs (U,) by unit; the usual ones are there, empty, where they were not counted."""
    return {prefix + name: units.of(costs, name) for name in dict.fromkeys(("FLOPs", "milliseconds", *units.names))}


def _figures(searched: Searched, found: Found) -> dict[str, Any]:
    """What cascades.csv and recommendation.json both say of a cascade."""
    fitted, units = found.cross_fitted, searched.units
    return {
        "models": [searched.names[model] for model in found.choice.chain],
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


def cascades_frame(searched: Searched) -> pd.DataFrame:
    """The Pareto front, a cascade a row, cheapest first."""
    records = []
    for found in searched.cascades.front:
        record = _figures(searched, found) | {"models": searched.chain_of(found)}
        del record["shares"]
        record["thresholds"] = " ".join(f"{threshold:.17g}" for threshold in record["thresholds"])
        for name, corrected in (("saving", False), ("saving_corrected", True)):
            group = [single for single in searched.singles if single.corrected == corrected]
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


def recommendation_of(searched: Searched, goal: Goal) -> dict[str, Any]:
    """What recommendation.json holds."""
    found, verdict, units = searched.found, searched.verdict, searched.units
    figures = _figures(searched, found)
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
                "model": searched.names[single.model],
                "corrected": single.corrected,
                "accuracy": single.scored.accuracy,
                "accuracy_interval": single.scored.accuracy_interval,
                **_costs(single.scored.costs, units),
            }
            for single in searched.singles
        ],
    }


def policy_of(searched: Searched) -> Policy:
    """What the verdict says to use, ready to run: the cascade, or the one model."""
    found, single, promised = searched.found, searched.verdict.single, searched.promised
    scored = found.cross_fitted if single is None else single.scored
    expected = Expected(
        num_images=len(scored.correct),
        accuracy=scored.accuracy,
        accuracy_interval=scored.accuracy_interval,
        shares=found.shares.tolist() if single is None else [1.0],
        flops=searched.units.of(scored.costs, "FLOPs") or math.nan,
        milliseconds=searched.units.of(scored.costs, "milliseconds"),
        quantiles=found.quantiles,
    )
    if single is None:
        models = [searched.outputs[model].record for model in found.choice.chain]
        kept = (promised.certificate, promised.unsure_below) if promised else ()
        return Policy(models, found.rule, list(found.choice.thresholds), expected, *kept)
    alone = searched.outputs[single.model]
    rule = Fused(found.rule.confidence).fit([alone]) if single.corrected else Surest("max softmax")
    expected = dataclasses.replace(expected, quantiles=quantiles([rule.step([alone]).confidence]))
    return Policy([alone.record], rule, [], expected)


def describe(searched: Searched) -> str:
    """For who pays the bill, a line each: what to use and how right it is, what it costs, how sure that is."""
    verdict, units, fitted = searched.verdict, searched.units, searched.found.cross_fitted
    rival = verdict.rival
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
    shares = [f"{_share(fitted, rival, unit)} of its {noun}" for unit, noun in enumerate(units.nouns)]
    return (
        f"Verdict: use the cascade {searched.chain}: it is right on {fitted.accuracy:.2f}% of the images"
        f"{format_interval(fitted.accuracy_interval)}, {alone}.\nIt takes {' and '.join(shares)}: "
        f"{units.format(float(fitted.costs[0]))} an image in place of {units.format(rival.cost)}, "
        f"{verdict.saving:.2f} times less.\n{sure}"
    )


def _share(fitted: Scored, single: Single, unit: int, digits: int = 0) -> str:
    saving, (low, high) = fitted.saving(float(single.scored.costs[unit]), unit)
    return f"{100 / saving:.{digits}f}% [{100 / high:.{digits}f}, {100 / low:.{digits}f}]"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def give_up_cells(
    searched: Searched, price_per_hour: float | None, images_per_month: float | None
) -> tuple[list[str], list[list[str]]]:
    """What giving up 0, 0.5, 1 and 2 points of the best single model's accuracy saves, cross-fitted: header, rows."""
    units, best = searched.units, searched.best
    priced = price_per_hour and images_per_month and "milliseconds" in units.names
    header = ["Give up", "Accuracy", "Cost", *(f"Of {best.name}'s {noun}" for noun in units.nouns)]
    header += ["Hours a month", "Money a month"] if priced else []
    rows = []
    for each in searched.cascades.goals[1:]:
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
    return header, rows


def search_and_report(
    outputs: list[Outputs], folds: Ints, wanted: Wanted, folder: Path, policy: Path, images: ImageSet | None = None
) -> dict[str, Any]:
    """Search, write cascades.csv, recommendation.json, the page and the policy, and print the verdict.

    Args:
        outputs, folds, wanted: as `search` takes them.
        folder: of the tables.
        policy: the file to write.
        images: where the images lie, for the page; None where that is not known.

    Returns:
        The recommendation, the frame of the front, and the policy's file.
    """
    searched = search(outputs, folds, wanted)
    frame, ready = cascades_frame(searched), policy_of(searched)
    recommendation = recommendation_of(searched, wanted.goal)
    if searched.promised:
        recommendation["certificate"] = ready.certificate and dataclasses.asdict(ready.certificate)
        recommendation["unsure_below"] = ready.unsure_below
        certifying = len(searched.folds)
        print(f"{searched.num_choosing:,} images chose and fitted, {certifying:,} others certify how far that may go")
    write_csv(frame, folder / "cascades.csv")
    write_text(json.dumps(recommendation, indent=1), folder / "recommendation.json")
    ready.save(policy)
    verdict, money = describe(searched), (wanted.price_per_hour, wanted.images_per_month)
    give_up = give_up_cells(searched, *money)
    if ready.certificate:
        verdict += f"\n{ready.certificate.describe()}"
    print(f"{verdict}\n\n{markdown(*give_up)}", flush=True)
    page = folder / "report.html"
    plots.save(write_page(page, searched, verdict, give_up, *money, images), folder, "accuracy-cost")
    for reason in searched.cascades.dropped.values():
        print(f"left out: {reason}")
    print(f"\n{len(frame)} cascades in {folder / 'cascades.csv'}; what is recommended runs from {policy}")
    print(f"all of it on one page: {page}")
    return {"recommendation": recommendation, "front": frame, "policy": policy}
