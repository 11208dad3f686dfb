"""The paper's results table: each single model, and the cascade at its FLOPs and at its accuracy (arXiv:2205.09612)."""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clcnet.cascade.curve import Curve, Ints, Steps, outcome, sweep
from clcnet.cascade.selection import (
    Reference,
    cheapest_at_accuracy,
    cross_fit,
    dearest_within,
    resampled_savings,
    score,
    short_threshold,
)
from clcnet.intervals import Interval, exact_interval, percentile_interval, resampled_means

SAME_ACCURACY = 0.1  # points; a row at a reference's FLOPs whose accuracy is this close serves as both rows

Chooser = Callable[[Curve, Steps], int | None]  # which point of a curve answers to a reference


# The single models of the paper's table, as the project's specification gives them.
PAPER_REFERENCES = tuple(
    Reference(f"EfficientNet-B{size}", accuracy, flops)
    for size, (accuracy, flops) in enumerate(
        [(75.40, 0.39), (77.64, 0.7), (78.73, 1.0), (80.52, 1.8), (82.00, 4.2), (82.72, 9.9), (83.30, 19), (83.80, 37)]
    )
)


@dataclass(frozen=True)
class CrossFitted:
    """Figures of a threshold on images that it was not chosen on."""

    accuracy: float
    accuracy_interval: Interval
    flops: float


@dataclass(frozen=True)
class Row:
    """One line of the table. A single model has a name and figures only.

    Attributes:
        same: which of "accuracy" and "flops" this row has in common with its reference; printed bold.
        gain: accuracy above the reference's, points.
        saving: FLOPs of the reference over those of the cascade. Its interval takes the choice of the threshold into
            account, chosen anew on every resample; 0 stands for a resample in which no threshold was accurate enough.
        cross_fitted: the same choice of threshold made on four folds, scored on the fifth.
    """

    model: str
    reference: str
    accuracy: float
    accuracy_interval: Interval | None
    flops: float
    threshold: float | None = None
    deferral: float | None = None
    same: tuple[str, ...] = ()
    gain: float | None = None
    gain_interval: Interval | None = None
    saving: float | None = None
    saving_interval: Interval | None = None
    cross_fitted: CrossFitted | None = None


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


def results_rows(
    steps: Steps,
    models: Sequence[str],
    folds: Ints,
    references: Sequence[Reference] = (),
    seed: int = 42,
    confidence: str = "CLCNet",
) -> list[Row]:
    """Build the table. The cascade's own models, as measured, take the place of references of the same name.

    Args:
        steps: the cascade's.
        models: its models' names.
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
    rows = []
    for reference in compared:
        rows.append(_single_row(reference, steps))
        for same, choose_point in _comparisons(curve, reference, steps):
            row = _cascade_row(curve, steps, folds, reference, choose_point, seed)
            interval = percentile_interval(savings[reference.name]) if "accuracy" in same else None
            rows.append(replace(row, model=cascade_name(models, confidence), same=same, saving_interval=interval))
    return rows


def merge_rows(tables: Sequence[Sequence[Row]]) -> list[Row]:
    """One table of several cascades: every single model once, beneath it the rows of all cascades."""
    rows = [row for table in tables for row in table]
    singles: dict[str, Row] = {}
    for row in rows:
        if row.threshold is None and (row.model not in singles or singles[row.model].accuracy_interval is None):
            singles[row.model] = row
    merged = []
    for single in sorted(singles.values(), key=lambda row: row.flops):
        merged.append(single)
        merged += [row for row in rows if row.threshold is not None and row.reference == single.model]
    return merged


def _comparisons(curve: Curve, reference: Reference, steps: Steps) -> list[tuple[tuple[str, ...], Chooser]]:
    """The rows that a reference gets: none where the cascade is the shallow model alone or cannot come so far."""

    def at_flops(curve: Curve, _: Steps) -> int | None:
        return dearest_within(curve, reference.flops)

    def at_accuracy(curve: Curve, steps: Steps) -> int | None:
        return cheapest_at_accuracy(curve, reference.accuracy_on(steps))

    found: list[tuple[tuple[str, ...], Chooser]] = []
    point = at_flops(curve, steps)
    if point and reference.flops <= curve.flops[-1]:
        if abs(curve.accuracy[point] - reference.accuracy) <= SAME_ACCURACY:
            return [(("accuracy", "flops"), at_flops)]
        found.append((("flops",), at_flops))
    if at_accuracy(curve, steps):
        found.append((("accuracy",), at_accuracy))
    return found


def _single_row(reference: Reference, steps: Steps) -> Row:
    interval = None
    if reference.model is not None:
        interval = accuracy_interval(reference.accuracy, len(steps))
    return Row(reference.name, reference.name, reference.accuracy, interval, reference.flops)


def _cascade_row(
    curve: Curve,
    steps: Steps,
    folds: Ints,
    reference: Reference,
    choose_point: Chooser,
    seed: int,
) -> Row:
    point = choose_point(curve, steps)
    assert point is not None

    def choose_threshold(others: Steps) -> float:
        other_curve = sweep(others)
        other_point = choose_point(other_curve, others)
        return float(other_curve.thresholds[other_curve.accuracy.argmax() if other_point is None else other_point])

    fitted = score(steps, cross_fit(steps, folds, choose_threshold), seed=seed)
    accuracy, flops = float(curve.accuracy[point]), float(curve.flops[point])
    threshold = short_threshold(curve, point)
    return Row(
        model="",
        reference=reference.name,
        accuracy=accuracy,
        accuracy_interval=accuracy_interval(accuracy, len(folds)),
        flops=flops,
        threshold=threshold,
        deferral=float(curve.deferral[point]),
        gain=accuracy - reference.accuracy,
        gain_interval=_gain_interval(steps, threshold, reference, seed),
        saving=reference.flops / flops,
        cross_fitted=CrossFitted(fitted.accuracy, fitted.accuracy_interval, fitted.flops),
    )


def _gain_interval(steps: Steps, threshold: float, reference: Reference, seed: int) -> Interval:
    """Paired with the reference where it was measured on the same images; else it is taken as known exactly."""
    correct, _ = outcome(steps, threshold)
    if reference.model is None:
        low, high = accuracy_interval(100 * float(correct.mean()), len(correct))
        return low - reference.accuracy, high - reference.accuracy
    means = resampled_means(np.stack([correct, steps.own[reference.model]], axis=1), seed=seed)
    return percentile_interval(100 * (means[:, 0] - means[:, 1]))


def accuracy_interval(accuracy: float, num_images: int) -> Interval:
    """Exact 95% interval of an accuracy in percent."""
    low, high = exact_interval(round(accuracy * num_images / 100), num_images)
    return float(low), float(high)
