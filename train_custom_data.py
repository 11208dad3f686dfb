"""Step 5, training: which cascade of your models is worth it, and one CLCNet from their tables.

    python train_custom_data.py --cls-output shallow.parquet deep.parquet

Input: one or more tables of generate_data_for_CLCNet.py, of images that the models were not trained on. Given the
.parquet tables of two to twelve models over the same images, in any order, it finds the best cascade of up to four of
them, all of it chosen on four fifths of the images and scored on the last. From two .csv tables, which know no classes,
it suggests a threshold for the paper's rule.

Output, in --weight-save: cascade.json, which eval_custom_data.py --policy runs; CLCNet_custom_data.zip, trained on nine
tenths of the rows and measured on the last; CLCNet_custom_data_split.csv, which row was for training, validation or
test (80/10/10). In --results-folder: report.html, cascades.csv and recommendation.json. The policy and the CLCNet are
two ways to the same end; neither holds the other.
"""

import argparse
from pathlib import Path
from typing import Any

from clcnet import cli

if __name__ == "__main__":
    cli.start()

import numpy as np
import torch

from clcnet.cascade.evaluation import evaluation_of_tables, images_of_outputs
from clcnet.cascade.rules import know_classes
from clcnet.cascade.selection import suggest_threshold
from clcnet.confidence import SIMPLE_CONFIDENCES
from clcnet.data.checks import doubts
from clcnet.data.images import list_images
from clcnet.data.outputs import Outputs, concatenated, load_labelled
from clcnet.distributed import resolve_device
from clcnet.files import atomic_paths, check_output, output_lock, write_rows
from clcnet.network.training import split_rows
from clcnet.network.training_cli import add_training_arguments, figures_of, print_figures, simple_figures, train
from clcnet.report.search_cli import SearchRequest, add_search_arguments


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    add_training_arguments(parser)
    where = "tables of the search (default: results, in --weight-save)"
    parser.add_argument_group("output").add_argument("--results-folder", type=Path, metavar="FOLDER", help=where)
    add_search_arguments(parser)
    photos = "the images that the tables are of, for thumbnails in the report"
    parser.add_argument_group("report").add_argument("--images", type=Path, metavar="FOLDER", help=photos)
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Search, train, save; returns the recommendation, the held-out figures, the suggested threshold and the paths."""
    request = SearchRequest.of(args)  # refused before any work
    device = resolve_device(args.device)
    print(f"device: {device}")
    path, split_path = (check_output(args.weight_save / f"CLCNet_custom_data{end}") for end in (".zip", "_split.csv"))
    folder = args.results_folder or args.weight_save / "results"
    check_output(folder / "cascades.csv")
    outputs = load_labelled(*args.cls_output)
    table, source = concatenated(outputs, args.cls_output)
    correct = table.correct
    assert correct is not None
    found = search(args, request, outputs, folder, device) if len(outputs) > 1 else {}
    accuracies = {str(name): 100 * correct[source == k].mean() for k, name in enumerate(args.cls_output)}
    cli.print_lines(*doubts(accuracies))
    with output_lock(path):
        (model,), (split,) = train(args, table, device, lambda seed: [split_rows(np.array(table.names), seed)])
        test = table.subset(split.test)
        confidence = model.predict(test.sorted_probs)
        right = correct[split.test]
        rows = {"CLCNet": figures_of(confidence, right)} | simple_figures(test.sorted_probs, right)
        metadata = {"test": rows["CLCNet"], "tables": [table_path.name for table_path in args.cls_output]}
        with atomic_paths([path, split_path]) as (weights_file, split_file):
            model.save(weights_file, metadata)
            part = np.empty(len(table), dtype=object)
            for name in ("train", "validation", "test"):
                part[getattr(split, name)] = name
            rows_of_split = zip(table.names, source + 1, part, strict=True)
            write_rows(split_file, [("file", "table", "part"), *rows_of_split])
    print_figures(rows)
    print(_verdict(rows, len(test)))
    threshold = None
    if len(args.cls_output) == 2 and not found:
        threshold = suggest_threshold(test, source[split.test], confidence)
    print(f"weights in {path}, split in {split_path}")
    return found | {"figures": rows, "weights": path, "split": split_path, "threshold": threshold}


def search(
    args: argparse.Namespace, request: SearchRequest, tables: list[Outputs], folder: Path, device: torch.device
) -> dict[str, Any]:
    """Find the best cascade of the tables' models, where they know classes and are over the same images."""
    photos = list_images(args.images, any_folder=True) if args.images else None
    try:
        images, _ = images_of_outputs(tables[0], args.cls_output[0])
        evaluation = evaluation_of_tables(tables, args.cls_output, images, [])
    except ValueError as error:
        print(f"no cascade was searched for: {error}")
        return {}
    if not know_classes(evaluation.outputs):
        print("no cascade was searched for: CSV tables do not know classes; make the tables as .parquet")
        return {}
    milliseconds = None
    # timm and matplotlib take seconds to import, and one table needs neither
    from clcnet.report.search_report import search_and_report

    if args.cost == "time" or args.price_per_hour:
        from clcnet.classifiers.timing import timed_on_noise

        evaluation.outputs = timed_on_noise(evaluation.outputs, device)
        milliseconds = evaluation.milliseconds
    policy = args.weight_save / "cascade.json"
    return search_and_report(evaluation.outputs, evaluation.folds, request, folder, policy, photos, milliseconds)


def _verdict(rows: dict[str, dict[str, float]], num_rows: int) -> str:
    """One line: does the trained confidence beat the simple ones, and by how much?"""
    parts = []
    for name in SIMPLE_CONFIDENCES:
        gain = rows["CLCNet"]["auroc"] - rows[name]["auroc"]
        parts.append(f"{'beats' if gain > 0 else 'does not beat'} {name} ({gain:+.4f} AUROC)")
    return f"on the {num_rows} held-out rows CLCNet {', '.join(parts)}"


if __name__ == "__main__":
    cli.run(main, get_args_parser())
