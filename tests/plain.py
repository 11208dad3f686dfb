"""The printed figures a second time, plainly and slowly: all thresholds by all images, scipy and scikit-learn."""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import beta
from scripts import Finished
from sklearn.metrics import auc, roc_auc_score
from sklearn.metrics import log_loss as sklearn_log_loss

NEAR, NEARER = 0.05, 0.005  # half a unit of the last digit of figures printed with one digit and with two


class Two(NamedTuple):
    """Two models over N images: how sure each is, which answer is right alone, and once the deep model has spoken."""

    first: Any
    second: Any
    right: Any
    deep_right: Any
    flops: tuple[float, float]
    last: bool = False  # the deep answer stands wherever it was asked for

    def take(self, rows: Any) -> "Two":
        return self._replace(**{name: getattr(self, name)[rows] for name in self._fields[:4]})

    def at(self, threshold: Any) -> tuple[Any, Any]:
        """Whether an image goes on and whether the cascade is right, at thresholds that broadcast against (N,)."""
        goes_on = self.first < threshold
        return goes_on, np.where(goes_on & (self.last | (self.second > self.first)), self.deep_right, self.right)

    def cost(self, deferral: Any) -> Any:
        return self.flops[0] + self.flops[1] * deferral

    def curve(self) -> tuple[Any, Any, Any]:
        """Every threshold that makes a difference, the share that goes on and the accuracy in percent: (T,) each."""
        thresholds = np.append(np.unique(self.first), np.inf)
        goes_on, right = self.at(thresholds[:, None])
        return thresholds, goes_on.mean(1), 100 * right.mean(1)

    def cheapest(self, accuracy: float) -> int | None:
        """The point of the curve that costs least among those this accurate."""
        _, deferral, reached = self.curve()
        good = np.flatnonzero(reached > accuracy - 1e-7)
        return int(min(good, key=lambda point: deferral[point])) if len(good) else None

    def saving(self, accuracy: float, flops: float) -> float:
        """How many times cheaper than a model of this accuracy and cost; nan if no threshold is as accurate."""
        point = self.cheapest(accuracy)
        return np.nan if point is None else flops / self.cost(self.curve()[1][point])

    def figures(self) -> dict[str, float]:
        _, deferral, accuracy = self.curve()
        shares = (10, 20, 30, 50, 100)
        return {f"accuracy_at_{share}%": float(np.interp(share / 100, deferral, accuracy)) for share in shares} | {
            "area": float(auc(deferral, accuracy)),
            "saving": self.saving(100 * self.deep_right.mean(), self.flops[1]),
        }


def cross_fitted(two: Two, folds: Any, choose: Callable[[Two], int]) -> tuple[Any, Any]:
    """Right answers and costs of the images, each at the threshold chosen on the other folds."""
    right, spent = np.zeros(len(folds)), np.zeros(len(folds))
    for fold in set(folds):
        others = two.take(folds != fold)
        goes_on, right[folds == fold] = two.take(folds == fold).at(others.curve()[0][choose(others)])
        spent[folds == fold] = two.cost(goes_on)
    return right, spent


def exact(count: float, total: int) -> list[float]:
    """95% interval of a share, in percent."""
    ends = beta.ppf([0.025, 0.975], [count, count + 1], [total - count + 1, total - count])
    return [0 if count == 0 else 100 * ends[0], 100 if count == total else 100 * ends[1]]


def bootstrap(figure: Callable[[Any], Any], total: int, draws: int = 400) -> Any:
    """95% interval of a figure of resampled images; none at all counts as 0."""
    random = np.random.default_rng(1)
    samples = [figure(random.integers(0, total, total)) for _ in range(draws)]
    return np.percentile(np.nan_to_num(samples), [2.5, 97.5], axis=0).T


def near(interval: Any, expected: Any, tolerance: float = 0.25) -> bool:
    """Whether two bootstraps agree: ends within a share of the width."""
    width = expected[1] - expected[0]
    return bool(np.all(np.abs(np.subtract(interval, expected)) <= tolerance * width + 1e-9))


def metrics(sure: Any, right: Any) -> dict[str, float]:
    """What the tables of confidences print."""
    total, wrong = len(right), ~np.asarray(right)
    auroc = roc_auc_score(right, sure) if 0 < wrong.sum() < total else np.nan
    risks = []
    for k, score in enumerate(np.sort(sure)[::-1], start=1):  # equally sure images count by their mean
        surer, as_sure = sure > score, sure == score
        risks.append((wrong[surer].sum() + wrong[as_sure].mean() * (k - surer.sum())) / k)
    perfect = [max(0, k - int(right.sum())) / k for k in range(1, total + 1)]
    answered = {t: (np.mean(sure >= t), wrong[sure >= t].mean()) for t in sure}
    figures = {
        "auroc": auroc,
        "aurc": np.mean(risks),
        "e_aurc": np.mean(risks) - np.mean(perfect),
        "augrc": (1 - auroc) * right.mean() * wrong.mean() + wrong.mean() ** 2 / 2,  # arXiv:2407.01032
        "brier": np.mean((sure - right) ** 2),
        "log_loss": np.nan,
        "calibration_error": np.nan,
    }
    for risk in (1, 2, 5):
        figures[f"coverage_at_{risk}%_risk"] = max([0, *(c for c, r in answered.values() if r <= risk / 100)])
    if sure.min() >= 0 and sure.max() <= 1:
        figures["log_loss"] = sklearn_log_loss(right, np.clip(sure, 2**-23, 1 - 2**-23), labels=[False, True])
        gaps = 0.0
        for k in range(15):
            inside = (sure > k / 15) & (sure <= (k + 1) / 15) | ((sure == 0) & (k == 0))
            gaps += abs(sum(sure[inside]) - sum(right[inside]))
        figures["calibration_error"] = gaps / total
    return figures


def simple_confidences(probs: Any) -> dict[str, Any]:
    """The one-line confidences of rows (N, n), image by image."""
    rows = [[float(p) for p in row] for row in probs]
    return {
        "max softmax": np.array([row[0] for row in rows]),
        "margin": np.array([row[0] - row[1] for row in rows]),
        "entropy": np.array([sum(p * np.log(p) for p in row if p > 0) for row in rows]),
        "sum of squares (DOCTOR)": np.array([min(1, sum(p * p for p in row)) for row in rows]),
    }


def temperature_scaled(probs: Any, right: Any, folds: Any) -> Any:
    """The top probability at the temperature under which right and wrong answers of the other folds are likeliest."""
    logits = np.log(probs.astype(float))

    def top(rows: Any, log_temperature: float) -> Any:
        return 1 / np.exp((logits[rows] - logits[rows, :1]) / np.exp(log_temperature)).sum(1)

    def loss(log_temperature: float, rows: Any) -> float:
        sure = np.where(right[rows], top(rows, log_temperature), 1 - top(rows, log_temperature))
        return float(-np.log(sure).mean())

    scaled = np.empty(len(right))
    for fold in set(folds):
        best = minimize_scalar(loss, bounds=np.log([0.2, 5]), args=(folds != fold,), method="bounded").x
        scaled[folds == fold] = top(folds == fold, best)
    return scaled


def read(path: Path, key: str | None = None) -> Any:
    """Rows of a CSV with a header, numbers as such and empty cells as None; by the values of one column if told."""

    def value(text: str) -> Any:
        try:
            return float(text) if text else None
        except ValueError:
            return text

    with open(path, encoding="utf-8", newline="") as file:
        rows = [{name: value(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    return {row[key]: row for row in rows} if key else rows


def read_table(path: Path) -> tuple[list[str], Any, Any]:
    """Names, sorted probabilities and labels of a table of step 3."""
    with open(path, encoding="utf-8", newline="") as file:
        names, *columns, labels = zip(*csv.reader(file), strict=True)
    return list(names), np.array(columns, np.float32).T, np.array(labels) == "1"


def judged_by_fold(networks: list[Any], probs: Any, folds: Any) -> Any:
    """How sure the network of each image's fold is."""
    sure = np.empty(len(folds))
    for fold, network in enumerate(networks):
        sure[folds == fold] = network.predict(probs[folds == fold])
    return sure


def check_performance(rows: list[dict[str, float]], two: Two, thresholds: Any = None) -> None:
    thresholds = [row["threshold"] for row in rows] if thresholds is None else thresholds
    for row, threshold in zip(rows, thresholds, strict=True):
        goes_on, right = two.at(threshold)
        deferral, total = goes_on.mean(), len(right)
        low, high = exact(goes_on.sum(), total)
        expected = {
            "accuracy": 100 * right.mean(),
            "FLOPs": two.cost(deferral),
            "deferral": deferral,
            "num_deferred": goes_on.sum(),
            "num_images": total,
            "FLOPs_low": two.cost(low / 100),
            "FLOPs_high": two.cost(high / 100),
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected), row
        assert [row["accuracy_low"], row["accuracy_high"]] == pytest.approx(exact(right.sum(), total))


def check_results(
    rows: Any, two: Two, folds: Any, names: tuple[str, str], published: dict[str, tuple[float, float]]
) -> list[list[float]]:
    """Compare the paper's table with its definition; the figures of each row in the order in which they are printed.

    Args:
        rows: of the table, as `read` gives them.
        two: the cascade.
        folds: (N,) for cross-fitting.
        names: of its models.
        published: accuracy in percent and FLOPs of further models, by name.
    """
    thresholds, deferral, accuracy = two.curve()
    flops, total = two.cost(deferral), len(folds)
    own = dict(zip(names, ((two.right, two.flops[0]), (two.deep_right, two.flops[1])), strict=True))
    singles = [(name, 100 * right.mean(), cost, right) for name, (right, cost) in own.items()]
    singles += [(name, *figures, None) for name, figures in published.items()]
    found, printed = iter(rows), []
    for name, target, cost, right in sorted(singles, key=lambda single: single[2]):
        row = next(found)
        assert (row["model"], row["accuracy"], row["FLOPs"]) == (name, pytest.approx(target), cost)
        interval = [] if right is None else exact(right.sum(), total)
        assert [row[f"accuracy_{end}"] for end in ("low", "high") if interval] == pytest.approx(interval)
        printed.append([target, *interval, cost])

        def same_accuracy(some: Two, target: float = target, name: str = name) -> int:
            right = {names[0]: some.right, names[1]: some.deep_right}.get(name)
            point = some.cheapest(target if right is None else 100 * right.mean())
            return int(some.curve()[2].argmax()) if point is None else point

        def same_flops(some: Two, cost: float = cost) -> int:
            return max(np.flatnonzero(some.cost(some.curve()[1]) <= cost + 1e-9), default=0)

        point, wanted = same_flops(two), []
        if point and cost <= flops[-1]:
            close = abs(accuracy[point] - target) <= 0.1
            wanted = [("accuracy+flops" if close else "flops", point, same_flops)]
        if two.cheapest(target) and not (wanted and wanted[0][0] != "flops"):
            wanted.append(("accuracy", same_accuracy(two), same_accuracy))
        for same, point, choose in wanted:
            row = next(found)
            right_then = two.at(thresholds[point])[1]
            fitted, spent = cross_fitted(two, folds, choose)
            expected = [accuracy[point], *exact(right_then.sum(), total), flops[point], deferral[point]]
            expected += [accuracy[point] - target, cost / flops[point]]
            expected += [100 * fitted.mean(), *exact(fitted.sum(), total), spent.mean()]
            columns = ["accuracy", "accuracy_low", "accuracy_high", "FLOPs", "deferral", "gain", "saving"]
            columns += [f"cross_fitted_{column}" for column in columns[:4]]
            cascade = f"CLCNet (S:{names[0]}+D:{names[1]})"
            assert (row["model"], row["reference"], row["same"]) == (cascade, name, same)
            assert [row[column] for column in columns] == pytest.approx(expected), (name, same)
            assert two.at(row["threshold"])[0].mean() == pytest.approx(deferral[point])
            gain = [end - target for end in expected[1:3]]
            if right is not None:
                difference = 100 * (right_then.astype(float) - right)
                gain = bootstrap(lambda rows, d=difference: d[rows].mean(), total)
            assert near([row["gain_low"], row["gain_high"]], gain), (name, same)
            saves = "accuracy" in same
            if saves:

                def saving(rows: Any, right: Any = right, target: float = target, cost: float = cost) -> float:
                    return two.take(rows).saving(target if right is None else 100 * right[rows].mean(), cost)

                assert near([row["saving_low"], row["saving_high"]], bootstrap(saving, total)), (name, same)
            worth = [row[f"saving{end}"] for end in ("", "_low", "_high") if row[f"saving{end}"]]
            worth = worth if saves else [row[f"gain{end}"] for end in ("", "_low", "_high")]
            printed.append([*expected[:3], row["threshold"], expected[3], *worth, *expected[7:]])
    assert next(found, None) is None
    return printed


def numbers(text: str) -> list[float]:
    """All figures of a text in order, units and signs apart; FLOPs printed in millions come as billions."""
    found = re.findall(r"(?<![\w.-])([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)(M\b)?", text)
    return [float(number) / (1000 if millions else 1) for number, millions in found]


def line_with(words: str, finished: Finished) -> str:
    (line,) = [line for line in finished.out.splitlines() if words in line]
    return line


def printed_table(title: str, finished: Finished) -> list[list[str]]:
    """Cells of the first Markdown table after a title, its two lines of heading apart."""
    lines = finished.out[finished.out.index(title) :].splitlines()[2:]
    table = lines[: lines.index("")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]
