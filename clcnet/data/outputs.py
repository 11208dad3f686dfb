"""What one classifier said about N images: `Outputs`, in memory and, as .parquet or .csv, on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clcnet.data.checks import UNKNOWN as UNKNOWN
from clcnet.data.checks import are_probs, check_answers, check_sorted_probs, check_targets, map_rows, refuse_rows
from clcnet.data.images import ImageSet, names_of
from clcnet.data.table_files import TableWriter, check_memory, check_table_output, read_rows
from clcnet.files import atomic_path
from clcnet.strangers import is_line, is_number

_MOST_COST = 1e12  # billions of multiply-adds, or milliseconds
_ARRAYS = ("sorted_probs", "classes", "targets", "correct")


@dataclass(frozen=True)
class Record:
    """Where outputs come from: all that a reader of the file would want to know of the model.

    Attributes:
        model: its name, tag included.
        weights: digest of all that determines its answers (`Classifier.key`).
        flops: billions of multiply-adds an image.
        class_names: by class index.
        preprocessing: timm's data configuration.
        milliseconds: an image, where it was measured.
        timed: how that was: device, batch size, which images, and how the model ran.
        device: where it ran when it said this.
        versions: of torch, timm and the like.
        loaded_from: the arguments of `load_classifier`.
    """

    model: str = ""
    weights: str = ""
    flops: float | None = None
    class_names: list[str] | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    milliseconds: float | None = None
    timed: dict[str, Any] = field(default_factory=dict)
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    loaded_from: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def checked(cls, given: Any, source: str) -> Record:
        """Take the fields that are known here; a later version may write others.

        Raises:
            ValueError: it is no record; the message begins with `source`.
        """
        if isinstance(given, dict):
            known = {key.name: given[key.name] for key in dataclasses.fields(cls) if key.name in given}
            if all(_is_sound(name, value) for name, value in known.items()):
                return cls(**known)
        raise ValueError(f"{source}: what it says of the model is damaged; make it again")


def _is_sound(name: str, value: Any) -> bool:
    if name in ("preprocessing", "timed", "versions", "loaded_from"):
        return isinstance(value, dict)
    if name == "class_names":
        return value is None or (isinstance(value, list) and all(map(is_line, value)))
    if name in ("flops", "milliseconds"):
        return value is None or is_number(value, 0, _MOST_COST)
    return is_line(value)


@dataclass(frozen=True)
class Outputs:
    """What one classifier said about N images, of n classes.

    Attributes:
        names: of the images, as tables print them.
        sorted_probs: (N, n) float32, each row in descending order, summing to one.
        classes: (N, n) of the smallest unsigned type, the class behind each probability; None where a table does not
            say (the specification's CSV). Of equal probabilities the lowest class comes first.
        targets: (N,) int64 true classes, UNKNOWN where one is not known; None where none is.
        correct: (N,) bool, whether the top-1 answer is right; None where that is not known.
        record: where they come from.
        scores: how sure of the top-1 answers, (N,) by the name of a confidence, found without looking at these images;
            a rule takes these instead of its own. No file holds them.
    """

    names: list[str]
    sorted_probs: NDArray[np.float32]
    classes: NDArray[np.unsignedinteger[Any]] | None = None
    targets: NDArray[np.int64] | None = None
    correct: NDArray[np.bool_] | None = None
    record: Record = field(default_factory=Record)
    scores: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    @classmethod
    def from_logits(
        cls,
        logits: ArrayLike,
        names: Sequence[str] | None = None,
        targets: ArrayLike | None = None,
        model: str = "",
        flops: float | None = None,
        **record: Any,
    ) -> Outputs:
        """Take anybody's logits (N, n), not timm's alone: any real numbers, -inf for a class that is impossible.

        `record` takes further fields of `Record`; for the rest see `from_probs`.
        """
        rows = _table(np.asarray(logits, dtype=np.float64), "logits")
        top = rows.max(axis=1, keepdims=True)
        refuse_rows(~np.isfinite(top[:, 0]), "logits", lambda row: "has no finite largest number")
        powers = np.exp(rows - top)
        probs = powers / powers.sum(axis=1, keepdims=True)
        return cls.from_probs(probs, names, targets, Record(model=model, flops=flops, **record))

    @classmethod
    def from_probs(
        cls,
        probs: ArrayLike,
        names: Sequence[str] | None = None,
        targets: ArrayLike | None = None,
        record: Record | None = None,
    ) -> Outputs:
        """Sort probabilities (N, n) in the order of the classes.

        Args:
            probs: of which each row sums to one.
            names: of the images; "0", "1", ... when left out.
            targets: (N,) true classes, UNKNOWN where one is not known.
            record: where they come from.
        """
        rows = _table(np.asarray(probs, dtype=np.float32), "probs")
        refuse_rows(~are_probs(rows), "probs", lambda row: "is no row of probabilities; give softmax outputs")
        names = [str(index) for index in range(len(rows))] if names is None else list(names)
        known = None if targets is None else np.asarray(targets, dtype=np.int64)
        if len(names) != len(rows) or (known is not None and known.shape != (len(rows),)):
            shape = None if known is None else known.shape
            raise ValueError(f"{len(rows)} rows, {len(names)} names and targets {shape}: give one of each a row")
        if known is not None:
            check_targets(known, rows.shape[1], "targets")
        sorted_probs, classes = sort_probs(rows)
        correct = None if known is None or (known == UNKNOWN).any() else classes[:, 0] == known
        return cls(names, sorted_probs, classes, known, correct, record or Record())

    @classmethod
    def load(cls, path: Path | str) -> Outputs:
        """Read outputs from CSV or Parquet and check every row.

        Raises:
            OSError: the file is missing or cannot be read, or it would not fit into the memory that is free.
            ValueError: it holds no outputs; the message names the file and the row.
        """
        source = str(path)
        rows = read_rows(Path(path))
        check_sorted_probs(rows.sorted_probs, source)
        check_answers(rows.correct, rows.classes, rows.targets, rows.sorted_probs.shape[1], source)
        targets = None if rows.targets is None or (rows.targets == UNKNOWN).all() else rows.targets
        correct = None if (rows.correct == UNKNOWN).any() else rows.correct.astype(bool)
        record = Record.checked(rows.record, source)
        return cls(rows.names, rows.sorted_probs, rows.classes, targets, correct, record)

    def save(self, path: Path | str) -> None:
        """Write .parquet, or .csv without classes, targets and record; only a finished file replaces another."""
        if not len(self):
            raise ValueError(f"there are no outputs to write to {path}")
        with atomic_path(check_table_output(path)) as temporary, TableWriter(temporary) as writer:
            writer.write(self)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int:
        """n."""
        return int(self.sorted_probs.shape[1])

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) the answered classes; ValueError where a table does not say which class a probability belongs to."""
        return self._classes()[:, 0].astype(np.int64)

    @property
    def probs(self) -> NDArray[np.float32]:
        """(N, n) in the order of the classes, made anew at each call; raises as `labels` does."""
        probs = np.empty_like(self.sorted_probs)
        np.put_along_axis(probs, self._classes().astype(np.int64), self.sorted_probs, axis=1)
        return probs

    def _classes(self) -> NDArray[np.unsignedinteger[Any]]:
        if self.classes is None:
            raise ValueError(
                f"the outputs of {self.record.model or 'this model'} do not say which class a probability belongs to; "
                "make them again as .parquet"
            )
        return self.classes

    @property
    def accuracy(self) -> float:
        """Top-1 in percent; ValueError where it is not known which answers are right."""
        if self.correct is None:
            raise ValueError(f"the outputs of {self.record.model or 'this model'} do not say which answers are right")
        return 100 * float(self.correct.mean())

    def subset(self, rows: Sequence[int] | NDArray[Any]) -> Outputs:
        """The images at these places, in that order, or those where a mask is True."""
        places = np.asarray(rows)
        places = np.flatnonzero(places) if places.dtype == bool else places
        parts: dict[str, Any] = {
            name: None if (array := getattr(self, name)) is None else array[places] for name in _ARRAYS
        }
        parts["scores"] = {name: score[places] for name, score in self.scores.items()}
        return dataclasses.replace(self, names=[self.names[place] for place in places.tolist()], **parts)


def _table(rows: NDArray[Any], source: str) -> NDArray[Any]:
    if rows.ndim != 2 or rows.shape[1] < 2:
        raise ValueError(f"{source} have shape {rows.shape}; expected (images, classes) of at least 2 classes")
    return rows


def sort_probs(probs: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.unsignedinteger[Any]]]:
    """Sort each row in descending order; of equal probabilities the lowest class comes first.

    One integer holds a probability and its class: the bits of floats that are not negative rise as they do, and
    integers of 64 bits sort several times as fast as floats with an argsort.

    Args:
        probs: (N, n), none negative, none NaN.
    """
    sorted_probs = np.empty(probs.shape, np.float32)
    places = np.arange(probs.shape[1], dtype=np.uint64)
    classes = np.empty(probs.shape, np.min_scalar_type(len(places) - 1))

    def sort(rows: slice) -> None:
        chunk = np.add(probs[rows], 0, dtype=np.float32, order="C", casting="same_kind")  # + 0 makes -0 a 0
        keys = (~chunk.view(np.uint32)).astype(np.uint64) << np.uint64(32) | places
        keys.sort(axis=1)
        sorted_probs[rows] = (~(keys >> np.uint64(32)).astype(np.uint32)).view(np.float32)
        classes[rows] = keys.astype(np.uint32)

    map_rows(sort, len(probs))
    return sorted_probs, classes


def load_labelled(*paths: Path | str) -> list[Outputs]:
    """Read tables of the same number of classes that say which answers are right; see `Outputs.load`."""
    check_memory([Path(path) for path in paths])
    tables = [Outputs.load(path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if table.correct is None:
            raise ValueError(f"table {path} does not say which answers are right; make it from images of known classes")
        if table.num_classes != tables[0].num_classes:
            raise ValueError(
                f"{path} has {table.num_classes} classes but {paths[0]} has {tables[0].num_classes}; "
                "give tables of models with the same classes"
            )
    return tables


def concatenated(tables: Sequence[Outputs], paths: Sequence[Path | str]) -> tuple[Outputs, NDArray[np.int64]]:
    """All rows of labelled tables from files, none of which may be there twice.

    Returns:
        The outputs, and source (N,): the position of the table that a row came from.
    """
    for position, path in enumerate(paths):
        if Path(path).resolve() in [Path(earlier).resolve() for earlier in paths[:position]]:
            raise ValueError(f"table {path} is given twice; name each table once")
    source = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    if len(tables) == 1:
        return tables[0], source
    parts: dict[str, Any] = {}
    for name in _ARRAYS:
        arrays = [getattr(table, name) for table in tables]
        parts[name] = None if any(array is None for array in arrays) else np.concatenate(arrays)
    return Outputs([name for table in tables for name in table.names], **parts), source


def match_rows(
    outputs: Outputs, images: ImageSet, called: str = "the table", source: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Find the image of every row, by its name in tables, by bare name, or by path: (N,) indices into `images`.

    Args:
        outputs: of one or several tables read together.
        images: the data set.
        called: what to call the table in messages.
        source: (N,) which table a row came from, where there are several.

    Raises:
        ValueError: a row names no image, or more than one, or two rows of one table name the same image.
    """
    places: dict[str, list[int]] = {}
    for index in range(len(images)):
        for name in names_of(images, index):
            places.setdefault(name, []).append(index)
    places |= {name: [index] for index, name in enumerate(images.names)}  # an image's own name goes first
    names = outputs.names
    found = [places.get(name) or places.get(name.replace("\\", "/"), []) for name in names]
    counts = np.array([len(indices) for indices in found])
    refuse_rows(counts == 0, called, lambda row: f"names {names[row]!r}, which is not in {images.root}")
    words = "names {!r}, which may be {} or {}; make the table again"
    refuse_rows(
        counts > 1, called, lambda row: words.format(names[row], *(images.files[index] for index in found[row][:2]))
    )
    matched = np.array([indices[0] for indices in found], dtype=np.int64)
    seen: dict[tuple[int, int], int] = {}
    tables = np.zeros_like(matched) if source is None else source
    for row, key in enumerate(zip(tables.tolist(), matched.tolist(), strict=True)):
        if (earlier := seen.setdefault(key, row)) != row:
            raise ValueError(f"{called}: rows {earlier + 1} and {row + 1} both name {names[row]!r}; keep one of them")
    return matched
