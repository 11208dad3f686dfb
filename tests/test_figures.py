"""Every figure of step 4 and of training, against tests/plain.py: from the command line to files and text."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plain
import pytest
import scripts
import torch
from plain import NEAR, NEARER, check_performance, judged_by_fold, line_with, numbers, printed_table
from scripts import EVALUATE_FOLDS, TRAIN_CUSTOM, TRAIN_FOLDS, Finished

from clcnet import CLCNet
from clcnet.confidence import SIMPLE_CONFIDENCES
from clcnet.network.calibration import Calibration

NUM_IMAGES, FLOPS = 200, (1.0, 4.0)
REFERENCE, BUDGET = (55.0, 2.5), 3.0  # percent and billions of a published model, and what may be spent
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Bench:
    """Two tables of the same images, five networks, and what the networks say."""

    root: Path
    folds: Any
    probs: list[Any]
    two: plain.Two

    def run(self, *words: object) -> tuple[Finished, Path]:
        """Step 4 on the tables, without its drawings, which take most of the time."""
        out = self.root / re.sub(r"\W+", "_", f"out{words}")
        tables = ["--shallow-output", self.root / "shallow.csv", "--deep-output", self.root / "deep.csv"]
        costs = ["--shallow-model-FLOPs", FLOPS[0], "--deep-model-FLOPs", FLOPS[1]]
        where = ["--imagenet-split", self.root / "images", "--weight-save", self.root / "weights"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("clcnet.report.plots.save", lambda *_: [])
            words = (*tables, *costs, *where, "--performance-result", out / "performance-result.csv", *words)
            finished = scripts.run(EVALUATE_FOLDS, *words)
        assert finished.code == 0, finished.err
        return finished, out


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root, random = tmp_path_factory.mktemp("bench"), np.random.default_rng(5)
    names, folds = [], []
    for number in range(NUM_IMAGES):
        path = root / "images" / f"split_part_{number % 5 + 1}" / f"class{number // 5 % 4}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # tables need no pictures
        names.append(path.name)
        folds.append(number % 5)
    easy = random.random(NUM_IMAGES)
    probs, rights = [], []
    for name, skill in (("shallow", 0.35), ("deep", 0.5)):
        parts = random.dirichlet([0.5] * 4, NUM_IMAGES) + 3 * easy[:, None] * np.eye(4)[0] + 0.01
        parts = -np.sort(-parts, axis=1)
        rows = np.round(parts / parts.sum(1, keepdims=True), 4)
        right = random.random(NUM_IMAGES) < np.clip(skill + 1.2 * (rows[:, 0] - 0.6), 0.02, 0.98)
        lines = zip(names, rows, right, strict=True)
        table = [f"{image},{','.join(map(str, row))},{int(good)}\n" for image, row, good in lines]
        (root / f"{name}.csv").write_text("".join(random.permutation(table)))
        probs.append(rows.astype(np.float32))
        rights.append(right)
    networks = []
    for fold in range(5):
        torch.manual_seed(fold)
        network = CLCNet(4)
        network.calibration = Calibration(-0.3 + 0.1 * fold, (0.8 + 0.1 * fold, 0.1, 0.0, 0.0), 0.2)
        others = [other for other in range(1, 6) if other != fold + 1]
        path = root / "weights" / f"CLCNet_imagenet_split_{fold + 1}.zip"
        network.save(path, {"fold": fold + 1, "training_folds": others})
        networks.append(CLCNet.load(path))
    sure = [judged_by_fold(networks, rows, np.array(folds)) for rows in probs]
    return Bench(root, np.array(folds), probs, plain.Two(*sure, *rights, FLOPS))


@pytest.fixture(scope="module")
def searched(bench: Bench) -> tuple[Finished, Path]:
    return bench.run("--threshold-searching", "--reference", f"other:{REFERENCE[0]}:{REFERENCE[1]}")


@pytest.fixture(scope="module")
def frugal(bench: Bench) -> tuple[Finished, Path]:
    return bench.run("--thresholds", "all", "--target-FLOPs", BUDGET)


def test_performance_at_every_threshold(bench: Bench, searched: tuple[Finished, Path]) -> None:
    rows = plain.read(searched[1] / "performance-result.csv")
    assert list(rows[0])[:3] == ["threshold", "accuracy", "FLOPs"]
    assert [row["threshold"] for row in rows] == pytest.approx([0.05 + 0.02 * k for k in range(49)])
    check_performance(rows, bench.two)
    assert len({row["num_deferred"] for row in rows}) > 10


def test_all_thresholds_are_the_distinct_confidences_and_infinity(bench: Bench, frugal: tuple[Finished, Path]) -> None:
    rows, thresholds = plain.read(frugal[1] / "performance-result.csv"), bench.two.curve()[0]
    assert [row["threshold"] for row in rows] == pytest.approx(thresholds)
    check_performance(rows, bench.two, thresholds)


def test_one_threshold_is_described(bench: Bench) -> None:
    threshold = round(float(np.median(bench.two.first)), 3)
    finished, out = bench.run("--threshold", threshold)
    goes_on, right = bench.two.at(threshold)
    said = numbers(line_with("Threshold", finished))
    alone = [100 * bench.two.right.mean(), FLOPS[0], 100 * bench.two.deep_right.mean(), FLOPS[1]]
    accuracy = [100 * right.mean(), *plain.exact(right.sum(), NUM_IMAGES)]
    cost = [100 * goes_on.mean(), bench.two.cost(goes_on.mean())]
    assert said == pytest.approx([threshold, *accuracy, *cost, *alone], abs=NEARER)
    check_performance(plain.read(out / "performance-result.csv"), bench.two)


@pytest.fixture(scope="module")
def rules(bench: Bench) -> dict[str, plain.Two]:
    """Each rule of the comparison, as its definition says."""
    two, probs, folds = bench.two, bench.probs, bench.folds
    simple = [plain.simple_confidences(rows) for rows in probs]
    for scores, rows, right in zip(simple, probs, (two.right, two.deep_right), strict=True):
        scores["temperature-scaled softmax"] = plain.temperature_scaled(rows, right, folds)
    rules = {"CLCNet": two, "CLCNet, deep answer always kept": two._replace(last=True)}
    rules |= {name: two._replace(first=simple[0][name], second=simple[1][name]) for name in simple[0]}
    rules["random deferral"] = two._replace(first=np.zeros(len(folds)), last=True)
    gain = np.where(two.right, 1.0, np.where(two.deep_right, 0.0, 0.5))  # the oracle sends on what the deep model saves
    rules["oracle"] = two._replace(first=gain, deep_right=two.right | two.deep_right, last=True)
    return rules


def test_comparison_of_all_rules(bench: Bench, searched: tuple[Finished, Path], rules: dict[str, plain.Two]) -> None:
    written = plain.read(searched[1] / "results" / "comparison.csv", "rule")
    assert set(written) == set(rules)
    deep_accuracy = 100 * bench.two.deep_right.mean()
    ours = rules["CLCNet"].figures()
    cells = printed_table("Accuracy (%)", searched[0])
    for (name, row), printed in zip(written.items(), cells, strict=True):
        expected = rules[name].figures() | {"saving": rules[name].saving(deep_accuracy, FLOPS[1])}
        expected["area_gain"] = expected["area"] - ours["area"]
        tolerance = 1.1 if "temperature" in name else 1e-6  # found by another search: two images may change places
        row = {column: np.nan if value is None else value for column, value in row.items()}
        found = {column: row[column] for column in expected}
        assert found == pytest.approx(expected, abs=tolerance, nan_ok=True), name
        halved = [*list(expected)[:5], "area", "area_50"]  # printed with half the width of their intervals
        said = [x for name in halved for x in (row[name], (row[f"{name}_high"] - row[f"{name}_low"]) / 2)]
        if name != "CLCNet":
            said += [row["area_gain"], row["area_gain_low"], row["area_gain_high"]]
        if not np.isnan(row["saving"]):
            said += [row["saving"], *(end for end in (row["saving_low"], row["saving_high"]) if end > 0)]
        assert numbers(" ".join(printed[1:])) == pytest.approx(said, abs=NEARER + 1e-9), name


def test_intervals_of_the_comparison_are_paired_over_resampled_images(
    bench: Bench, searched: tuple[Finished, Path], rules: dict[str, plain.Two]
) -> None:
    chosen = ["CLCNet", "max softmax", "oracle", "CLCNet, deep answer always kept"]
    columns = ["accuracy_at_30%", "area", "saving", "area_gain"]

    def figures(rows: Any) -> list[list[float]]:
        found = []
        for rule in (rules[name].take(rows) for name in chosen):
            its = rule.figures() | {"saving": rule.saving(100 * bench.two.deep_right[rows].mean(), FLOPS[1])}
            found.append([its[column] for column in columns[:3]] + [its["area"] - (found or [[0, its["area"]]])[0][1]])
        return found

    written = plain.read(searched[1] / "results" / "comparison.csv", "rule")
    ends = np.moveaxis(plain.bootstrap(figures, NUM_IMAGES), 0, 1)  # (4 rules, 4 columns, 2)
    for name, intervals in zip(chosen, ends, strict=True):
        for column, interval in zip(columns, intervals, strict=True):
            found = [written[name][f"{column}_low"], written[name][f"{column}_high"]]
            assert plain.near(found, interval), (name, column)


def test_every_figure_of_every_confidence(searched: tuple[Finished, Path], rules: dict[str, plain.Two]) -> None:
    rows = plain.read(searched[1] / "results" / "confidences.csv")
    cells = printed_table("How well each confidence", searched[0])
    order = ("auroc", "aurc", "e_aurc", "augrc", *(f"coverage_at_{k}%_risk" for k in (1, 2, 5)))
    order += ("brier", "log_loss", "calibration_error")
    assert len(rows) == 12 and [row["model"] for row in rows] == ["shallow"] * 6 + ["deep"] * 6
    for row, printed in zip(rows, cells, strict=True):
        rule = rules[row["confidence"]]
        sure, right = (rule.first, rule.right) if row["model"] == "shallow" else (rule.second, rule.deep_right)
        expected = plain.metrics(sure, right)
        found = {column: np.nan if row[column] is None else row[column] for column in order}
        tolerance = 0.01 if "temperature" in row["confidence"] else 1e-6
        assert found == pytest.approx(expected, abs=tolerance, nan_ok=True), row
        assert printed[:2] == [row["model"], row["confidence"]]
        assert printed[2:] == ["--" if row[column] is None else f"{row[column]:.4f}" for column in order]


def test_results_table(bench: Bench, searched: tuple[Finished, Path]) -> None:
    rows = plain.read(searched[1] / "results" / "results-table.csv")
    expected = plain.check_results(rows, bench.two, bench.folds, ("shallow", "deep"), {"other": REFERENCE})
    for row, said in zip(printed_table("Results, with", searched[0]), expected, strict=True):
        assert numbers(" ".join(row[1:])) == pytest.approx(said, abs=NEARER + 1e-9), row
    assert len(rows) >= 6


@pytest.mark.parametrize("goal", ["match", "accuracy", "flops"])
def test_recommendation(
    bench: Bench, searched: tuple[Finished, Path], frugal: tuple[Finished, Path], goal: str
) -> None:
    two, target, budget = bench.two, 100 * bench.two.deep_right.mean(), BUDGET
    if goal == "accuracy":
        target = REFERENCE[0]
        finished, _ = bench.run("--target-accuracy", target)
    else:
        finished, _ = searched if goal == "match" else frugal

    def choose(some: plain.Two) -> int:
        _, deferral, accuracy = some.curve()
        if goal == "flops":
            affordable = some.cost(deferral) <= budget + 1e-9
            return int(np.where(affordable, accuracy, 0).argmax())
        point = some.cheapest(100 * some.deep_right.mean() if goal == "match" else target)
        return int(accuracy.argmax()) if point is None else point

    thresholds, deferral, accuracy = two.curve()
    point = choose(two)
    right = two.at(thresholds[point])[1]
    cost = two.cost(deferral[point])

    def saving(rows: Any) -> float:
        some = two.take(rows)
        if goal == "flops":
            return FLOPS[1] / two.cost(two.at(thresholds[point])[0][rows].mean())
        return some.saving(100 * some.deep_right.mean() if goal == "match" else target, FLOPS[1])

    given = [target] if goal == "accuracy" else [budget] if goal == "flops" else []
    said = numbers(line_with("take threshold", finished).removeprefix("For "))
    assert said[: len(given)] == given
    threshold, *said = said[len(given) :]
    assert two.at(threshold)[0].mean() == pytest.approx(deferral[point])
    expected = [accuracy[point], *plain.exact(right.sum(), NUM_IMAGES), 100 * deferral[point], cost, FLOPS[1] / cost]
    assert said[:6] == pytest.approx(expected, abs=NEAR)
    assert plain.near(([0.0] * 2 + said[6:])[-2:], plain.bootstrap(saving, NUM_IMAGES), 0.25)

    fitted, spent = plain.cross_fitted(two, bench.folds, choose)
    saved = [FLOPS[1] / spent.mean(), *plain.bootstrap(lambda rows: FLOPS[1] / spent[rows].mean(), NUM_IMAGES)]
    expected = [100 * fitted.mean(), *plain.exact(fitted.sum(), NUM_IMAGES), spent.mean(), saved[0]]
    said = numbers(line_with("chosen on four folds", finished))
    assert said[:5] == pytest.approx(expected, abs=NEARER) and plain.near(said[5:], saved[1:], 0.3)

    better = ~two.right & two.deep_right
    best = [100 * (two.right | two.deep_right).mean(), *plain.exact((two.right | two.deep_right).sum(), NUM_IMAGES)]
    assert numbers(line_with("oracle):", finished)) == pytest.approx([*best, two.cost(better.mean())], abs=NEARER)

    rival = two.right if goal == "flops" else two.deep_right
    ahead = 100 * (fitted - rival)
    interval = plain.bootstrap(lambda rows: ahead[rows].mean(), NUM_IMAGES)
    verdict = line_with("rule alone", finished)
    said = numbers(verdict.partition(": use ")[2])
    if goal == "flops":
        assert said[0] == pytest.approx(ahead.mean(), abs=NEARER) and plain.near(said[1:3], interval)
        choice = "the cascade" if interval[0] > 0 else "shallow alone"
    else:
        *_, save, low, high, reached, asked = said
        assert [save, reached, asked] == pytest.approx([saved[0], 100 * fitted.mean(), target], abs=NEARER)
        assert plain.near([low, high], saved[1:], 0.3)
        holds = interval[1] + 100 * rival.mean() >= target  # paired with the deep model
        choice = "the cascade" if holds and low > 1 and save >= 1.1 else "deep alone"
    assert verdict.startswith(f"By the paper's rule alone: use {choice}")


# ---------------------------------------------------------------- training

QUICK = ["--max-epochs", 3, "--batch-size", 32, "--virtual-batch-size", 16, "--device", "cpu"]


def check_confidences(finished: Finished, expected: dict[str, tuple[Any, Any]]) -> None:
    """The printed table of confidences, by name: how sure, and what is right."""
    lines = finished.out.splitlines()
    first = next(place for place, line in enumerate(lines) if "AUROC" in line) + 1
    for line, (name, (sure, right)) in zip(lines[first:], expected.items(), strict=False):
        figures = plain.metrics(sure, right)
        wanted = [figures[column] for column in ("auroc", "aurc", "brier", "calibration_error")]
        if name in SIMPLE_CONFIDENCES and name != "max softmax":
            wanted[2:] = [np.nan, np.nan]
        assert line.startswith(name)
        words = line.removeprefix(name).split()
        assert words == ["-" if np.isnan(figure) else f"{figure:.4f}" for figure in wanted], name


def simple(probs: Any, right: Any) -> dict[str, tuple[Any, Any]]:
    return {name: (score, right) for name, score in plain.simple_confidences(probs).items()}


def test_training_by_folds_prints_how_good_each_network_is_on_its_own_fold(bench: Bench, tmp_path: Path) -> None:
    words = ["--imagenet-split", bench.root / "images", "--cls-output", bench.root / "deep.csv"]
    finished = scripts.run(TRAIN_FOLDS, *words, "--weight-save", tmp_path, *QUICK)
    probs, right = bench.probs[1], bench.two.deep_right
    networks = [CLCNet.load(tmp_path / f"CLCNet_imagenet_split_{fold}.zip") for fold in range(1, 6)]
    sure = judged_by_fold(networks, probs, bench.folds)
    expected = {f"fold {k + 1}": (sure[bench.folds == k], right[bench.folds == k]) for k in range(5)}
    check_confidences(finished, expected | {"all folds": (sure, right)} | simple(probs, right))
    auroc = plain.metrics(sure, right)["auroc"]
    assert f"AUROC {auroc:.4f} over all folds" in finished.out.splitlines()[-1]


@pytest.mark.parametrize("seed", [3, 5])  # with 3 a threshold reaches the deep model's accuracy
def test_training_on_two_tables_prints_figures_of_held_out_rows_and_a_threshold(
    bench: Bench, tmp_path: Path, seed: int
) -> None:
    tables = [bench.root / "shallow.csv", bench.root / "deep.csv"]
    finished = scripts.run(TRAIN_CUSTOM, "--cls-output", *tables, "--weight-save", tmp_path, *QUICK, "--seed", seed)
    network = CLCNet.load(tmp_path / "CLCNet_custom_data.zip")
    names, probs, right = zip(*map(plain.read_table, tables), strict=True)
    parts = plain.read(tmp_path / "CLCNet_custom_data_split.csv")
    assert [row["file"] for row in parts] == [*names[0], *names[1]]
    held_out = np.array([row["part"] == "test" for row in parts])
    all_probs, all_right = np.concatenate(probs), np.concatenate(right)
    sure = network.predict(all_probs).astype(float)
    rows = {"CLCNet": (sure[held_out], all_right[held_out])} | simple(all_probs[held_out], all_right[held_out])
    check_confidences(finished, rows)
    auroc = {name: plain.metrics(*arrays)["auroc"] for name, arrays in rows.items()}
    line = line_with("held-out rows", finished)
    for name in SIMPLE_CONFIDENCES:
        gain = auroc["CLCNet"] - auroc[name]
        assert f"{'beats' if gain > 0 else 'does not beat'} {name} ({gain:+.4f} AUROC)" in line
    assert f"on the {held_out.sum()} held-out rows" in line

    place = [{name: NUM_IMAGES * table + row for row, name in enumerate(names[table])} for table in (0, 1)]
    pairs = np.array([[place[0][name], place[1][name]] for name in names[0]])
    two = plain.Two(sure[pairs[:, 0]], sure[pairs[:, 1]], all_right[pairs[:, 0]], all_right[pairs[:, 1]], FLOPS)
    tested = held_out[pairs[:, 0]]
    test = two.take(tested)
    said = numbers(line_with("held-out images of both", finished))
    alone = [1, 100 * test.right.mean(), 2, 100 * test.deep_right.mean()]
    assert said == pytest.approx([tested.sum(), *alone], abs=NEARER)
    (line,) = (line for line in finished.out.splitlines() if " threshold " in line and "%" in line)
    _, deferral, accuracy = test.curve()
    point = test.cheapest(100 * test.deep_right.mean())
    assert ("nearest" in line) == (point is None) and (seed == 5 or point)
    point = int(accuracy.argmax()) if point is None else point
    threshold, reached, deferred = numbers(line)
    assert [reached, deferred] == pytest.approx([accuracy[point], 100 * deferral[point]], abs=NEAR)
    assert test.at(threshold)[0].mean() == pytest.approx(deferral[point])
