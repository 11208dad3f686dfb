"""The store: what a model said of an image is computed once and kept once, for steps 3, 4 and 5.

Answers are kept by model (a digest of all that determines them) and by image (a digest of its place, size and times of
change), so the commands need not agree in which images they run over. A model's folder holds segments, one from each
run that added to it: files of records of one size, appended batch by batch. The last record of a batch says so, and
what a killed run left behind the last whole batch is as if it had never been. No locks: a run appends to a segment of
its own, and readers take what is whole.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clcnet.data.checks import are_probs
from clcnet.files import atomic_path, naming_full_disks
from clcnet.strangers import check_file, parse_json, read_bytes

KEY_BYTES = 16  # of an image
UNREADABLE, READ = 0, 1  # status; READ + k, that it was read and what remark k says
Keys = NDArray[np.bytes_]  # (N,) of KEY_BYTES

_SUFFIX = ".answers"
_RECORDS_A_READ = 1024
_LONGEST_BATCH = 2**20  # records; in a file of zeros, which takes no room on a disk, none would ever end
_LARGEST_ABOUT = 2**16  # bytes


@dataclass
class _Segment:
    """A file of records, of which the keys and status are in memory."""

    path: Path
    keys: Keys
    status: NDArray[np.uint8]


class Store:
    """The answers of one model, by image; to be closed.

    Args:
        folder: of all models' answers.
        model_key: digest of all that determines this model's answers.
        num_classes: C.
    """

    def __init__(self, folder: Path | str, model_key: str, num_classes: int) -> None:
        self.folder = Path(folder) / model_key[:32]
        self.record = np.dtype(
            [("key", f"S{KEY_BYTES}"), ("status", "u1"), ("ends_batch", "u1"), ("probs", "<f4", (num_classes,))]
        )
        paths = sorted(self.folder.glob(f"*{_SUFFIX}")) if self.folder.is_dir() else []
        self._segments = [self._open(path) for path in paths]
        self._own: FileIO | None = None
        self.about = self._read_about()

    def _open(self, path: Path) -> _Segment:
        """The whole batches of a segment."""
        check_file(path)
        keys, status, whole, count = [np.empty(0, f"S{KEY_BYTES}")], [np.empty(0, np.uint8)], 0, 0
        with open(path, "rb") as file:
            while len(records := np.fromfile(file, self.record, _RECORDS_A_READ)):
                keys.append(records["key"].copy())
                status.append(records["status"].copy())
                ends = np.flatnonzero(records["ends_batch"])
                whole = count + int(ends[-1]) + 1 if len(ends) else whole
                count += len(records)
                if count - whole > _LONGEST_BATCH:
                    break
        return _Segment(path, np.concatenate(keys)[:whole], np.concatenate(status)[:whole])

    @property
    def _starts(self) -> NDArray[np.int64]:
        """Place of each segment's first record, and behind the last one."""
        return np.cumsum([0, *(len(segment.keys) for segment in self._segments)])

    def find(self, keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Look images up.

        Returns:
            places: (N,) where each image's answer is kept, -1 where there is none.
            status: (N,) what was kept with it; UNREADABLE may be tried again; -1 of an image that was never seen.
        """
        if not self._starts[-1]:
            return np.full(len(keys), -1), np.full(len(keys), -1)
        known = np.concatenate([segment.keys for segment in self._segments])
        status = np.concatenate([segment.status for segment in self._segments]).astype(np.int64)
        order = np.lexsort((np.arange(len(known)), status == UNREADABLE, known))  # of several, the first that was read
        at = np.searchsorted(known[order], keys)
        candidates = order[np.minimum(at, len(known) - 1)]
        found = np.where(known[candidates] == keys, status[candidates], -1)
        return np.where(found >= READ, candidates, -1), found

    def append(self, keys: Keys, status: NDArray[np.uint8], probs: NDArray[np.float32]) -> NDArray[np.int64]:
        """Keep a batch.

        Args:
            keys: (B,).
            status: (B,) UNREADABLE, READ or above.
            probs: (B, C); what stands in the row of an unreadable image does not matter.

        Returns:
            (B,) the places of its answers.
        """
        records = np.zeros(len(keys), self.record)
        records["key"], records["status"], records["probs"] = keys, status, probs
        records["ends_batch"][-1:] = 1
        with naming_full_disks(self.folder, advice="make room and run again; what is kept there counts"):
            own, left = self._own or self._begin(), memoryview(records.tobytes())
            while left:
                left = left[own.write(left) :]
        first = int(self._starts[-1])
        segment = self._segments[-1]
        segment.keys, segment.status = np.append(segment.keys, records["key"]), np.append(segment.status, status)
        return np.arange(first, first + len(records))

    def _begin(self) -> FileIO:
        path = self.folder / f"{secrets.token_hex(8)}{_SUFFIX}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._own = open(path, "xb", buffering=0)  # on a full disk a buffer would fail again when it is closed
        except OSError as error:
            raise OSError(f"store {self.folder} cannot be written ({error.strerror}); give another --store") from error
        self._segments.append(_Segment(path, np.empty(0, f"S{KEY_BYTES}"), np.empty(0, np.uint8)))
        return self._own

    def probs(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """Answers (M, C) kept at these places, in the model's own order of classes."""
        probs = np.empty((len(places), *self.record["probs"].shape), np.float32)
        starts = self._starts
        segment_of = np.searchsorted(starts, places, side="right") - 1
        for number in np.unique(segment_of):
            inside = np.flatnonzero(segment_of == number)
            probs[inside] = self._read(self._segments[number].path, places[inside] - starts[number])
        if not are_probs(probs).all():
            raise ValueError(f"store {self.folder} holds what are no probabilities; delete this folder and run again")
        return probs

    def _read(self, path: Path, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The probabilities of some records of a segment, each run of neighbours at once."""
        pieces = []
        with open(path, "rb") as file:
            for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
                file.seek(int(run[0]) * self.record.itemsize)
                pieces.append(np.fromfile(file, self.record, len(run))["probs"])
        return np.concatenate(pieces)

    def remember(self, **facts: Any) -> None:
        """Keep facts about the model beside its answers."""
        self.about |= facts
        with atomic_path(self.folder / "about.json") as temporary:
            temporary.write_text(json.dumps(self.about, indent=1), encoding="utf-8")

    def _read_about(self) -> dict[str, Any]:
        try:
            about = parse_json(read_bytes(self.folder / "about.json", _LARGEST_ABOUT))
        except (OSError, ValueError):  # none yet, or broken: what it held is measured again
            return {}
        return about if isinstance(about, dict) else {}

    def close(self) -> None:
        """Have what was appended on the disk."""
        if self._own is not None:
            os.fsync(self._own.fileno())
            self._own.close()
            self._own = None
