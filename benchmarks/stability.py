"""Does the validation error stay down once it is down? The worst epoch of every fold, for several seeds.

    python -m benchmarks.stability            # about three minutes on two idle cores

Trains the five folds of ../shared/cifar10/resnet20.csv with each seed, and compares the validation MSE of every epoch
from the fifth on with the best of the same training. Results: benchmarks/results/stability.json and, as text, the
section in benchmarks/results/network.md.
"""

import argparse
from typing import Any

import numpy as np

from benchmarks.ablation import load
from benchmarks.bench_network import write_page
from benchmarks.measured import keep
from clcnet import cli
from clcnet.network.training import RECIPES, Settings, fold_splits, train_many

FIRST_EPOCH = 5


def worst_ratios(recipe: str, seed: int) -> list[float]:
    """Of each fold: the highest validation MSE from the fifth epoch on, over the lowest of all epochs."""
    probs, correct, folds = load()["resnet20"]
    epochs: list[dict[str, Any]] = []
    splits = fold_splits(folds, np.arange(len(folds)), seed)
    train_many(probs, correct, splits, Settings(seed=seed, recipe=recipe), on_epoch=epochs.append)
    ratios = []
    for network in range(1, len(splits) + 1):
        errors = np.array([row["mse"] for row in epochs if row["network"] == network])
        ratios.append(float(errors[FIRST_EPOCH - 1 :].max() / errors.min()))
    return ratios


def main(args: argparse.Namespace) -> dict[str, Any]:
    results = {}
    for recipe in args.recipes:
        results[recipe] = {str(seed): worst_ratios(recipe, seed) for seed in args.seeds}
        worst = max(max(ratios) for ratios in results[recipe].values())
        print(f"{recipe} recipe, five folds of {len(args.seeds)} seeds: at most {worst:.3f} times the best", flush=True)
    keep("stability", results)
    write_page()
    return results


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46], metavar="N", help="one run each")
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=["default", "released"], metavar="NAME")
    return parser


if __name__ == "__main__":
    cli.run(main, get_args_parser())
