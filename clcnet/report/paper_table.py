"""The paper's results table: each single model, and the cascade at its FLOPs and at its accuracy (arXiv:2205.09612)."""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clcnet.cascade.curve import Curve, Steps, outcome, sweep
from clcnet.cascade.selection import (
    Reference,
    cheapest_at_accuracy,
    cross_fit,
    dearest_within,
    resampled_savings,
    short_threshold,
)
from clcnet.intervals import Interval, percentile_interval, resampled_means, share_interval
from clcnet.metrics import Ints

SAME_ACCURACY = 0.1  # points; a row at a reference's FLOPs whose accuracy is this close serves as both rows

Chooser = Callable[[Curve, Steps], int | None]  # which point of a curve answers to a reference


# The single models of the paper's table, as the project's specification gives them.
PAPER_REFERENCES = tuple(
    Reference(f"EfficientNet-B{size}", accuracy, flops)
    for size, (accuracy, flops) in enumerate(
        [(75.40, 0.39), (77.64, 0.7), (78.73, 1.0), (80.52, 1.8), (82.00, 4.2), (82.72, 9.9), (83.30, 19), (83.80, 37)]
    )
)


# A line of the table is a single model, without a threshold, or a cascade held against one, its `reference`. `same` is
# what the two have in common, "accuracy", "flops" or both; printed bold. `saving` is the FLOPs of the reference over
# those of the cascade; its interval takes the choice of the threshold into account, made anew on every resample, with
# 0 for a resample in which no threshold was accurate enough. `cross_fitted`: the same choice made on four folds and
# scored on the fifth.
TEXTS = ("model", "reference", "same")
COLUMNS = (
    *("model", "accuracy", "threshold", "FLOPs", "reference", "same", "accuracy_low", "accuracy_high", "deferral"),
    *(f"{name}{end}" for name in ("gain", "saving", "cross_fitted_accuracy") for end in ("", "_low", "_high")),
    "cross_fitted_FLOPs",
)


def display_name(model: str) -> str:
    """`tf_efficientnet_b4.aa_in1k` -> `EfficientNet-B4`; `local-dir:path/to/deep` -> `deep`; others as they are."""
    efficientnet = re.fullmatch(r"(?:tf_)?efficientnet_b(\d)(?:\..*)?", model)
    if efficientnet:
        return f"EfficientNet-B{efficientnet[1]}"
    return Path(model.split(":", 1)[1]).name if model.startswith("local-dir:") else model


def distinct_names(models: Sequence[str]) -> list[str]:
    """What to call models in one table: `display_name`, with as many folders before it as tell equal names apart."""
    names = [display_name(model) for model in models]
    depth = 1
    while len(set(names)) < len(names) and depth < 20:
        depth += 1
        repeated = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(Path(model.split(":", 1)[-1]).parts[-depth:]) if name in repeated else name
            for model, name in zip(models, names, strict=True)
        ]
    numbers = [names[:place].count(name) + 1 for place, name in enumerate(names)]  # one model given twice
    return [name if number == 1 else f"{name} ({number})" for name, number in zip(names, numbers, strict=True)]


def cascade_name(models: Sequence[str], confidence: str = "CLCNet") -> str:
    """`CLCNet (S:B0+D:B4)`, as in the paper's table; `CLCNet (B0+B4+B7)` of more models."""
    names = [name.removeprefix("EfficientNet-") for name in distinct_names(models)]
    return f"{confidence} (S:{names[0]}+D:{names[1]})" if len(names) == 2 else f"{confidence} ({'+'.join(names)})"


def parse_references(text: str) -> list[Reference]:
    """`paper`, or `name:accuracy:FLOPs` with the accuracy in percent and the FLOPs in billions."""
    if text == "paper":
        return list(PAPER_REFERENCES)
    try:
        name, *figures = text.rsplit(":", 2)  # a name may hold colons itself, as local-dir:FOLDER does
        accuracy, flops = map(float, figures)
        if not (name and 0 < accuracy <= 100 and 0 < flops < math.inf):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither `paper` nor NAME:PERCENT:BILLIONS") from None
    return [Reference(name, accuracy, flops)]


def with_interval(name: str, value: float | None, interval: Interval | None) -> dict[str, Any]:
    """A figure and the ends of its interval, by the names of their columns."""
    low, high = interval or (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def results_frame(
    steps: Steps,
    models: Sequence[str],
    folds: Ints,
    references: Sequence[Reference] = (),
    seed: int = 42,
    confidence: str = "CLCNet",
) -> pd.DataFrame:
    """Build the table. The cascade's own models, as measured, take the place of references of the same name.

    Args:
        steps, models: the cascade's, and its models' names.
        folds: (N,) for cross-fitting.
        references: further single models.
        seed: of the bootstrap.
        confidence: which decides, for the cascade's name.
    """
    own = [
        Reference(name, float(steps.own_accuracy[k]), float(steps.flops[k]), k)
        for k, name in enumerate(distinct_names(models))
    ]
    published = [reference for reference in references if reference.name not in {model.name for model in own}]
    compared = sorted([*own, *published], key=lambda reference: reference.flops)
    curve = sweep(steps)
    savings = resampled_savings(steps, compared, seed)
    records = []
    for reference in compared:
        interval = None if reference.model is None else accuracy_interval(reference.accuracy, len(steps))
        records.append(
            {"model": reference.name, "reference": reference.name, "same": "", "FLOPs": reference.flops}
            | with_interval("accuracy", reference.accuracy, interval)
        )
        for same, choose_point in _comparisons(curve, reference, steps):
            record = _cascade_record(curve, steps, folds, reference, choose_point, seed)
            interval = percentile_interval(savings[reference.name]) if "accuracy" in same else None
            records.append(
                {"model": cascade_name(models, confidence), "reference": reference.name, "same": same}
                | record
                | with_interval("saving", reference.flops / record["FLOPs"], interval)
            )
    return pd.DataFrame(records, columns=list(COLUMNS)).astype({name: float for name in COLUMNS if name not in TEXTS})


def merge_frames(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One table of several cascades: every single model once, measured if it can be; beneath it all cascades' rows."""
    rows = pd.concat(frames, ignore_index=True)
    single = rows["threshold"].isna()
    singles = rows[single].sort_values("accuracy_low", key=pd.isna, kind="stable").drop_duplicates("model")
    place = {model: number for number, model in enumerate(singles.sort_values("FLOPs", kind="stable")["model"])}
    merged = pd.concat([singles, rows[~single]])
    return merged.sort_values("reference", key=lambda names: names.map(place), kind="stable", ignore_index=True)


def _comparisons(curve: Curve, reference: Reference, steps: Steps) -> list[tuple[str, Chooser]]:
    """The rows that a reference gets: none where the cascade is the shallow model alone or cannot come so far."""

    def at_flops(curve: Curve, _: Steps) -> int | None:
        return dearest_within(curve, reference.flops)

    def at_accuracy(curve: Curve, steps: Steps) -> int | None:
        return cheapest_at_accuracy(curve, reference.accuracy_on(steps))

    found: list[tuple[str, Chooser]] = []
    point = at_flops(curve, steps)
    if point and reference.flops <= curve.flops[-1]:
        if abs(curve.accuracy[point] - reference.accuracy) <= SAME_ACCURACY:
            return [("accuracy+flops", at_flops)]
        found.append(("flops", at_flops))
    return [*found, ("accuracy", at_accuracy)] if at_accuracy(curve, steps) else found


def _cascade_record(
    curve: Curve, steps: Steps, folds: Ints, reference: Reference, choose_point: Chooser, seed: int
) -> dict[str, Any]:
    point = choose_point(curve, steps)
    assert point is not None

    def choose_threshold(others: Steps) -> float:
        other_curve = sweep(others)
        other_point = choose_point(other_curve, others)
        return float(other_curve.thresholds[other_curve.accuracy.argmax() if other_point is None else other_point])

    right, spent = outcome(steps, cross_fit(steps, folds, choose_threshold))
    accuracy, threshold = float(curve.accuracy[point]), short_threshold(curve, point)
    gain_interval = _gain_interval(steps, threshold, reference, seed)
    return (
        {"threshold": threshold, "FLOPs": float(curve.flops[point]), "deferral": float(curve.deferral[point])}
        | with_interval("accuracy", accuracy, accuracy_interval(accuracy, len(folds)))
        | with_interval("gain", accuracy - reference.accuracy, gain_interval)
        | with_interval("cross_fitted_accuracy", 100 * float(right.mean()), share_interval(right.sum(), len(right)))
        | {"cross_fitted_FLOPs": float(spent.mean())}
    )


def _gain_interval(steps: Steps, threshold: float, reference: Reference, seed: int) -> Interval:
    """Paired with the reference where it was measured on the same images; else it is taken as known exactly."""
    correct, _ = outcome(steps, threshold)
    if reference.model is None:
        low, high = share_interval(correct.sum(), len(correct))
        return low - reference.accuracy, high - reference.accuracy
    means = resampled_means(np.stack([correct, steps.own[reference.model]], axis=1), seed=seed)
    return percentile_interval(100 * (means[:, 0] - means[:, 1]))


def accuracy_interval(accuracy: float, num_images: int) -> Interval:
    """Exact 95% interval of an accuracy in percent."""
    return share_interval(round(accuracy * num_images / 100), num_images)
