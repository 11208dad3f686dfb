"""Step 5, training: which cascade of your models is worth it, and one CLCNet from their tables.

    python train_custom_data.py --cls-output shallow.parquet deep.parquet

Input: one or more tables of generate_data_for_CLCNet.py, of images that the models were not trained on. Given the
.parquet tables of two to twelve models over the same images, in any order, it finds the best cascade of up to four of
them, all of it chosen on four fifths of the images and scored on the last. From two .csv tables, which know no classes,
it suggests a threshold for the paper's rule.

Output, in --weight-save: cascade.json, which eval_custom_data.py --policy runs; CLCNet_custom_data.zip, trained on nine
tenths of the rows and measured on the last; CLCNet_custom_data_split.csv, which row was for training, validation or
test (80/10/10). In --results-folder: cascades.csv and recommendation.json.
"""

import argparse
from pathlib import Path
from typing import Any

from clcnet import cli

if __name__ == "__main__":
    cli.take_names_as_utf8()
    cli.expect_interrupts()  # before the imports that take seconds

import numpy as np
import torch
from numpy.typing import NDArray

from clcnet.cascade.curve import Steps, surest_steps
from clcnet.cascade.evaluation import evaluation_of_tables, images_of_outputs
from clcnet.cascade.rule import know_classes, known
from clcnet.cascade.selection import Goal, choose, short_threshold
from clcnet.classifiers.classifier import resolve_device
from clcnet.classifiers.timing import timed_on_noise
from clcnet.data.checks import doubts
from clcnet.data.images import list_images
from clcnet.data.outputs import Outputs, load_tables
from clcnet.files import atomic_paths, check_output, csv_writer, output_lock
from clcnet.network.training import Split, split_rows, train_many
from clcnet.network.training_cli import (
    add_training_arguments,
    epoch_log,
    figures_of,
    naming,
    print_figures,
    settings_of,
    simple_figures,
)
from clcnet.report import cascades, wanted


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    add_training_arguments(parser)
    where = "tables of the search (default: results, in --weight-save)"
    parser.add_argument_group("output").add_argument("--results-folder", type=Path, metavar="FOLDER", help=where)
    wanted.add_search_arguments(parser)
    photos = "the images that the tables are of, for thumbnails in the report"
    parser.add_argument_group("report").add_argument("--images", type=Path, metavar="FOLDER", help=photos)
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Search, train, save; returns the recommendation, the held-out figures, the suggested threshold and the paths."""
    wanted.Wanted.of(args)  # refused before any work
    settings, device = settings_of(args), resolve_device(args.device)
    print(f"device: {device}")
    path, split_path = (check_output(args.weight_save / f"CLCNet_custom_data{end}") for end in (".zip", "_split.csv"))
    folder = args.results_folder or args.weight_save / "results"
    check_output(folder / "cascades.csv")
    table, source = load_tables(args.cls_output)
    correct = table.correct
    assert correct is not None
    found = search(args, folder, device) if len(args.cls_output) > 1 else {}
    for doubt in doubts({str(name): 100 * correct[source == k].mean() for k, name in enumerate(args.cls_output)}):
        print(doubt)
    with naming(args.cls_output):
        split = split_rows(np.array(table.names), settings.seed)
    with output_lock(path):
        with naming(args.cls_output), epoch_log(args.log, args.cls_output) as on_epoch:
            (model,) = train_many(table.sorted_probs, correct, [split], settings, device, on_epoch)
        test = table.subset(split.test)
        confidence = model.predict(test.sorted_probs)
        right = correct[split.test]
        rows = {"CLCNet": figures_of(confidence, right)} | simple_figures(test.sorted_probs, right)
        metadata = {"test": rows["CLCNet"], "tables": [table_path.name for table_path in args.cls_output]}
        with atomic_paths([path, split_path]) as (weights_file, split_file):
            model.save(weights_file, metadata)
            _save_split(split_file, table.names, source, split)
    print_figures(rows)
    print(_verdict(rows, len(test)))
    threshold = None
    if len(args.cls_output) == 2 and not found:
        threshold = suggest_threshold(*paired_steps(test, source[split.test], confidence))
    print(f"weights in {path}, split in {split_path}")
    return found | {"figures": rows, "weights": path, "split": split_path, "threshold": threshold}


def search(args: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Any]:
    """Find the best cascade of the tables' models, where they know classes and are over the same images."""
    photos = list_images(args.images, any_folder=True) if args.images else None
    try:
        images, _ = images_of_outputs(args.cls_output[0], args.weight_save)
        evaluation = evaluation_of_tables(args.cls_output, images, [])
    except ValueError as error:
        print(f"no cascade was searched for: {error}")
        return {}
    if not know_classes(evaluation.outputs):
        print("no cascade was searched for: CSV tables do not know classes; make the tables as .parquet")
        return {}
    milliseconds = None
    if args.cost == "time" or args.price_per_hour:
        evaluation.outputs = timed_on_noise(evaluation.outputs, device)
        milliseconds = evaluation.milliseconds
    asked = wanted.Wanted.of(args, milliseconds)
    return cascades.search_and_report(
        evaluation.outputs, evaluation.folds, asked, folder, args.weight_save / "cascade.json", photos
    )


def _verdict(rows: dict[str, dict[str, float]], num_rows: int) -> str:
    """One line: does the trained confidence beat the simple ones, and by how much?"""
    parts = []
    for name in ("max softmax", "entropy"):
        gain = rows["CLCNet"]["auroc"] - rows[name]["auroc"]
        parts.append(f"{'beats' if gain > 0 else 'does not beat'} {name} ({gain:+.4f} AUROC)")
    return f"on the {num_rows} held-out rows CLCNet {' and '.join(parts)}"


def paired_steps(
    outputs: Outputs, source: NDArray[np.int64], confidence: NDArray[np.float32]
) -> tuple[Steps | None, list[int]]:
    """The cascade on the images that both tables hold, the less accurate model first, and its tables, 1 and 2.

    None where no image is in both.
    """
    position = [{name: row for row, name in enumerate(outputs.names) if source[row] == number} for number in (0, 1)]
    both = [name for name in position[0] if name in position[1]]
    if not both:
        return None, []
    rows, correct = np.array([[place[name] for name in both] for place in position]), known(outputs.correct, outputs)
    rows = rows[order := np.argsort(correct[rows].sum(axis=1), kind="stable")]
    return surest_steps(confidence[rows], correct[rows], [0, 0]), (order + 1).tolist()


def suggest_threshold(steps: Steps | None, numbers: list[int]) -> float | None:
    """The lowest threshold at which the cascade is as accurate as the deep model on held-out images of both tables.

    The more accurate table is taken to be the deep model's. Prints the threshold with what it gives; where there is
    none, the one that comes nearest.

    Returns:
        The shortest decimal with that effect; None where no threshold is accurate enough, or no image in both tables.
    """
    if steps is None:
        print("no threshold suggested: the two tables share no held-out image")
        return None
    print(
        f"on the {len(steps)} held-out images of both tables the shallow model (table {numbers[0]}) has "
        f"{steps.own_accuracy[0]:.2f}%, the deep one (table {numbers[1]}) {steps.own_accuracy[1]:.2f}%"
    )
    curve, point = choose(steps, Goal("match"))
    nearest = int(curve.accuracy.argmax()) if point is None else point
    threshold = short_threshold(curve, nearest)
    gives = f"{threshold}: {curve.accuracy[nearest]:.2f}% with {curve.deferral[nearest]:.1%} deferred"
    if point is None:
        print(f"no threshold reaches the deep model's accuracy: use it alone, or the nearest threshold {gives}")
        return None
    print(f"suggested threshold {gives}")
    return threshold


def _save_split(path: Path, names: list[str], source: NDArray[np.int64], split: Split) -> None:
    part = np.empty(len(names), dtype=object)
    for name in ("train", "validation", "test"):
        part[getattr(split, name)] = name
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv_writer(file)
        writer.writerow(["file", "table", "part"])
        writer.writerows(zip(names, source + 1, part, strict=True))


if __name__ == "__main__":
    cli.run(main, get_args_parser())
