"""Tables: the paper's, the comparison of rules, the confidences, what every threshold gives, most of them of step 4.

A frame has all digits, and is written as CSV; the same as Markdown has intervals in brackets, and small FLOPs in
millions. FLOPs are billions of multiply-adds an image.
"""

import argparse
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
import pandas as pd

from clcnet import metrics
from clcnet.cascade.comparison import DEFERRAL_SHARES, Contender, figures, resample
from clcnet.cascade.curve import Curve, Steps, sweep
from clcnet.cascade.rules import known
from clcnet.cascade.selection import (
    Reference,
    cheapest_at_accuracy,
    cross_fit,
    dearest_within,
    resampled_savings,
    short_threshold,
)
from clcnet.cascade.verdict import Scored
from clcnet.cli import one_line
from clcnet.data.outputs import Outputs
from clcnet.files import atomic_path
from clcnet.intervals import Interval, exact_interval, percentile_interval, resampled_means, share_interval
from clcnet.metrics import Ints, format_flops
from clcnet.strangers import is_line, is_number, read_bytes

_LARGEST_RESULTS = 2**20  # bytes; a dozen lines take 4,000
_SHARES = [f"accuracy_at_{share:.0%}" for share in DEFERRAL_SHARES]
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


def format_interval(interval: Interval | None, digits: int = 2) -> str:
    """` [75.96, 77.62]`, to stand behind a figure; nothing for figures that were not measured here."""
    return f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""


def format_saving(saving: float, interval: Interval | None) -> str:
    """`2.31x [2.10, 2.54]`; `none` where in some resamples no threshold was accurate enough."""
    if interval is None:
        return f"{saving:.2f}x"
    low, high = (f"{end:.2f}" if end > 0 else "none" for end in interval)
    return f"{saving:.2f}x [{low}, {high}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns padded so that it reads as plain text too."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    rule = ["-" * widths[0], *(":" + "-" * (width - 2) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [padded[0], rule, *padded[1:]])


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write all digits; an existing file is replaced only by a finished one."""
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")


def write_text(text: str, path: Path) -> None:
    """Write text that ends with a line break; an existing file is replaced only by a finished one."""
    with atomic_path(path) as temporary:
        temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8", newline="\n")


def with_interval(name: str, value: float | None, interval: Interval | None) -> dict[str, Any]:
    """A figure and the ends of its interval, by the names of their columns."""
    low, high = interval or (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def accuracy_interval(accuracy: float, num_images: int) -> Interval:
    """Exact 95% interval of an accuracy in percent."""
    return share_interval(round(accuracy * num_images / 100), num_images)


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

    scored = Scored.at(steps, cross_fit(steps, folds, choose_threshold))
    accuracy, threshold = float(curve.accuracy[point]), short_threshold(curve, point)
    gain_interval = _gain_interval(steps, threshold, reference, seed)
    return (
        {"threshold": threshold, "FLOPs": float(curve.flops[point]), "deferral": float(curve.deferral[point])}
        | with_interval("accuracy", accuracy, accuracy_interval(accuracy, len(folds)))
        | with_interval("gain", accuracy - reference.accuracy, gain_interval)
        | with_interval("cross_fitted_accuracy", scored.accuracy, scored.accuracy_interval)
        | {"cross_fitted_FLOPs": float(scored.costs[0])}
    )


def _gain_interval(steps: Steps, threshold: float, reference: Reference, seed: int) -> Interval:
    """Paired with the reference where it was measured on the same images; else it is taken as known exactly."""
    scored = Scored.at(steps, threshold)
    if reference.model is None:
        low, high = scored.accuracy_interval
        return low - reference.accuracy, high - reference.accuracy
    means = resampled_means(np.stack([scored.correct, steps.own[reference.model]], axis=1), seed=seed)
    return percentile_interval(100 * (means[:, 0] - means[:, 1]))


def results_markdown(frame: pd.DataFrame) -> str:
    """The paper's table; behind its four columns what the cascade is worth, and its cross-fitted figures."""
    header = ["Model name", "Top 1 Accuracy", "Threshold", "FLOPs per image", "Against the model above", "Cross-fitted"]
    return markdown(header, [_results_line(row) for row in frame.itertuples()])


def _results_line(row: Any) -> list[str]:
    def ends(name: str) -> Interval | None:
        low, high = getattr(row, f"{name}_low"), getattr(row, f"{name}_high")
        return None if math.isnan(low) else (low, high)

    accuracy, flops = f"{row.accuracy:.2f}%", format_flops(row.FLOPs)
    accuracy = (f"**{accuracy}**" if "accuracy" in row.same else accuracy) + format_interval(ends("accuracy"))
    flops = f"**{flops}**" if "flops" in row.same else flops
    if math.isnan(row.threshold):
        return [row.model, accuracy, "--", flops, "--", "--"]
    worth = f"gains {row.gain:+.2f}{format_interval(ends('gain'))}"
    if "accuracy" in row.same:
        worth = f"saves {format_saving(row.saving, ends('saving'))}"
    fitted = f"{row.cross_fitted_accuracy:.2f}%{format_interval(ends('cross_fitted_accuracy'))}"
    fitted += f" at {format_flops(row.cross_fitted_FLOPs)}"
    return [row.model, accuracy, f"{row.threshold:g}", flops, worth, fitted]


def read_results(path: Path) -> pd.DataFrame:
    """Read back a results table that was written as CSV.

    Raises:
        OSError: it is missing or no file.
        ValueError: it is no such table.
    """
    content = read_bytes(path, _LARGEST_RESULTS)
    try:
        texts: dict[Any, Any] = dict.fromkeys(TEXTS, str)
        frame = pd.read_csv(io.BytesIO(content), dtype=texts)[list(COLUMNS)].fillna(dict.fromkeys(TEXTS, ""))
        for name in COLUMNS:
            largest = math.inf if name == "threshold" else 1e15
            for value in frame[name]:
                empty = value == "" or (isinstance(value, float) and math.isnan(value))
                good = is_line(value) if name in TEXTS else is_number(value, -largest, largest)
                if (empty and name in ("model", "accuracy", "FLOPs")) or not (empty or good):
                    raise ValueError(f"{name} is {short(value)}")
        return frame
    except (KeyError, ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"{path} is not a results-table.csv of another evaluation ({one_line(error)})") from None


def performance_frame(curve: Curve, milliseconds: Sequence[float] | None = None) -> pd.DataFrame:
    """One line a threshold: `threshold, accuracy, FLOPs`, then deferral, exact 95% intervals, and the time if known."""
    num_right = (curve.accuracy * curve.num_images / 100).round()
    num_deferred = (curve.deferral * curve.num_images).round()
    accuracy_low, accuracy_high = exact_interval(num_right, curve.num_images)
    frame = pd.DataFrame(
        {
            "threshold": curve.thresholds,
            "accuracy": curve.accuracy,
            "FLOPs": curve.flops,
            "deferral": curve.deferral,
            "num_deferred": num_deferred.astype(int),
            "num_images": curve.num_images,
            "accuracy_low": accuracy_low,
            "accuracy_high": accuracy_high,
        }
    )
    if len(curve.model_flops) <= 2:  # with more models the cost is no longer a share of images
        for end, share in zip(("low", "high"), exact_interval(num_deferred, curve.num_images), strict=True):
            frame[f"FLOPs_{end}"] = curve.model_flops[0] + share / 100 * curve.model_flops[1:].sum()
    if milliseconds is not None:
        frame["milliseconds"] = curve.cost(milliseconds)
    return frame


def comparison_frame(contenders: Sequence[Contender], seed: int = 42) -> pd.DataFrame:
    """One line a rule: accuracy at several shares of deferred images, the area under them, and what it saves.

    `area_50` is the mean accuracy from no image deferred to half of them; `area_gain` is the area less that of the
    first rule, on the same images and the same resamples.
    """
    steps = contenders[0].steps
    samples = resample(contenders, seed)
    deep = float(steps.own_accuracy[-1]), float(steps.flops[-1])
    found = [figures(contender.curve, *deep) for contender in contenders]
    records = []
    for contender, its, sample in zip(contenders, found, samples, strict=True):
        its["area_gain"] = its["area"] - found[0]["area"]
        sample["area_gain"] = sample["area"] - samples[0]["area"]
        record: dict[str, object] = {"rule": contender.name}
        for name in (*_SHARES, "area", "area_gain", "saving", "area_50"):
            record |= with_interval(name, its[name], percentile_interval(sample[name]))
        records.append(record)
    return pd.DataFrame(records)


def comparison_markdown(frame: pd.DataFrame) -> str:
    """The table as text, intervals shortened to half their width; the CSV has both ends."""
    header = ["Rule", *(f"{column.removeprefix('accuracy_at_')} deferred" for column in _SHARES)]
    header += ["Area", "Area to 50%", f"Area against {frame['rule'][0]}", "Saving at deep accuracy"]
    rows = []
    for _, row in frame.iterrows():
        half = {name: (row[f"{name}_high"] - row[f"{name}_low"]) / 2 for name in (*_SHARES, "area", "area_50")}
        gain = f"{row['area_gain']:+.2f} [{row['area_gain_low']:+.2f}, {row['area_gain_high']:+.2f}]"
        saving = format_saving(row["saving"], (row["saving_low"], row["saving_high"]))
        rows.append(
            [
                row["rule"],
                *(f"{row[name]:.2f} ±{half[name]:.2f}" for name in half),
                "--" if row["rule"] == frame["rule"][0] else gain,
                "--" if math.isnan(row["saving"]) else saving,
            ]
        )
    return markdown(header, rows)


def confidence_frame(models: Sequence[str], outputs: Sequence[Outputs]) -> pd.DataFrame:
    """One line for each confidence on each model's answers, with all of `metrics.summary`."""
    return pd.DataFrame(
        {"model": model, "confidence": name, **metrics.summary(score, known(each.correct, each))}
        for model, each in zip(models, outputs, strict=True)
        for name, score in each.scores.items()
    )


def confidence_markdown(frame: pd.DataFrame) -> str:
    columns = {
        "AUROC": "auroc",
        "AURC": "aurc",
        "E-AURC": "e_aurc",
        "AUGRC": "augrc",
        **{f"Coverage at {risk:.0%} risk": f"coverage_at_{risk:.0%}_risk" for risk in metrics.RISK_LEVELS},
        "Brier": "brier",
        "Log-loss": "log_loss",
        "ECE": "calibration_error",
    }
    cells = frame[list(columns.values())].map(lambda number: "--" if math.isnan(number) else f"{number:.4f}")
    return markdown(["Model", "Confidence", *columns], frame[["model", "confidence"]].join(cells).to_numpy().tolist())
