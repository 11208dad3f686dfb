"""Writing an evaluation down: tables as Markdown, with intervals in brackets, and as CSV, with all digits.

FLOPs are billions of multiply-adds an image; Markdown prints small ones in millions (M).
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any

import pandas as pd

from clcnet import metrics
from clcnet.cascade.comparison import DEFERRAL_SHARES, Contender, figures, resample
from clcnet.cascade.curve import Curve
from clcnet.cascade.rules import known
from clcnet.cli import one_line
from clcnet.data.outputs import Outputs
from clcnet.files import atomic_path
from clcnet.intervals import Interval, exact_interval, percentile_interval
from clcnet.metrics import format_flops
from clcnet.report.paper_table import COLUMNS, TEXTS, with_interval
from clcnet.strangers import is_line, is_number, read_bytes

_LARGEST_RESULTS = 2**20  # bytes; a dozen lines take 4,000
_SHARES = [f"accuracy_at_{share:.0%}" for share in DEFERRAL_SHARES]


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


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write all digits; an existing file is replaced only by a finished one."""
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")


def write_text(text: str, path: Path) -> None:
    """Write text that ends with a line break; an existing file is replaced only by a finished one."""
    with atomic_path(path) as temporary:
        temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8", newline="\n")


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
