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
from clcnet.cascade.guarantee import Promised
from clcnet.cascade.policy import Policy
from clcnet.cascade.rules import Fused, Rule, Surest
from clcnet.cascade.search import Found
from clcnet.cascade.verdict import Scored, Single, Units, rival_of
from clcnet.data.images import ImageSet
from clcnet.data.outputs import Outputs
from clcnet.metrics import Ints
from clcnet.report import plots
from clcnet.report.search_cli import SearchRequest, SearchResult, search
from clcnet.report.search_page import write_page
from clcnet.report.tables import format_interval, markdown, write_csv, write_text


def search_and_report(
    outputs: list[Outputs],
    folds: Ints,
    request: SearchRequest,
    folder: Path,
    policy: Path,
    images: ImageSet | None = None,
    milliseconds: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Search, write cascades.csv, recommendation.json, the page and the policy, and print the verdict.

    Args:
        outputs, folds, request, milliseconds: as `search` takes them.
        folder: of the tables.
        policy: the file to write.
        images: where the images lie, for the page; None where that is not known.

    Returns:
        The recommendation, the frame of the front, and the policy's file.
    """
    result = search(outputs, folds, request, milliseconds)
    frame, ready = cascades_frame(result), policy_of(result)
    recommendation = recommendation_of(result, ready)
    if request.promise:
        certifying = len(result.folds)
        print(f"{result.num_choosing:,} images chose and fitted, {certifying:,} others certify how far that may go")
    write_csv(frame, folder / "cascades.csv")
    write_text(json.dumps(recommendation, indent=1), folder / "recommendation.json")
    ready.save(policy)
    verdict, give_up = describe(result), give_up_cells(result)
    print(f"{verdict}\n\n{markdown(*give_up)}", flush=True)
    page = folder / "report.html"
    plots.save(write_page(page, result, verdict, give_up, images), folder, "accuracy-cost")
    for reason in result.cascades.dropped.values():
        print(f"left out: {reason}")
    print(f"\n{len(frame)} cascades in {folder / 'cascades.csv'}; what is recommended runs from {policy}")
    print(f"all of it on one page: {page}")
    return {"recommendation": recommendation, "front": frame, "policy": policy}


def _costs(costs: np.ndarray, units: Units, prefix: str = "") -> dict[str, float | None]:
    """Costs (U,) by unit; the usual ones are there, empty, where they were not counted."""
    return {prefix + name: units.of(costs, name) for name in dict.fromkeys(("FLOPs", "milliseconds", *units.names))}


def _figures(result: SearchResult, found: Found) -> dict[str, Any]:
    """What cascades.csv and recommendation.json both say of a cascade."""
    fitted, units = found.cross_fitted, result.units
    return {
        "models": [result.names[model] for model in found.choice.chain],
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


def cascades_frame(result: SearchResult) -> pd.DataFrame:
    """The Pareto front, a cascade a row, cheapest first."""
    records = []
    for found in result.cascades.front:
        record = _figures(result, found) | {"models": result.chain_of(found)}
        del record["shares"]
        record["thresholds"] = " ".join(f"{threshold:.17g}" for threshold in record["thresholds"])
        for name, corrected in (("saving", False), ("saving_corrected", True)):
            group = [single for single in result.singles if single.corrected == corrected]
            rival = rival_of(group, found.cross_fitted.accuracy)
            record[name], record[f"{name}_interval"] = found.cross_fitted.saving(rival.cost)
        records.append(_without_intervals(record))
    return pd.DataFrame(records)


def _without_intervals(record: dict[str, Any]) -> dict[str, Any]:
    """The ends of intervals as figures of their own, in their places."""
    columns: dict[str, Any] = {}
    for name, value in record.items():
        figure = name.removesuffix("_interval")
        columns |= {name: value} if figure == name else {f"{figure}_low": value[0], f"{figure}_high": value[1]}
    return columns


def recommendation_of(result: SearchResult, ready: Policy) -> dict[str, Any]:
    """What recommendation.json holds."""
    found, verdict, units, goal = result.found, result.verdict, result.units, result.request.goal
    rivals = [
        {
            "model": result.names[single.model],
            "corrected": single.corrected,
            "accuracy": single.scored.accuracy,
            "accuracy_interval": single.scored.accuracy_interval,
            **_costs(single.scored.costs, units),
        }
        for single in result.singles
    ]
    unit = units.names[0] if goal.kind == "flops" else "percent"
    recommendation = {
        "goal": {"kind": goal.kind, "target": found.target, "unit": unit},
        "choice": verdict.choice,
        "reason": verdict.reason,
        **_figures(result, found),
        "saving": verdict.saving,
        "saving_interval": verdict.saving_interval,
        "saving_against": verdict.rival.name,
        "rivals": rivals,
    }
    recommendation["thresholds"] = [each if math.isfinite(each) else str(each) for each in found.choice.thresholds]
    if result.request.promise:
        recommendation["certificate"] = ready.certificate and dataclasses.asdict(ready.certificate)
        recommendation["unsure_below"] = ready.unsure_below
    return recommendation


def policy_of(result: SearchResult) -> Policy:
    """What the verdict says to use, ready to run: the cascade, or the one model."""
    found, single, promised = result.found, result.verdict.single, result.promised
    rule: Rule = found.rule
    if single is None:
        models, thresholds = [result.outputs[model].record for model in found.choice.chain], found.choice.thresholds
        scored, shares, sureness = found.cross_fitted, found.shares.tolist(), found.quantiles
    else:
        alone, promised = result.outputs[single.model], Promised()
        rule = Fused(found.rule.confidence).fit([alone]) if single.corrected else Surest("max softmax")
        models, thresholds = [alone.record], ()
        scored, shares, sureness = single.scored, [1.0], quantiles([rule.step([alone]).confidence])
    expected = Expected(
        num_images=len(scored.correct),
        accuracy=scored.accuracy,
        accuracy_interval=scored.accuracy_interval,
        shares=shares,
        flops=result.units.of(scored.costs, "FLOPs") or math.nan,
        milliseconds=result.units.of(scored.costs, "milliseconds"),
        quantiles=sureness,
    )
    return Policy(models, rule, list(thresholds), expected, promised.certificate, promised.unsure_below)


def describe(result: SearchResult) -> str:
    """For who pays the bill, a line each: what to use and how right it is, what it costs, how sure that is."""
    verdict, units, fitted = result.verdict, result.units, result.found.cross_fitted
    rival, certificate = verdict.rival, result.promised.certificate
    alone = f"{rival.name} alone is right on {rival.scored.accuracy:.2f}%"
    sure = (
        f"Measured on {len(fitted.correct):,} images, each judged by what was chosen and fitted without it; brackets "
        "are 95% intervals."
    )
    if rival.corrected:
        sure += " Corrected: with a temperature and an offset for each class, which the policy holds."
    if verdict.single is not None:
        cost = units.format(rival.cost)
        reason = f"{verdict.reason[0].upper()}{verdict.reason[1:]}."
        return f"Verdict: use {verdict.choice} alone: {alone}, at {cost} an image.\n{reason}\n{sure}"
    certified = f"\n{certificate.describe()}" if certificate else ""
    shares = [f"{_share(fitted, rival, unit)} of its {noun}" for unit, noun in enumerate(units.nouns)]
    return (
        f"Verdict: use the cascade {result.chain_of(result.found)}: it is right on {fitted.accuracy:.2f}% of the images"
        f"{format_interval(fitted.accuracy_interval)}, {alone}.\nIt takes {' and '.join(shares)}: "
        f"{units.format(float(fitted.costs[0]))} an image in place of {units.format(rival.cost)}, "
        f"{verdict.saving:.2f} times less.\n{sure}{certified}"
    )


def _share(fitted: Scored, single: Single, unit: int, digits: int = 0) -> str:
    saving, (low, high) = fitted.saving(float(single.scored.costs[unit]), unit)
    return f"{100 / saving:.{digits}f}% [{100 / high:.{digits}f}, {100 / low:.{digits}f}]"


def give_up_cells(result: SearchResult) -> tuple[list[str], list[list[str]]]:
    """What giving up 0, 0.5, 1 and 2 points of the best single model's accuracy saves, cross-fitted: header, rows."""
    units, best = result.units, result.best
    whole = result.a_month(best.scored)
    header = ["Give up", "Accuracy", "Cost", *(f"Of {best.name}'s {noun}" for noun in units.nouns)]
    header += ["Hours a month", "Money a month"] if whole else []
    rows = []
    for each in result.cascades.goals[1:]:
        fitted, part = each.cross_fitted, result.a_month(each.cross_fitted)
        cells = [
            f"{best.scored.accuracy - each.target:.1f} points",
            f"{fitted.accuracy:.2f}%{format_interval(fitted.accuracy_interval)}",
            units.format(float(fitted.costs[0])),
            *(_share(fitted, best, unit, 1) for unit in range(len(units.names))),
        ]
        if whole and part:
            cells += [f"{part[0]:.1f} of {whole[0]:.1f}", f"{part[1]:.2f} of {whole[1]:.2f}"]
        rows.append(cells)
    return header, rows
