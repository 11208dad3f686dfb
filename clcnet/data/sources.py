"""Images that are no files of a folder: in tar files, and in the data sets that timm knows by name.

A model's answers are kept by image, and a later model sees only some of the images, so all of them must be there in one
fixed order and be had in any other. Where timm's reader gives no more than a stream, the stream is copied to the disk
first; tar files and shards of WebDataset are opened in place. Nothing is decoded here: what is broken is found, and
named, later.

A new source is a function that gives a `Source`, and its line in `_DATA_SETS`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import io
import json
import logging
import os
import tarfile
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clcnet import cli
from clcnet.data.labels import natural_key, number_classes
from clcnet.files import naming_full_disks

_WDS_IMAGES = "jpg;jpeg;png;webp"
_LARGEST_IMAGE = 2**30  # bytes, in a tar file, from which it is read whole
_LARGEST_SIDECAR = 2**20  # bytes of a .cls or .json beside an image
Opened = str | BinaryIO | Image.Image  # what PIL opens, or has opened


@dataclass(frozen=True)
class DataSetOptions:
    """What the name of a data set leaves open; as timm's flags of these names.

    Attributes:
        split: which part of it; the only one when left out.
        input_key: the column, or extensions, of the images.
        target_key: likewise, of the classes.
        data_dir: where it lies, or is kept once it was downloaded.
    """

    split: str | None = None
    input_key: str | None = None
    target_key: str | None = None
    data_dir: str | None = None


@dataclass(eq=False)
class Source:
    """Images that are no files of their own, in an order of their own.

    Attributes:
        items: by the name that `ImageSet.files` gives an image: what `read` takes, and a key, which tells it from every
            other image, and from itself once it was changed.
        read: opens an item; can be sent to another process.
        labels, class_names: the classes of a data set's images, see `number_classes`.
        passed_over: what was left out -> why.
        notes: what the user should know, a line each.
    """

    items: Mapping[str, tuple[Any, bytes]]
    read: Callable[[Any], Opened]
    labels: Sequence[Any] = ()
    class_names: Sequence[str] = ()
    passed_over: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def open(self, file: str) -> Opened:
        """One image."""
        return self.read(self.items[file][0])


def is_data_set(name: Path | str) -> bool:
    """Whether this is the name of a data set as timm writes it, and no folder here is called so."""
    prefix, _, rest = str(name).partition("/")
    return prefix.lower() in _DATA_SETS and bool(rest) and not os.path.exists(name)


def folder_or_name(text: str) -> str | Path:
    """Read where images are: a path, or the name of one of timm's data sets."""
    return text if is_data_set(text) else cli.path(text)


def add_image_arguments(
    parser: argparse.ArgumentParser, flag: str, help: str, labels: bool = False, **given: Any
) -> Any:
    """Add the flags that say which images and which classes these are, those of timm's data sets named as in timm.

    Args:
        flag, help, given: of the one that says where the images lie.
        labels: whether a file of labels may say what a flat folder does not.

    Returns:
        The group of the images, for more flags.
    """
    group = parser.add_argument_group("images")
    group.add_argument(flag, type=folder_or_name, metavar="FOLDER", help=help, **given)
    if labels:
        rows = "for a flat folder: CSV file,label; or ILSVRC2012's ground truth"
        group.add_argument("--labels", type=Path, metavar="FILE", help=rows)
    order = "class folders or names in the models' order, one a line, as in timm"
    group.add_argument("--class-map", type=Path, metavar="FILE", help=order)
    add = parser.add_argument_group("data sets: hfds/NAME, hfids/NAME, wds/PATH, tfds/NAME, torch/NAME").add_argument
    add("--split", metavar="NAME", help="part of it (default: the only one; of torch/, validation)")
    add("--input-key", metavar="NAME", help="column, or extensions, of the images (default: image; jpg;jpeg;png;webp)")
    add("--target-key", metavar="NAME", help="column, or field of .json, of the classes (default: label; .cls)")
    add("--data-dir", type=Path, metavar="FOLDER", help="where it lies or is kept (default: the library's own)")
    return group


def data_set_options(args: argparse.Namespace) -> DataSetOptions:
    """What `list_images` takes from these flags."""
    return DataSetOptions(args.split, args.input_key, args.target_key, args.data_dir and str(args.data_dir))


def file_state(path: str) -> bytes:
    """Path, size and times of a file, as bytes that change when it is written to."""
    try:
        status = os.stat(path)
        state = status.st_size, status.st_mtime_ns, status.st_ctime_ns
    except OSError:  # a link to nothing, or gone since it was listed: it will be left out as unreadable
        state = -1, -1, -1
    return b"%b\0%d\0%d\0%d" % (os.fsencode(path), *state)


# ---------------------------------------------------------------- tar files

Piece = tuple[int, int, int]  # of some large files: the number of one, and where bytes begin and end in it


def _read_piece(paths: Sequence[str], piece: Piece) -> BinaryIO:
    number, start, end = piece
    if end - start > _LARGEST_IMAGE:
        raise ValueError(f"{end - start:,} bytes are more than an image may have here")
    with open(paths[number], "rb") as file:
        file.seek(start)
        return io.BytesIO(file.read(end - start))


def _pieces(paths: Sequence[str], pieces: Mapping[str, Piece], **more: Any) -> Source:
    states = [file_state(os.path.realpath(path)) for path in paths]
    items = {name: (piece, b"%b\0%d" % (states[piece[0]], piece[1])) for name, piece in pieces.items()}
    return Source(items, functools.partial(_read_piece, paths), **more)


def _members(path: str) -> Iterator[tuple[str, int, int]]:
    """The files of a tar file: name, and where its bytes begin and end. Nothing is unpacked; links are left out."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    yield member.name.removeprefix("./"), member.offset_data, member.offset_data + member.size
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no tar file, or a compressed one ({error}); unpack it first") from None


def open_tar(path: str) -> Source:
    """All files in a tar file, images or not."""
    return _pieces([path], {name: (0, start, end) for name, start, end in _members(path)})


# ---------------------------------------------------------------- data sets


def open_data_set(name: str, options: DataSetOptions) -> tuple[Source, NDArray[np.int64], list[str]]:
    """Open a data set by timm's name for it; its images, and their classes as `number_classes` gives them.

    Args:
        name: hfds/NAME, hfids/NAME (streaming), tfds/NAME, wds/PATH (a folder of tar files, one of them, or a pattern),
            or torch/NAME.
        options: what the name leaves open.

    Raises:
        ValueError: a library is missing, or the data set is; the message says what timm or the library said.
    """
    prefix, _, rest = name.partition("/")
    library, open_ = _DATA_SETS[prefix := prefix.lower()]
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise ValueError(f"{name} needs the library {library} ({error}); pip install {library}") from None
    try:
        source = open_(f"{prefix}/{rest}", options)
        classes = number_classes(source.labels, source.class_names)
    except Exception as error:  # these libraries raise anything, and most of it is about the name or a flag
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{name} cannot be read ({reason})") from error
    if not source.items:
        raise ValueError(f"{name} holds no images")
    return source, *classes


def _create_reader(name: str, split: str | None, options: DataSetOptions, **arguments: Any) -> Any:
    from timm.data.readers.reader_factory import create_reader  # timm takes seconds to import

    keys = {"input_key": options.input_key, "target_key": options.target_key}
    return create_reader(name, **{"root": options.data_dir, "split": split, **keys, **arguments})


def _web_data_set(name: str, options: DataSetOptions) -> Source:
    """Shards of WebDataset: files that differ in nothing but their extensions are a sample."""
    path, split = name.partition("/")[2], options.split
    is_folder = os.path.isdir(path)
    if not is_folder:
        path, split = os.path.split(path)
    elif split is None:
        split = "::".join(sorted((entry for entry in os.listdir(path) if entry.endswith(".tar")), key=natural_key))
        if not split:
            raise FileNotFoundError(f"{path} holds no .tar files")
    logging.getLogger("timm.data.readers.reader_wds").setLevel(logging.ERROR)  # it warns where there is no _info.json
    reader = _create_reader("wds/", split, DataSetOptions(), root=path or ".")
    if is_folder and options.split is None and len(reader.info.get("splits", ())) > 1:
        raise ValueError(f"it holds several splits: {', '.join(reader.info['splits'])}; give one of them as --split")
    shards = [os.path.join(path, shard) for shard in reader.split_info.filenames]
    target_key = options.target_key or reader.split_info.alt_label
    extensions = (options.input_key or _WDS_IMAGES).split(";")
    samples: dict[tuple[int, str], dict[str, Piece]] = {}
    for number, shard in enumerate(shards):
        for member, start, end in _members(shard):
            folder, slash, base = member.rpartition("/")
            stem, _, extension = base.partition(".")
            sample = samples.setdefault((number, folder + slash + stem), {})
            if sample.setdefault(extension.lower(), (number, start, end))[1] != start:
                raise ValueError(f"{shard} holds {member} twice")
    repeated = len({key for _, key in samples}) < len(samples)
    pieces: dict[str, Piece] = {}
    labels: list[int | None] = []
    passed_over = {}
    for (number, key), sample in samples.items():
        file = f"{os.path.splitext(os.path.basename(shards[number]))[0]}/{key}" if repeated else key
        kind = next((extension for extension in extensions if extension in sample), None)
        if kind is None:
            passed_over[file] = f"no {' or '.join(extensions)} in the sample, only {' '.join(sample)}"
            continue
        pieces[f"{file}.{kind}"] = sample[kind]
        labels.append(_sidecar(shards, file, sample.get("json" if target_key else "cls"), target_key))
    return _pieces(shards, pieces, labels=labels, passed_over=passed_over)


def _sidecar(shards: Sequence[str], file: str, piece: Piece | None, target_key: str | None) -> int | None:
    """The class that stands beside an image in its sample; None where none does."""
    if piece is None:
        return None
    number, start, end = piece
    text = _read_piece(shards, (number, start, min(end, start + _LARGEST_SIDECAR))).read()
    try:
        return int(json.loads(text)[target_key]) if target_key else int(text)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{shards[number]}: the class of {file} cannot be read: {reason}") from None


def _names(paths: Sequence[str | None]) -> list[str]:
    """Names by which a data set knows its images, where all have one of their own; else their numbers."""
    known = [path for path in paths if path]
    if len(set(known)) < len(paths):
        return [f"{number:0{len(str(len(paths)))}d}" for number in range(len(paths))]
    if not all(map(os.path.isabs, known)):
        return known
    above = os.path.commonpath([os.path.dirname(path) for path in known])
    return [Path(os.path.relpath(path, above)).as_posix() for path in known]


def _the_split(name: str, options: DataSetOptions) -> str:
    """The split that was asked for, or the only one that there is."""
    import datasets

    splits = [options.split] if options.split else datasets.get_dataset_split_names(name.partition("/")[2])
    if len(splits) > 1:
        raise ValueError(f"it holds several splits: {', '.join(splits)}; give one of them as --split")
    return str(splits[0])


def _read_cell(dataset: Any, key: str, place: int) -> Opened:
    cell = dataset[place][key]
    return io.BytesIO(cell["bytes"]) if cell["bytes"] else str(cell["path"])


def _hugging_face(name: str, options: DataSetOptions) -> Source:
    reader = _create_reader(name, _the_split(name, options), options)
    labels, notes = [None] * len(reader), [f"{name} has no column {reader.label_key}, so no image has a class"]
    if options.target_key or reader.label_key in reader.dataset.features:
        labels, notes = list(reader.iter_targets()), []
    cells = reader.dataset.select_columns(reader.image_key).with_format("arrow").iter(1000)  # which reads no image
    paths = [path for batch in cells for path in batch[reader.image_key].combine_chunks().field("path").to_pylist()]
    identity = reader.dataset._fingerprint.encode()
    states = [file_state(path) if path and os.path.isabs(path) else b"" for path in paths]
    items = {
        file: (place, b"%b\0%d\0%b" % (identity, place, states[place])) for place, file in enumerate(_names(paths))
    }
    read = functools.partial(_read_cell, reader.dataset, reader.image_key)
    return Source(items, read, labels, [*reader.class_to_idx], notes=notes)


def _first(items: Any, place: int) -> Any:
    return items[place][0]


def _torchvision(name: str, options: DataSetOptions) -> Source:
    from timm.data import create_dataset

    if options.data_dir is None:
        raise ValueError("give --data-dir, the folder where it lies")
    dataset: Any = create_dataset(name, options.data_dir, options.split or "validation", download=False)
    targets, samples = (getattr(dataset, attribute, None) for attribute in ("targets", "samples"))
    if targets is None:
        raise ValueError("torchvision keeps no list of its classes; give the folder of its images instead")
    labels = np.asarray(targets).reshape(len(dataset), -1)[:, 0].tolist()
    classes = [each if isinstance(each, str) else ", ".join(each) for each in getattr(dataset, "classes", ())]
    if samples:  # files, to be opened where it is known which formats are
        paths = [os.path.abspath(path) for path, _ in samples]
        items: dict[str, tuple[Any, bytes]] = {
            file: (path, file_state(path)) for file, path in zip(_names(paths), paths, strict=True)
        }
        return Source(items, str, labels, classes)
    identity = hashlib.blake2b(np.asarray(dataset.data).tobytes(), digest_size=16).digest()
    items = {file: (place, b"%b%d" % (identity, place)) for place, file in enumerate(_names([None] * len(dataset)))}
    return Source(items, functools.partial(_first, dataset), labels, classes)


def _stream(name: str, options: DataSetOptions) -> Source:
    """Copy a stream, in the order in which it comes, into one file, which goes when the images do."""
    if name.startswith("hfids/"):
        # timm wants to know how many samples a training has; all are read
        reader = _create_reader(name, _the_split(name, options), options, num_samples=1)
        samples = _undecoded(reader, options)
    elif options.split is None:
        raise ValueError("give --split")
    else:
        reader = _create_reader(name, options.split, options)
        samples = ((None, _png(image), target) for image, target in reader)
    handle, spool = tempfile.mkstemp(suffix=".images")
    paths, labels, ends, digests = [], [], [0], []
    with naming_full_disks(Path(spool)), os.fdopen(handle, "wb") as file:
        for path, content, label in samples:
            file.write(content)
            paths.append(path)
            labels.append(label)
            ends.append(file.tell())
            digests.append(hashlib.blake2b(content, digest_size=16).digest())
    items = {
        name: ((0, *ends[place : place + 2]), b"%b\0%b" % (digests[place], os.fsencode(name)))
        for place, name in enumerate(_names(paths))
    }
    notes = [f"{len(items)} images, {ends[-1] / 1e6:.1f} MB, were copied from the stream to {spool} for this run"]
    source = Source(items, functools.partial(_read_piece, [spool]), labels, [*reader.class_to_idx], notes=notes)
    weakref.finalize(source, os.unlink, spool)
    return source


def _undecoded(reader: Any, options: DataSetOptions) -> Iterator[tuple[str | None, bytes, Any]]:
    """Paths, contents and labels of a streamed data set of Hugging Face's."""
    import datasets
    import fsspec  # type: ignore[import-untyped]
    from timm.data.readers.targets import get_field

    stream = reader.builder.as_streaming_dataset(split=reader.split)
    for sample in stream.cast_column(reader.input_key, datasets.Image(decode=False)):
        path, content = (sample[reader.input_key][part] for part in ("path", "bytes"))
        if not content:
            with fsspec.open(path, "rb") as file:
                content = file.read()
        known = options.target_key or reader.target_key in sample
        yield path, content, get_field(sample, reader.target_key) if known else None


def _png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG", compress_level=1)
    return sink.getvalue()


_DATA_SETS: dict[str, tuple[str, Callable[[str, DataSetOptions], Source]]] = {  # timm's prefix: library, what opens it
    "hfds": ("datasets", _hugging_face),
    "hfids": ("datasets", _stream),
    "wds": ("webdataset", _web_data_set),
    "tfds": ("tensorflow_datasets", _stream),
    "torch": ("torchvision", _torchvision),
}
