"""What all models said of the same images, from tables, judged by the CLCNet of each image's own fold.

`evaluation_images` has the same of images. Image i is judged by the network that was not trained on its fold.
Nothing here chooses a threshold.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as short

import numpy as np
import torch

from clcnet.cascade.answers import run_cascade
from clcnet.cascade.curve import Curve
from clcnet.cascade.rules import Rule, known
from clcnet.confidence import CLCNET, SIMPLE_CONFIDENCES, TEMPERED, fit_temperatures, tempered_top
from clcnet.data.images import NUM_FOLDS, ImageSet, balanced_folds
from clcnet.data.outputs import UNKNOWN, Outputs, Record, match_rows
from clcnet.metrics import Bools, Ints
from clcnet.network.model import CLCNet
from clcnet.network.weights import SPLIT_FILE, find_fold_weights
from clcnet.strangers import check_file

_FOLDS = [str(fold) for fold in range(1, NUM_FOLDS + 1)]
_LONGEST_LINE = 2**17  # characters


@dataclass
class Evaluation:
    """K models over N images, cheapest first, with names and costs in their records.

    Where one threshold alone is of interest, a later model may lack images that do not go on to it.
    """

    outputs: list[Outputs]
    folds: Ints  # (N,) from 0, of the first model's images
    sources: list[str]  # the files or models that the outputs come from, for messages
    unreadable: dict[int, str] = field(default_factory=dict)  # index of an image -> why it was left out
    images: ImageSet | None = None  # where they lie, if they are at hand

    @property
    def models(self) -> list[str]:
        """The models' names."""
        return [each.record.model for each in self.outputs]

    @property
    def milliseconds(self) -> list[float] | None:
        """Of each model an image, where all were measured, and alike."""
        records = [each.record for each in self.outputs]
        found = [record.milliseconds for record in records if record.milliseconds is not None]
        return found if len(found) == len(records) and _timed_alike(records) else None


def evaluation_of_tables(
    tables: Sequence[Outputs],
    paths: Sequence[Path],
    images: ImageSet,
    networks: Sequence[CLCNet],
    models: Sequence[str | None] = (),
    flops: Sequence[float | None] = (),
) -> Evaluation:
    """Take the models' outputs from their tables, in the order of the image set; no image is opened.

    Args:
        tables: labelled, one a model.
        paths: where they were read from, for messages.
        images: that the tables are of, or more.
        networks: of each fold.
        models: names of the models, in place of those that the tables record.
        flops: likewise; counted by the name where neither says. Without models and FLOPs the tables may come in any
            order, and stand by what their models cost.
    """
    matched = [match_rows(table, images, str(path)) for table, path in zip(tables, paths, strict=True)]
    _check_same_images(matched, paths, images)
    places = np.sort(matched[0])
    nothing = [None] * len(paths)
    given = zip(tables, paths, models or nothing, flops or nothing, strict=True)
    records = [_record(table.record, path, model, cost) for table, path, model, cost in given]
    times = [record for record in records if record.milliseconds is not None]
    if not _timed_alike(times):
        print("the tables' times are not compared: they were taken on several devices, or in several ways")
    order = range(len(paths)) if models or flops else np.argsort([record.flops or 0 for record in records]).tolist()
    names = [images.names[place] for place in places]
    outputs = [replace(tables[k].subset(np.argsort(matched[k])), names=names, record=records[k]) for k in order]
    folds = images.folds[places]
    sources = [str(paths[k]) for k in order]
    return Evaluation([with_clcnet(each, folds, networks) for each in outputs], folds, sources)


def _timed_alike(records: Sequence[Record]) -> bool:
    """Whether models were timed on one device, in batches of one size, with reading or all without."""
    ways = [{"device": record.device} | record.timed | {"run": None} for record in records]
    return all(way == ways[0] for way in ways)


def _record(record: Record, path: Path, model: str | None, flops: float | None) -> Record:
    name, flops = model or record.model, flops or record.flops
    if not flops and not name:
        raise ValueError(
            f"nothing says what the model of {path} costs; give its FLOPs, or its name to have them counted"
        )
    return replace(record, model=name or path.stem, flops=flops or flops_of(name))


def _check_same_images(matched: Sequence[Ints], paths: Sequence[Path], images: ImageSet) -> None:
    for other in range(1, len(matched)):
        for here, there in ((0, other), (other, 0)):
            missing = np.setdiff1d(matched[here], matched[there])
            if len(missing):
                first = ", ".join(images.names[index] for index in missing[:3])
                raise ValueError(
                    f"{paths[there]} lacks {len(missing)} of the images of {paths[here]}: {first}"
                    f"{', ...' if len(missing) > 3 else ''}; make all tables from the same images"
                )


def with_clcnet(outputs: Outputs, folds: Ints, networks: Sequence[CLCNet]) -> Outputs:
    """Add how sure the network of each image's fold is of its answer; nothing where there are no networks."""
    if not networks:
        return outputs
    confidence = np.empty(len(folds))
    for fold in np.unique(folds):
        inside = folds == fold
        confidence[inside] = networks[fold].predict(outputs.sorted_probs[inside])
    return replace(outputs, scores={CLCNET: confidence})


def with_rivals(outputs: Outputs, folds: Ints) -> Outputs:
    """Add all confidences without a network; the temperature of an image is fitted on the other folds."""
    probs = outputs.sorted_probs
    simple = {name: score(probs) for name, score in SIMPLE_CONFIDENCES.items()}
    parts = [folds == fold for fold in np.unique(folds)]
    others = [~inside if not inside.all() else inside for inside in parts]
    tempered = np.empty(len(outputs))
    temperatures = fit_temperatures(probs, known(outputs.correct, outputs), others)
    for inside, temperature in zip(parts, temperatures, strict=True):
        tempered[inside] = tempered_top(probs[inside], np.array([temperature]))[:, 0]
    return replace(outputs, scores=outputs.scores | simple | {TEMPERED: tempered})


def at_threshold(rule: Rule, outputs: Sequence[Outputs], threshold: float) -> Curve:
    """Run a fitted rule at one threshold, each model answering the images that go on to it: a curve of one point.

    An image that a later model lacks where it goes on to it, because it could not be read, counts for nothing.
    """
    first, rows_of = outputs[0], [{name: row for row, name in enumerate(each.names)} for each in outputs]

    def ask(stage: int, images: Ints) -> tuple[Outputs, Bools]:
        rows = np.array([rows_of[stage].get(first.names[image], -1) for image in images], dtype=np.int64)
        return outputs[stage].subset(rows[rows >= 0]), rows >= 0

    answers = run_cascade(rule, [threshold] * (len(outputs) - 1), len(first), ask).read()
    accuracy = 100 * answers.correct.sum() / len(answers)
    flops = np.array([each.record.flops for each in outputs], dtype=np.float64)
    return Curve(np.array([threshold]), np.array([accuracy]), answers.calls[None], flops, len(answers))


def images_of_outputs(table: Outputs, path: Path, weights: Path | None = None) -> tuple[ImageSet, bool]:
    """Stand in for an image folder by what a table from this file says of its images, where no folder is named.

    Returns:
        The image set, and whether its folds are those of the training of the weights in a folder, by the list of all
        images that it left there; else they are class-balanced.
    """
    classes, trained = known(table.correct, table).astype(np.int64) if table.targets is None else table.targets, False
    if weights and (weights / SPLIT_FILE).exists():  # the released ones have none
        folds, _ = _read_splits(weights / SPLIT_FILE, table.names)
        trained = bool((folds != UNKNOWN).all())
    if not trained:
        folds = balanced_folds(table.names, classes)
    return ImageSet(path, table.names, table.names, classes, [], folds), trained


def load_fold_networks(folder: Path, images: ImageSet, device: torch.device | str = "cpu") -> list[CLCNet]:
    """Load the five networks, the one that judges fold k at index k.

    Refuses those of which a file, or the list of images beside them, says that a network was trained on images that it
    should judge, or is of another training.
    """
    networks, runs = [], {}
    for fold, path in enumerate(find_fold_weights(folder), start=1):
        network = CLCNet.load(path, device)
        held_out, trained = (network.metadata.get(key) for key in ("fold", "training_folds"))
        if held_out not in (fold, None) or (isinstance(trained, list) and fold in trained):
            raise ValueError(
                f"{path} was trained on fold {fold}, which it should judge (it held out fold {short(held_out)}); give "
                "the files their own names back, or run train_imagenet_5fold_cv.py"
            )
        networks.append(network)
        runs[path.name] = network.metadata.get("run")  # the released weights, and ours of earlier versions, have none
    split = folder / SPLIT_FILE
    if split.exists():  # the released weights come without
        runs[SPLIT_FILE] = _check_same_folds(split, images)
    (first, run), *_ = runs.items()
    others = ", ".join(name for name, other in runs.items() if other != run)
    if others:
        raise ValueError(
            f"{folder} mixes two trainings: {first} is of another than {others}; run train_imagenet_5fold_cv.py again"
        )
    return networks


def _check_same_folds(path: Path, images: ImageSet) -> str | None:
    """Refuse folds other than those of the training, where its list of them has these very images; gives its run."""
    trained, run = _read_splits(path, images.names)
    moved = np.flatnonzero(trained != images.folds)
    if len(moved) and (trained != UNKNOWN).all():
        index = moved[0]
        raise ValueError(
            f"{images.names[index]} is in fold {images.folds[index] + 1} of {images.root} but was in fold "
            f"{trained[index] + 1} of {NUM_FOLDS} when {path.parent} was trained, as were {len(moved) - 1} others; "
            "evaluate on the folds of the training"
        )
    return run


def _read_splits(path: Path, names: Sequence[str]) -> tuple[Ints, str | None]:
    """The fold, from 0, that each image was in when the weights were trained, or UNKNOWN, and that training's run."""
    check_file(path)
    fold_of, runs = dict.fromkeys(names, UNKNOWN), set()
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            for row in csv.DictReader(iter(lambda: file.readline(_LONGEST_LINE), "")):
                fold = _FOLDS.index(row["fold"])
                if row["file"] in fold_of:  # a stranger's list may be endless
                    fold_of[row["file"]] = fold
                runs.add(row.get("run"))
                if len(runs) > 1:
                    break
        (run,) = runs
    except (KeyError, TypeError, ValueError, csv.Error):
        raise ValueError(f"{path} is not a whole list of folds; run train_imagenet_5fold_cv.py again") from None
    return np.array([fold_of[name] for name in names], dtype=np.int64), run


def flops_of(model: str) -> float:
    """Count a model's multiply-adds, in billions, from its name alone; no weights are needed."""
    from timm.data.config import resolve_model_data_config  # timm takes seconds to import

    from clcnet.classifiers.flops import count_flops
    from clcnet.classifiers.models import create_untrained

    architecture = create_untrained(model)
    config = resolve_model_data_config(architecture)  # type: ignore[no-untyped-call]
    return count_flops(architecture, config["input_size"])
