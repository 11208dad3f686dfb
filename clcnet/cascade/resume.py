"""The rows of a run that is not finished yet, kept so that `--resume` goes on where a killed run stopped.

A folder `<output>.partial` beside the output holds `arguments.json`, all that determines the rows (a run with other
arguments must not go on with these), and, for a table,

- `rows`: one fixed-size record an image, in order, so that the file's size alone says how far the run came, and a
  record cut short by a kill is told from a whole one;
- `unreadable.jsonl`: index and reason of every image left out, written before the image's record;

or, for the answers of a cascade,

- `outcomes.jsonl`: what came of each batch, one line each, in the order of the schedule; a line cut short does not
  count.

What determines the rows is listed by `run_arguments`; the processes of one torchrun must agree in it too.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from clcnet import distributed
from clcnet.cascade.schedule import Outcome, Task
from clcnet.classifiers.classifier import Classifier
from clcnet.data.images import ImageSet
from clcnet.files import atomic_path, naming_full_disks

WRONG, RIGHT, LEFT_OUT = 0, 1, 2
_ROWS_AT_ONCE = 1024
_ARGUMENTS, _ROWS, _UNREADABLE, _OUTCOMES = _FILES = "arguments.json", "rows", "unreadable.jsonl", "outcomes.jsonl"
_TEMPORARY = re.compile(r"\.(arguments|unreadable)\.\w+\.partial\.jsonl?")  # of `atomic_path`, left by a kill

Arguments = dict[str, str | int | bool]


def partial_folder(output: Path | str) -> Path:
    """Where an interrupted run keeps its rows."""
    return Path(f"{output}.partial")


def run_arguments(
    classifiers: Sequence[Classifier], images: ImageSet, targets: np.ndarray, batch_size: int
) -> Arguments:
    """All that a model's answer to an image may depend on.

    Apart from the number of a CPU's threads, which may sway the last bit: a run may be resumed with other cores.
    """
    listing = hashlib.blake2b(targets.tobytes(), digest_size=16)
    for name in images.names:
        listing.update(name.encode("utf-8", "surrogateescape") + b"\0")
    first = classifiers[0]
    return {
        "model": " and ".join(classifier.name for classifier in classifiers),
        "precision": str(first.amp or torch.float32).removeprefix("torch."),
        "weights and preprocessing": " and ".join(classifier.key for classifier in classifiers),
        "number of images": len(images),
        "images and labels": listing.hexdigest(),
        "batch size": batch_size,
        "device": first.device.type,
        "channels last": first.channels_last,
        "compile": first.compile,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def check_processes_agree(arguments: Arguments) -> None:
    """Refuse to share work among processes of one torchrun that were given different work.

    Raises:
        ValueError: in the main process, naming the first difference.
    """
    gathered = distributed.gather(arguments) or []
    for rank, theirs in enumerate(gathered):
        for name, value in arguments.items():
            if theirs[name] != value:
                raise ValueError(
                    f"process {rank} has {name} {theirs[name]} and process 0 has {value}; give every machine the same "
                    "images and model"
                )


class UnfinishedRun:
    """What an interrupted run left beside its output, and the arguments that it had.

    Args:
        folder: where it is kept.
        arguments: all that determines the rows, as JSON takes it.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, Any]) -> None:
        self.folder = folder
        self.arguments = dict(arguments)

    @property
    def _arguments_file(self) -> Path:
        return self.folder / _ARGUMENTS

    def exists(self) -> bool:
        """Whether an earlier run left rows.

        Raises:
            FileExistsError: what stands there is no run's; its files must be neither deleted nor written to.
        """
        if not os.path.lexists(self.folder):
            return False
        if self.folder.is_symlink() or not self.folder.is_dir() or not self._is_ours():
            raise FileExistsError(
                f"{self.folder} is not what an interrupted run left; delete or rename it, or choose another output"
            )
        return self._arguments_file.exists()

    def _is_ours(self) -> bool:
        """Whether the folder holds a run's own files and no others; those that begin or end one may be missing."""
        files = [entry for entry in self.folder.iterdir() if not _TEMPORARY.fullmatch(entry.name)]
        return all(file.name in _FILES and file.is_file() and not file.is_symlink() for file in files) and (
            not files or self._arguments_file in files
        )

    def start(self) -> None:
        """Begin with no rows; those of an earlier run are discarded."""
        self.exists()  # refuses what is not ours
        if self.folder.exists():
            self.remove()
        self.folder.mkdir(parents=True)
        with atomic_path(self._arguments_file) as temporary:  # first: its presence says whose the folder is
            temporary.write_text(json.dumps(self.arguments, indent=1), encoding="utf-8")
        self._make_files()

    def _make_files(self) -> None:
        """Make the files that rows are appended to, where they are missing."""

    def check_arguments(self) -> None:
        """Refuse to go on with the rows of a run that had other arguments.

        Raises:
            ValueError: it had; the message names the first that differs.
        """
        try:
            earlier = json.loads(self._arguments_file.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(
                f"{self._arguments_file} is damaged; delete {self.folder} and run without --resume"
            ) from None
        for name in [*self.arguments, *earlier]:
            before, now = earlier.get(name), self.arguments.get(name)
            if before != now:
                raise ValueError(
                    f"--resume: the interrupted run in {self.folder} had {name} {before}, this one has {now}; give the "
                    "same arguments, or leave out --resume to start again"
                )

    def remove(self) -> None:
        """Delete the folder, once the output stands in its place."""
        for file in sorted(self.folder.iterdir(), key=lambda file: file == self._arguments_file):  # it goes last
            file.unlink()
        self.folder.rmdir()


class UnfinishedTable(UnfinishedRun):
    """Rows of a table in the making, one record an image, readable or not.

    Args:
        folder: where they are kept.
        arguments: what determines the rows, as JSON takes it.
        num_classes: probabilities a row.

    Attributes:
        num_images: how many images have their record.
        reasons: index of an image left out -> why.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, Any], num_classes: int) -> None:
        super().__init__(folder, arguments)
        self.record = np.dtype([("status", "u1"), ("sorted_probs", "<f4", (num_classes,))])
        self.num_images = 0
        self.reasons: dict[int, str] = {}

    @property
    def _rows_file(self) -> Path:
        return self.folder / _ROWS

    @property
    def _unreadable_file(self) -> Path:
        return self.folder / _UNREADABLE

    def _make_files(self) -> None:
        self._rows_file.touch()
        self._unreadable_file.touch()

    def resume(self, batch_size: int, num_images: int) -> None:
        """Go on after the last whole batch of an earlier run.

        Whole batches, because a model's answer to an image may depend, in its last bit, on the batch it stands in.

        Args:
            batch_size: images a batch.
            num_images: images in all.

        Raises:
            ValueError: that run had other arguments.
        """
        self.check_arguments()
        self._make_files()  # a kill may have come before they were made
        records = min(self._rows_file.stat().st_size // self.record.itemsize, num_images)
        self.num_images = records if records == num_images else records - records % batch_size
        with open(self._rows_file, "rb+") as rows:
            rows.truncate(self.num_images * self.record.itemsize)
        self._restore_reasons()

    def _restore_reasons(self) -> None:
        lines = self._unreadable_file.read_text(encoding="utf-8").split("\n")[:-1]  # the last may have been cut short
        reasons = dict(json.loads(line) for line in lines)
        self.reasons = {index: reason for index, reason in reasons.items() if index < self.num_images}
        with atomic_path(self._unreadable_file) as temporary:
            temporary.write_text("".join(map(_line, self.reasons.items())), encoding="utf-8")

    def append(self, status: np.ndarray, sorted_probs: np.ndarray, reasons: Mapping[int, str]) -> None:
        """Keep the records of the next batch.

        Args:
            status: (B,) WRONG, RIGHT or LEFT_OUT, one for every image of the batch.
            sorted_probs: (B, n) float32; what stands in the row of an image left out does not matter.
            reasons: index and reason of the images left out.

        Raises:
            OSError: the disk is full; what was kept before can be resumed.
        """
        records = np.zeros(len(status), self.record)
        records["status"], records["sorted_probs"] = status, sorted_probs
        try:
            if reasons:
                with open(self._unreadable_file, "a", encoding="utf-8") as file:
                    file.write("".join(map(_line, reasons.items())))
            with open(self._rows_file, "ab") as file:
                file.write(records.tobytes())
        except OSError as error:
            raise OSError(
                f"{self.folder} cannot be written ({error.strerror}); mend that and go on with --resume"
            ) from error
        self.num_images += len(status)
        self.reasons.update(reasons)

    def count(self) -> tuple[int, int]:
        """Return how many images were answered, and how many of them rightly."""
        answered = right = 0
        for _, status, _ in self.chunks():
            answered += int((status != LEFT_OUT).sum())
            right += int((status == RIGHT).sum())
        return answered, right

    def chunks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """All records in order, a thousand at a time: the first index, the status, the sorted probabilities."""
        with open(self._rows_file, "rb") as file:
            for start in range(0, self.num_images, _ROWS_AT_ONCE):
                records = np.fromfile(file, self.record, count=min(_ROWS_AT_ONCE, self.num_images - start))
                yield start, records["status"], records["sorted_probs"]


class UnfinishedAnswers(UnfinishedRun):
    """The outcomes of a cascade's batches so far, in the order of its schedule."""

    @property
    def _outcomes_file(self) -> Path:
        return self.folder / _OUTCOMES

    def _make_files(self) -> None:
        self._outcomes_file.touch()

    def resume(self) -> list[Outcome]:
        """Read the outcomes of an earlier run and cut off what a kill left half-written.

        Raises:
            ValueError: that run had other arguments, or what it left is damaged.
        """
        self.check_arguments()
        self._make_files()  # a kill may have come before they were made
        text = self._outcomes_file.read_bytes()
        whole = text.rfind(b"\n") + 1
        with open(self._outcomes_file, "rb+") as file:
            file.truncate(whole)
        try:
            return [_read_outcome(line) for line in text[:whole].splitlines()]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{self._outcomes_file} is damaged; delete {self.folder} and run without --resume"
            ) from None

    def append(self, outcome: Outcome) -> None:
        """Keep the outcome of the next batch."""
        fields = {
            "stage": outcome.task.stage,
            "images": outcome.task.indices,
            "answered": outcome.answered.tolist(),
            "top1": outcome.top1.tolist(),
            "confidence": outcome.confidence.tolist(),  # as float64, which JSON reads back as the same float32
            "unreadable": outcome.unreadable,
        }
        full = naming_full_disks(self._outcomes_file, advice="make room and go on with --resume")
        with full, open(self._outcomes_file, "ab") as file:
            file.write(json.dumps(fields).encode() + b"\n")


def _read_outcome(line: bytes) -> Outcome:
    fields = json.loads(line)
    return Outcome(
        task=Task(fields["stage"], tuple(fields["images"])),
        answered=np.array(fields["answered"], np.int64),
        top1=np.array(fields["top1"], np.int64),
        confidence=np.array(fields["confidence"], np.float32),
        unreadable=tuple((index, reason) for index, reason in fields["unreadable"]),
    )


def _line(reason: tuple[int, str]) -> str:
    return json.dumps(reason) + "\n"
