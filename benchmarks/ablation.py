"""What each part of the recipe is worth: recipe x calibration on CIFAR-10, with a plain MLP as the rival.

    python -m benchmarks.ablation             # about ten minutes on two idle cores
    python -m benchmarks.ablation --seeds 42

Five folds of ../shared/cifar10/resnet20.csv; the networks, trained on it alone, score resnet20 and resnet56, and all
out-of-fold scores are pooled. Each line is the mean of three seeds, +- half the range from the lowest to the highest.
Results: benchmarks/results/ablation.json and ablation.md, and the section in benchmarks/results/network.md.
"""

import argparse
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from benchmarks.ablation_1000 import calibrated, raw, without_network
from benchmarks.bench_network import write_page
from benchmarks.measured import SHARED, keep
from clcnet import cli, metrics
from clcnet.cascade.curve import area_under_deferral, surest_steps, sweep
from clcnet.confidence import SIMPLE_CONFIDENCES
from clcnet.data.images import list_images
from clcnet.data.outputs import Outputs, match_rows
from clcnet.network.model import CLCNet
from clcnet.network.training import RECIPES, Settings, Split, fold_splits, train_many

DATA = SHARED / "cifar10"
NAMES = ("resnet20", "resnet56")
COLUMNS = ("AUROC", "AURC", "MSE", "calibration error", "cascade area", "AUROC on resnet56", "AURC on resnet56")
Scorer = Callable[[np.ndarray], np.ndarray]
Scores = dict[str, np.ndarray]


def load() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Sorted probabilities, right or wrong, and fold, of both tables."""
    images = list_images(DATA / "imagenet_splits_5")
    tables = {name: Outputs.load(DATA / f"{name}.csv") for name in NAMES}
    return {
        name: (table.sorted_probs, table.correct, images.folds[match_rows(table, images, name)])
        for name, table in tables.items()
    }


def pooled(data: dict[str, Any], scorers: list[Scorer]) -> Scores:
    """Each row's score from the network that never saw its fold."""
    scores = {}
    for name, (probs, _, folds) in data.items():
        scores[name] = np.empty(len(probs))
        for fold, scorer in enumerate(scorers):
            scores[name][folds == fold] = scorer(probs[folds == fold])
    return scores


def figures(data: dict[str, Any], scores: Scores) -> list[float]:
    """The numbers under COLUMNS."""
    first, second = (scores[name] for name in NAMES)
    right, right_56 = (data[name][1] for name in NAMES)
    area = area_under_deferral(sweep(surest_steps([first, second], [right, right_56], [1, 3])), 0.5)
    return [
        metrics.auroc(first, right),
        metrics.aurc(first, right),
        metrics.brier(first, right) if first.min() > -0.5 and first.max() < 2 else float("nan"),
        metrics.calibration_error(first, right),
        area,
        metrics.auroc(second, right_56),
        metrics.aurc(second, right_56),
    ]


def clcnet_scorers(models: list[CLCNet], data: dict[str, Any], splits: list[Split]) -> dict[str, list[Scorer]]:
    """The same networks without calibration, with a logistic one of the raw score alone, and with ours."""
    probs, correct, _ = data[NAMES[0]]

    def platt(model: CLCNet, split: Split) -> Scorer:
        scores = model.predict(probs[split.validation], calibrated=False)[:, None]
        fitted = LogisticRegression(C=100).fit(scores, correct[split.validation])
        return lambda rows: fitted.predict_proba(model.predict(rows, calibrated=False)[:, None])[:, 1]

    networks = {(0, fold): model for fold, model in enumerate(models)}
    scorers = {"none": [*raw(networks).values()]}
    scorers["logistic on the raw score"] = [platt(model, split) for model, split in zip(models, splits, strict=True)]
    if all(model.calibration for model in models):
        scorers["ours"] = [*calibrated(networks).values()]
        scorers["ours without the network"] = [*without_network(networks).values()]
    return scorers


def mlp_scorers(data: dict[str, Any], splits: list[Split], seed: int) -> list[Scorer]:
    """A plain MLP with two hidden layers on the sorted vector itself."""
    probs, correct, _ = data[NAMES[0]]
    scorers = []
    for split in splits:
        rows = np.concatenate([split.train, split.validation])
        network = MLPClassifier((64, 64), batch_size=256, max_iter=40, early_stopping=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network.fit(probs[rows], correct[rows])
        scorers.append(lambda rows, network=network: network.predict_proba(rows)[:, 1])
    return scorers


def run_seed(data: dict[str, Any], seed: int) -> dict[str, list[float]]:
    """All variants with one seed: figures by name."""
    probs, correct, folds = data[NAMES[0]]
    splits = fold_splits(folds, np.arange(len(folds)), seed)
    rows = {"two-layer MLP on the sorted vector": figures(data, pooled(data, mlp_scorers(data, splits, seed)))}
    for recipe in ("default", "released"):
        RECIPES["ablation"] = dataclasses.replace(RECIPES[recipe], calibrated=True)
        epochs = 200 if recipe == "default" else 30
        models = train_many(probs, correct, splits, Settings(seed=seed, recipe="ablation", max_epochs=epochs))
        for calibration, scorers in clcnet_scorers(models, data, splits).items():
            if calibration != "ours without the network" or recipe == "default":
                name = f"{recipe} recipe, masks as released, calibration: {calibration}"
                rows[name] = figures(data, pooled(data, scorers))
    return rows


def to_markdown(table: dict[str, list[list[float]]]) -> str:
    """Mean and half the range over the seeds."""
    lines = ["| confidence | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, runs in table.items():
        values = np.array(runs)
        cells = []
        for column, title in zip(values.T, COLUMNS, strict=True):
            digits = 2 if title == "cascade area" else 4
            half = (column.max() - column.min()) / 2
            spread = f" ± {half:.{digits}f}" if len(runs) > 1 else ""
            cells.append("-" if np.isnan(column).any() else f"{column.mean():.{digits}f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> dict[str, Any]:
    data = load()
    table: dict[str, list[list[float]]] = {}
    for name, confidence in SIMPLE_CONFIDENCES.items():
        table[name] = [figures(data, {key: confidence(probs) for key, (probs, _, _) in data.items()})]
    for seed in args.seeds:
        for name, values in run_seed(data, seed).items():
            table.setdefault(name, []).append(values)
        keep("ablation", {"seeds": args.seeds, "columns": COLUMNS, "rows": table}, to_markdown(table))
        write_page()
    return {"rows": table}


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], metavar="N", help="one run for each")
    return parser


if __name__ == "__main__":
    cli.run(main, get_args_parser())
