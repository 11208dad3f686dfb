"""Step 4, training: five CLCNets, each on four fifths of the images, for cross validation.

    python train_imagenet_5fold_cv.py --cls-output data/effb4_output_ds_for_CLCNet.csv

Input: one or more tables of generate_data_for_CLCNet.py, and the image folder that says which fold an image belongs to
(split_part_1..5, or class folders, then cut into five class-balanced folds). Without the folder the images of the first
table are cut so, by their classes if it knows them (.parquet). Output, in --weight-save:
CLCNet_imagenet_split_K.zip, K = 1..5, where fold K took no part in training, validation or calibration, and
CLCNet_imagenet_split.csv, which part every row had: file, table, fold, the networks that it validated, and the run, a
digest that the six files of one training share.
"""

import argparse
from typing import Any

from clcnet import cli

if __name__ == "__main__":
    cli.start()

import numpy as np

from clcnet.cascade.evaluation import images_of_outputs
from clcnet.data import sources
from clcnet.data.images import NUM_FOLDS, list_images
from clcnet.data.outputs import concatenated, load_labelled, match_rows
from clcnet.distributed import resolve_device
from clcnet.files import atomic_paths, check_output, output_lock, write_rows
from clcnet.network.training import Split, fold_splits
from clcnet.network.training_cli import add_training_arguments, figures_of, print_figures, simple_figures, train
from clcnet.network.weights import SPLIT_FILE, check_no_other_fold_weights, fold_weights_name, run_id


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parts = "images, cut in five parts (default: data/imagenet_splits_5 where it is, else those of the first table)"
    sources.add_image_arguments(parser, "--imagenet-split", parts)
    add_training_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train and save the five networks; returns the pooled figures and the paths."""
    device = resolve_device(args.device)
    print(f"device: {device}")
    check_no_other_fold_weights(args.weight_save)
    paths = [args.weight_save / fold_weights_name(fold) for fold in range(1, NUM_FOLDS + 1)]
    split_path = args.weight_save / SPLIT_FILE
    for path in (*paths, split_path):
        check_output(path)
    tables = load_labelled(*args.cls_output)
    table, source = concatenated(tables, args.cls_output)
    correct = table.correct
    assert correct is not None
    folder = args.imagenet_split or (cli.IMAGENET_SPLITS if cli.IMAGENET_SPLITS.is_dir() else None)
    if folder:
        images = list_images(folder, args.class_map, options=sources.data_set_options(args))
    else:
        images, _ = images_of_outputs(tables[0], args.cls_output[0])
        print(f"no image folder: the images of {args.cls_output[0]} are cut into {NUM_FOLDS} folds")
    image_of_row = match_rows(table, images, ", ".join(map(str, args.cls_output)), source)
    folds = images.folds[image_of_row]
    with output_lock(split_path):
        models, splits = train(args, table, device, lambda seed: fold_splits(folds, image_of_row, seed))
        scores = np.empty(len(table), dtype=np.float32)
        rows, run = {}, run_id(model.state_dict().values() for model in models)
        with atomic_paths([*paths, split_path]) as temporaries:
            for fold, (model, split) in enumerate(zip(models, splits, strict=True), start=1):
                scores[split.test] = model.predict(table.sorted_probs[split.test])
                rows[f"fold {fold}"] = figures_of(scores[split.test], correct[split.test])
                others = [other for other in range(1, len(models) + 1) if other != fold]
                metadata = {"fold": fold, "training_folds": others, "test": rows[f"fold {fold}"], "run": run}
                model.save(temporaries[fold - 1], metadata | {"tables": [path.name for path in args.cls_output]})
            places = zip(table.names, source + 1, folds + 1, _validates(splits, len(table)), strict=True)
            rows_of_split = [(*place, run) for place in places]
            write_rows(temporaries[-1], [("file", "table", "fold", "validates", "run"), *rows_of_split])
    rows["all folds"] = figures_of(scores, correct)
    print_figures(rows | simple_figures(table.sorted_probs, correct))
    auroc = rows["all folds"]["auroc"]
    print(f"AUROC {auroc:.4f} over all folds; weights in {args.weight_save}, split in {split_path}")
    return {"figures": rows, "weights": paths, "split": split_path, "scores": scores}


def _validates(splits: list[Split], num_rows: int) -> list[str]:
    """The numbers of the networks that each row validated, if any."""
    networks: list[list[str]] = [[] for _ in range(num_rows)]
    for number, split in enumerate(splits, start=1):
        for row in split.validation:
            networks[row].append(str(number))
    return [" ".join(numbers) for numbers in networks]


if __name__ == "__main__":
    cli.run(main, get_args_parser())
