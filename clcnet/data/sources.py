"""Images that are no files of their own: in tar files, and in the data sets that timm knows by name.

A model's answers are kept by image, and a later model sees only some of the images, so all of them must be there in one
fixed order and be had in any other. Where timm's reader gives no more than a stream, the stream is copied to the disk
first; shards of WebDataset are opened in place. Nothing is decoded here: what is broken is found, and named, later.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import json
import os
import tarfile
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clcnet.data.checks import UNKNOWN
from clcnet.data.labels import natural_key, plain
from clcnet.files import naming_full_disks

_NEEDS = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow_datasets", "torch": ""}
_WDS_IMAGES = "jpg;jpeg;png;webp"
_LARGEST_SIDECAR = 2**20  # bytes of a .cls or .json beside an image


@dataclass(frozen=True)
class DataSetOptions:
    """What the name of a data set leaves open; as timm's flags of these names.

    Attributes:
        split: which part of it; the only one when left out.
        input_key: the column, or extension, of the images.
        target_key: likewise, of the classes.
        data_dir: where it lies, or is kept once it was downloaded.
    """

    split: str | None = None
    input_key: str | None = None
    target_key: str | None = None
    data_dir: str | None = None


class Source(Protocol):
    """Opens images by the names that `ImageSet.files` gives them, from any process."""

    def open(self, file: str) -> str | BinaryIO | Image.Image: ...
    def key(self, file: str) -> bytes:
        """What tells the image from every other, and from itself once it was changed."""


@dataclass(frozen=True)
class DataSet:
    """A data set, in its own order.

    Attributes:
        files: N names, all different.
        targets: (N,) index into `class_names`; -1 where the class is not known.
        class_names: all its classes.
        source: opens them.
        classes_by: "data set" where it names its classes itself, "labels" where they are what stands beside images.
        passed_over: what was left out -> why.
        notes: what the user should know, a line each.
    """

    files: list[str]
    targets: NDArray[np.int64]
    class_names: list[str]
    source: Source
    classes_by: str = "labels"
    passed_over: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def is_data_set(name: Path | str) -> bool:
    """Whether this is the name of a data set as timm writes it, and no folder here is called so."""
    prefix, _, rest = str(name).partition("/")
    return prefix.lower() in _NEEDS and bool(rest) and not os.path.exists(name)


def open_data_set(name: str, options: DataSetOptions) -> DataSet:
    """Open a data set by timm's name for it.

    Args:
        name: hfds/NAME, hfids/NAME (streaming), tfds/NAME, wds/PATH (a folder of tar files, one of them, or a pattern),
            or torch/NAME.
        options: what the name leaves open.

    Raises:
        OSError, ValueError: a library is missing, or the data set is; the message says what timm or the library said.
    """
    prefix, _, rest = name.partition("/")
    prefix = prefix.lower()
    if _NEEDS[prefix]:
        try:
            importlib.import_module(_NEEDS[prefix])
        except ImportError as error:
            raise ValueError(
                f"{name} needs the library {_NEEDS[prefix]} ({error}); pip install {_NEEDS[prefix]}"
            ) from None
    kinds: dict[str, Callable[[str, DataSetOptions], DataSet]] = {
        "hfds": _hugging_face,
        "hfids": _stream,
        "tfds": _stream,
        "wds": _web_data_set,
        "torch": _torchvision,
    }
    try:
        found = kinds[prefix](f"{prefix}/{rest}", options)
    except Exception as error:  # these libraries raise anything, and most of it is about the name or a flag
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{name} cannot be read ({reason})") from error
    if not found.files:
        raise ValueError(f"{name} holds no images")
    return found


def file_state(path: str) -> bytes:
    """Path, size and times of a file, as bytes that change when it is written to."""
    try:
        status = os.stat(path)
        state = status.st_size, status.st_mtime_ns, status.st_ctime_ns
    except OSError:  # a link to nothing, or gone since it was listed: it will be left out as unreadable
        state = -1, -1, -1
    return b"%b\0%d\0%d\0%d" % (os.fsencode(path), *state)


# ---------------------------------------------------------------- tar files


class Packed:
    """Images that lie in a few large files.

    Args:
        paths: of the large files.
        places: by image, the number of its file, and where its bytes begin and end.
        digests: by image, of its content, where the files are of this run alone.
    """

    def __init__(
        self, paths: list[str], places: dict[str, tuple[int, int, int]], digests: dict[str, bytes] | None = None
    ) -> None:
        self.paths, self.places, self._digests = paths, places, digests
        self._states = [file_state(os.path.abspath(os.path.realpath(path))) for path in paths]

    def open(self, file: str) -> BinaryIO:
        number, start, end = self.places[file]
        with open(self.paths[number], "rb") as packed:
            packed.seek(start)
            return io.BytesIO(packed.read(end - start))

    def key(self, file: str) -> bytes:
        if self._digests:
            return self._digests[file]
        number, start, _ = self.places[file]
        return b"%b\0%d" % (self._states[number], start)


def _members(path: Path | str) -> Iterator[tuple[str, int, int]]:
    """The files of a tar file: name, and where its bytes begin and end. Nothing is unpacked; links are left out."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    yield member.name.removeprefix("./"), member.offset_data, member.offset_data + member.size
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no tar file, or a compressed one ({error}); unpack it first") from None


def open_tars(paths: list[Path]) -> Packed:
    """All files in tar files, by their names there."""
    places = {name: (number, *ends) for number, path in enumerate(paths) for name, *ends in _members(path)}
    return Packed([os.fspath(path) for path in paths], places)  # type: ignore[arg-type]


def _web_data_set(name: str, options: DataSetOptions) -> DataSet:
    """Shards of WebDataset: files of one name and several extensions, one after the other, are a sample."""
    from timm.data.readers.reader_factory import create_reader

    path, split = name.partition("/")[2], options.split
    if not os.path.isdir(path):
        path, split = os.path.split(path)
    elif split is None:
        tars = sorted((entry for entry in os.listdir(path) if entry.endswith(".tar")), key=natural_key)
        split = "::".join(tars)
        if not tars:
            raise FileNotFoundError(f"{path} holds no .tar files")
    reader = create_reader("wds/", root=path or ".", split=split)
    shards = [os.path.join(path, shard) for shard in reader.split_info.filenames]
    target_key = options.target_key or reader.split_info.alt_label
    extensions = (options.input_key or _WDS_IMAGES).split(";")
    samples: dict[tuple[int, str], dict[str, tuple[int, int]]] = {}
    for number, shard in enumerate(shards):
        for member, *ends in _members(shard):
            folder, _, base = member.rpartition("/")
            stem, _, extension = base.partition(".")
            sample = samples.setdefault((number, f"{folder}/{stem}" if folder else stem), {})
            if extension.lower() in sample:
                raise ValueError(f"{shard} holds {member} twice")
            sample[extension.lower()] = (ends[0], ends[1])
    keys = [key for _, key in samples]
    repeated = len(set(keys)) < len(keys)
    places: dict[str, tuple[int, int, int]] = {}
    labels: list[Any] = []
    passed_over = {}
    for (number, key), sample in samples.items():
        file = f"{os.path.splitext(os.path.basename(shards[number]))[0]}/{key}" if repeated else key
        extension = next((each for each in extensions if each in sample), "")
        if not extension:
            passed_over[file] = f"no {' or '.join(extensions)} in the sample, only {' '.join(sample)}"
            continue
        places[f"{file}.{extension}"] = (number, *sample[extension])
        labels.append(_sidecar(shards[number], file, sample, target_key))
    files = [*places]
    return _with_labels(files, labels, Packed(shards, places), passed_over=passed_over)


def _sidecar(shard: str, file: str, sample: Mapping[str, tuple[int, int]], target_key: str | None) -> int | None:
    """The class that stands beside an image in its sample; None where none does."""
    start, end = sample.get("json" if target_key else "cls", (0, 0))
    if start == end:
        return None
    with open(shard, "rb") as tar:
        tar.seek(start)
        text = tar.read(min(end - start, _LARGEST_SIDECAR))
    try:
        return int(json.loads(text)[target_key]) if target_key else int(text)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{shard}: the class of {file} cannot be read: {type(error).__name__}: {error}") from None


def _with_labels(
    files: list[str],
    labels: list[Any],
    source: Source,
    class_names: Iterable[str] = (),
    passed_over: Mapping[str, str] | None = None,
    notes: Iterable[str] = (),
) -> DataSet:
    """A data set of labels that are numbers, of classes with names or without, or names; None where there is none."""
    names, classes_by = [plain(name) for name in class_names], "data set"
    if any(isinstance(label, str) for label in labels):
        labels = [None if label is None else plain(str(label)) for label in labels]
        names, classes_by = sorted({label for label in labels if label is not None}, key=natural_key), "labels"
        place = {name: number for number, name in enumerate(names)}
        labels = [place.get(label) for label in labels]
    targets = np.array([UNKNOWN if label is None else max(int(label), UNKNOWN) for label in labels], dtype=np.int64)
    names = names or [str(number) for number in range(int(targets.max(initial=UNKNOWN)) + 1)]
    return DataSet(files, targets, names, source, classes_by, passed_over or {}, [*notes])


# ---------------------------------------------------------------- data sets with an index


class Indexed:
    """Images that a reader gives by their place.

    Args:
        files: their names.
        read: gives an image, or its path, by place; can be sent to another process.
        identity: of the data set, another one once it was changed.
        paths: where the images lie, where they are files.
    """

    def __init__(
        self, files: list[str], read: Callable[[int], Any], identity: str, paths: list[str] | None = None
    ) -> None:
        self._place = {file: place for place, file in enumerate(files)}
        self._read, self._identity, self._paths = read, identity.encode(), paths

    def open(self, file: str) -> str | BinaryIO | Image.Image:
        image: str | BinaryIO | Image.Image = self._read(self._place[file])
        return image

    def key(self, file: str) -> bytes:
        place = self._place[file]
        return b"%b\0%d\0%b" % (self._identity, place, file_state(self._paths[place]) if self._paths else b"")


def _names(paths: list[str | None]) -> list[str]:
    """Names by which a data set knows its images, where all have one of their own; else their numbers."""
    known = [path for path in paths if path]
    if len(set(known)) < len(paths):
        return [f"{number:0{len(str(len(paths)))}d}" for number in range(len(paths))]
    above = os.path.commonpath([os.path.dirname(path) for path in known]) if all(map(os.path.isabs, known)) else ""
    return [Path(os.path.relpath(path, above) if above else path).as_posix() for path in known]


def _only_split(name: str, options: DataSetOptions) -> str:
    import datasets

    splits = [options.split] if options.split else datasets.get_dataset_split_names(name)
    if len(splits) > 1:
        raise ValueError(f"it holds several splits: {', '.join(splits)}; give one of them as --split")
    return str(splits[0])


def _keys(options: DataSetOptions) -> dict[str, str | None]:
    return {"root": options.data_dir, "input_key": options.input_key, "target_key": options.target_key}


def _read_cell(dataset: Any, key: str, place: int) -> str | BinaryIO:
    cell = dataset[place][key]
    return io.BytesIO(cell["bytes"]) if cell["bytes"] else str(cell["path"])


def _hugging_face(name: str, options: DataSetOptions) -> DataSet:
    from timm.data.readers.reader_factory import create_reader
    from timm.data.readers.targets import has_field

    split = _only_split(name.partition("/")[2], options)
    reader: Any = create_reader(name, split=split, **_keys(options))
    if not (options.target_key or has_field(reader.dataset.features, reader.label_key)):
        labels, notes = [None] * len(reader), [f"{name} has no column {reader.label_key}, so no image has a class"]
    else:
        labels, notes = list(reader.iter_targets()), []
    cells = reader.dataset.select_columns(reader.image_key).with_format("arrow")
    paths: list[str | None] = []
    for batch in cells.iter(1000):  # which reads no image
        paths += batch[reader.image_key].combine_chunks().field("path").to_pylist()
    files = _names(paths)
    on_disk = [path or "" for path in paths] if all(path and os.path.isabs(path) for path in paths) else None
    read = functools.partial(_read_cell, reader.dataset, reader.image_key)
    source = Indexed(files, read, reader.dataset._fingerprint, on_disk)
    return _with_labels(files, labels, source, reader.class_to_idx, notes=notes)


def _item(items: Any, place: int) -> Any:
    return items[place][0]


def _torchvision(name: str, options: DataSetOptions) -> DataSet:
    from timm.data import create_dataset

    if options.data_dir is None:
        raise ValueError("give --data-dir, the folder where it lies")
    split = options.split or "validation"
    dataset: Any = create_dataset(name, root=options.data_dir, split=split, download=False)
    targets = getattr(dataset, "targets", None)
    if targets is None:
        raise ValueError("torchvision keeps no list of its classes; give the folder of its images instead")
    labels = np.asarray(targets).reshape(len(dataset), -1)[:, 0].tolist()
    classes = [each if isinstance(each, str) else ", ".join(each) for each in getattr(dataset, "classes", ())]
    samples = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None)
    if samples:  # to be opened here, where it is known which formats are opened
        paths = [os.path.abspath(path) for path, _ in samples]
        files = _names([*paths])
        return _with_labels(files, labels, Indexed(files, functools.partial(_item, samples), name, paths), classes)
    files = _names([None] * len(dataset))
    identity = hashlib.blake2b(np.ascontiguousarray(np.asarray(dataset.data))).hexdigest()
    return _with_labels(files, labels, Indexed(files, functools.partial(_item, dataset), identity), classes)


# ---------------------------------------------------------------- streams


def _stream(name: str, options: DataSetOptions) -> DataSet:
    """Copy a stream into one file, which goes when the images do, in the order in which it comes."""
    from timm.data.readers.reader_factory import create_reader

    if name.startswith("hfids/"):
        split = _only_split(name.partition("/")[2], options)
        # timm wants a number of samples, for training; all are read
        reader: Any = create_reader(name, split=split, num_samples=1, **_keys(options))
        items = _undecoded(reader, name, options)
    else:
        if options.split is None:
            raise ValueError("give --split")
        reader = create_reader(name, split=options.split, **_keys(options))
        items = ((None, _png(image), target) for image, target in reader)
    handle, spool = tempfile.mkstemp(suffix=".images")
    names: list[str | None] = []
    labels: list[Any] = []
    ends, digests = [0], []
    with naming_full_disks(Path(spool)), os.fdopen(handle, "wb") as file:
        for path, content, label in items:
            file.write(content)
            names.append(path)
            labels.append(label)
            ends.append(file.tell())
            digests.append(hashlib.blake2b(content, digest_size=16).digest())
    files = _names(names)
    places = {name: (0, start, end) for name, start, end in zip(files, ends[:-1], ends[1:], strict=True)}
    source = Packed([spool], places, dict(zip(files, digests, strict=True)))
    weakref.finalize(source, os.unlink, spool)
    note = f"{name}: {len(files)} images, {ends[-1] / 1e6:.1f} MB, were copied from the stream to {spool} for this run"
    return _with_labels(files, labels, source, reader.class_to_idx, notes=[note])


def _undecoded(reader: Any, name: str, options: DataSetOptions) -> Iterator[tuple[str | None, bytes, Any]]:
    import datasets
    import fsspec
    from timm.data.readers.targets import get_field, has_field

    stream = reader.builder.as_streaming_dataset(split=reader.split)
    for sample in stream.cast_column(reader.input_key, datasets.Image(decode=False)):
        cell, content = sample[reader.input_key], sample[reader.input_key]["bytes"]
        if not content:
            with fsspec.open(cell["path"], "rb") as file:
                content = file.read()
        known = options.target_key or has_field(sample, reader.target_key)
        yield cell["path"], content, get_field(sample, reader.target_key) if known else None


def _png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG", compress_level=1)
    return sink.getvalue()
