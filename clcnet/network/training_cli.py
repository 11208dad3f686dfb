"""What the two training scripts share: their flags, the training, and the table of confidences that they print."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clcnet import cli, metrics
from clcnet.confidence import SIMPLE_CONFIDENCES
from clcnet.data.outputs import Outputs
from clcnet.files import atomic_path, check_output
from clcnet.network.model import CLCNet
from clcnet.network.training import RECIPES, Settings, Split, train_many

FIGURES = {  # by name: title, measure
    "auroc": ("AUROC", metrics.auroc),
    "aurc": ("AURC", metrics.aurc),
    "mse": ("MSE", metrics.brier),
    "calibration_error": ("calibration error", metrics.calibration_error),
}


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of both training scripts; the defaults are those of the released ones."""
    add = parser.add_argument_group("input and output").add_argument
    tables = "table(s) made by generate_data_for_CLCNet.py (default: data/effb4_output_ds_for_CLCNet.csv)"
    released = [cli.DATA_DIR / "effb4_output_ds_for_CLCNet.csv"]
    add("--cls-output", type=Path, nargs="+", default=released, metavar="TABLE", help=tables)
    add("--weight-save", type=Path, default=cli.WEIGHTS_DIR, metavar="FOLDER", help="where the weights go")
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--recipe", choices=tuple(RECIPES), default="default", help="released: the released scripts' settings")
    add("--max-epochs", type=cli.positive_int, default=200, metavar="N", help="upper bound on the epochs")
    add("--batch-size", type=cli.rows_a_batch, default=256, metavar="N", help="rows a batch, at least 2")
    add("--virtual-batch-size", type=cli.rows_a_batch, default=128, metavar="N", help="rows of ghost batch norm")
    add("--patience", type=cli.positive_int, default=50, metavar="N", help="epochs without a better validation MSE")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda, then mps, then cpu)")
    add("--log", type=Path, metavar="FILE", help="write every epoch's figures there, one JSON object a line")
    cli.add_seed_argument(group)


def train(
    args: argparse.Namespace, table: Outputs, device: torch.device, cut: Callable[[int], list[Split]]
) -> tuple[list[CLCNet], list[Split]]:
    """Train a network for each split of a table's rows, as the flags say, and write the log of epochs if they name one.

    Args:
        cut: makes the splits by a seed.

    Raises:
        ValueError: nothing can be learnt from these rows; the message names the tables.
    """
    settings = Settings(
        args.max_epochs, args.batch_size, args.virtual_batch_size, args.patience, args.seed, args.recipe
    )
    if args.log:
        check_output(args.log, inputs=args.cls_output)
    assert table.correct is not None, "tables of a training say which answers are right"
    epochs: list[dict[str, Any]] = []
    try:
        splits = cut(settings.seed)
        models = train_many(table.sorted_probs, table.correct, splits, settings, device, epochs.append)
    except ValueError as error:
        raise ValueError(f"{' and '.join(map(str, args.cls_output))}: {error}") from error
    if args.log:
        # JSON knows no nan
        lines = [{key: None if np.isnan(value) else value for key, value in epoch.items()} for epoch in epochs]
        with atomic_path(args.log) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return models, splits


def figures_of(confidence: NDArray[Any], correct: NDArray[np.bool_]) -> dict[str, float]:
    """How good a confidence is, by the names of `FIGURES`."""
    return {name: measure(confidence, correct) for name, (_, measure) in FIGURES.items()}


def simple_figures(sorted_probs: NDArray[np.float32], correct: NDArray[np.bool_]) -> dict[str, dict[str, float]]:
    """Those of all one-line confidences; but for max softmax they mean no probability, so have no such error."""
    rows = {name: figures_of(score(sorted_probs), correct) for name, score in SIMPLE_CONFIDENCES.items()}
    no_errors = dict.fromkeys(("mse", "calibration_error"), float("nan"))
    return {name: figures if name == "max softmax" else figures | no_errors for name, figures in rows.items()}


def print_figures(rows: dict[str, dict[str, float]]) -> None:
    """Print a table of figures, one line a name."""
    width = max(len(name) for name in rows)
    print(" " * width, *(f"{title:>17}" for title, _ in FIGURES.values()))
    for name, figures in rows.items():
        values = (figures[key] for key in FIGURES)
        print(f"{name:<{width}}", *(f"{'-' if np.isnan(value) else f'{value:.4f}':>17}" for value in values))
