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

from clcnet.cascade.curve import Stage
from clcnet.cascade.deep_offset import can_have_offset, fit_deep_offset, with_deep_offset
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
    threshold = offset = None
    if len(args.cls_output) == 2:
        stages, numbers = paired_stages(test, source[split.test], confidence)
        threshold = suggest_threshold(stages, numbers)
        rest = np.concatenate([split.train, split.validation])
        learnt = table.subset(rest)
        learnt_stages, _ = paired_stages(learnt, source[rest], model.predict(learnt.sorted_probs))
        offset = suggest_offset(learnt_stages, stages)
    print(f"weights in {path}, split in {split_path}")
    return {"figures": rows, "weights": path, "split": split_path, "threshold": threshold, "deep_offset": offset}


def _verdict(rows: dict[str, dict[str, float]], num_rows: int) -> str:
    """One line: does the trained confidence beat the simple ones, and by how much?"""
    parts = []
    for name in ("max softmax", "entropy"):
        gain = rows["CLCNet"]["auroc"] - rows[name]["auroc"]
        parts.append(f"{'beats' if gain > 0 else 'does not beat'} {name} ({gain:+.4f} AUROC)")
    return f"on the {num_rows} held-out rows CLCNet {' and '.join(parts)}"


def paired_stages(
    outputs: Outputs, source: NDArray[np.int64], confidence: NDArray[np.float32]
) -> tuple[list[Stage], list[int]]:
    """The two models on the images that both tables hold, the less accurate one first, and their tables, 1 and 2.

    No image is in both where the stages are empty.
    """
    position = [{name: row for row, name in enumerate(outputs.names) if source[row] == number} for number in (0, 1)]
    both = [name for name in position[0] if name in position[1]]
    rows = [np.array([place[name] for name in both], dtype=np.int64) for place in position]
    assert outputs.correct is not None
    stages = [Stage(confidence[numbers], outputs.correct[numbers], flops=0) for numbers in rows]
    order = sorted((0, 1), key=lambda number: int(stages[number].correct.sum()))
    return [stages[number] for number in order], [number + 1 for number in order]


def suggest_threshold(stages: list[Stage], tables: list[int]) -> float | None:
    """The lowest threshold at which the cascade is as accurate as the deep model on held-out images of both tables.

    The more accurate table is taken to be the deep model's. Prints the threshold with what it gives; where there is
    none, the one that comes nearest.

    Returns:
        The shortest decimal with that effect; None where no threshold is accurate enough, or no image in both tables.
    """
    shallow, deep = tables
    if not len(stages[0]):
        print("no threshold suggested: the two tables share no held-out image")
        return None
    print(
        f"on the {len(stages[0])} held-out images of both tables the shallow model (table {shallow}) has "
        f"{stages[0].accuracy:.2f}%, the deep one (table {deep}) {stages[1].accuracy:.2f}%"
    )
    threshold, reached, gives = _threshold_for_deep_accuracy(stages)
    if not reached:
        print(f"no threshold reaches the deep model's accuracy: use it alone, or the nearest threshold {gives}")
        return None
    print(f"suggested threshold {gives}")
    return threshold


def suggest_offset(learnt: list[Stage], held_out: list[Stage]) -> float | None:
    """A head start for the deep model, fitted on the rows learnt from; prints what it gives on the held-out ones.

    Returns:
        The offset; None where the tables share no image or the confidences are no probabilities.
    """
    if not len(held_out[0]) or not can_have_offset([*held_out, *learnt]):
        return None
    offset = round(fit_deep_offset(learnt), 2)
    _, reached, gives = _threshold_for_deep_accuracy(with_deep_offset(held_out, offset))
    print(f"with --deep-offset {offset}: {'' if reached else 'nearest '}threshold {gives}")
    return offset


def _threshold_for_deep_accuracy(stages: list[Stage]) -> tuple[float, bool, str]:
    """The threshold, whether it reaches the deep model's accuracy or only comes nearest, and what it gives in words."""
    curve, point = choose(stages, Goal("match"))
    nearest = int(curve.accuracy.argmax()) if point is None else point
    threshold = short_threshold(curve, nearest)
    gives = f"{threshold}: {curve.accuracy[nearest]:.2f}% with {curve.deferral[nearest]:.1%} deferred"
    return threshold, point is not None, gives


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
