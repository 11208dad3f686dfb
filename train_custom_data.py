"""Step 5, training: one CLCNet from your own tables, with a tenth held out to measure it.

    python train_custom_data.py --cls-output shallow_output.csv deep_output.csv

Input: one or more tables of generate_data_for_CLCNet.py. Given two, of the shallow and the deep model over the same
images, it also suggests a threshold at which the cascade reaches the deep model's accuracy, and a --deep-offset for
eval_custom_data.py. Output, in --weight-save: CLCNet_custom_data.zip, and CLCNet_custom_data_split.csv, which row was
for training, validation or test (80/10/10).
"""

import argparse
import csv
from pathlib import Path
from typing import Any

from clcnet import cli

if __name__ == "__main__":
    cli.expect_interrupts()  # before the imports that take seconds

import numpy as np
from numpy.typing import NDArray

from clcnet.cascade.curve import Steps, surest_steps
from clcnet.cascade.rule import known
from clcnet.cascade.selection import Goal, choose, short_threshold
from clcnet.classifiers.classifier import resolve_device
from clcnet.data.outputs import Outputs, load_tables
from clcnet.files import atomic_paths, check_output, output_lock
from clcnet.network.training import Split, split_rows, train_clcnet
from clcnet.network.training_cli import (
    add_training_arguments,
    epoch_log,
    figures_of,
    naming,
    print_figures,
    settings_of,
    simple_figures,
)


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    add_training_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train and save the network; returns the held-out figures, the suggested threshold and offset, and the paths."""
    settings, device = settings_of(args), resolve_device(args.device)
    print(f"device: {device}")
    path, split_path = (check_output(args.weight_save / f"CLCNet_custom_data{end}") for end in (".zip", "_split.csv"))
    table, source = load_tables(args.cls_output)
    correct = table.correct
    assert correct is not None
    with naming(args.cls_output):
        split = split_rows(np.array(table.names), settings.seed)
    with output_lock(path):
        with naming(args.cls_output), epoch_log(args.log, args.cls_output) as on_epoch:
            model = train_clcnet(table.sorted_probs, correct, split, settings, device=device, on_epoch=on_epoch)
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
    if len(args.cls_output) == 2:
        threshold = suggest_threshold(*paired_steps(test, source[split.test], confidence))
    print(f"weights in {path}, split in {split_path}")
    return {"figures": rows, "weights": path, "split": split_path, "threshold": threshold}


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
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "table", "part"])
        writer.writerows(zip(names, source + 1, part, strict=True))


if __name__ == "__main__":
    cli.run(main, get_args_parser())
