"""Listing images: which images there are, in which order, of which class, in which fold.

Three layouts are understood, on disk or in a tar file: class folders, the five-part layout
`split_part_1..5/<class>/<file>`, and a flat folder, with or without a file of labels. Other images than those of a
folder come from `sources.py`; which of them is of which class is for `labels.py`. Nothing here decodes an image; those
that a run could not decode are named in a file beside its output.
"""

import dataclasses
import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clcnet.data import labels as words
from clcnet.data.checks import UNKNOWN
from clcnet.data.labels import first_few, fit_class_map, natural_key, number_classes, plain
from clcnet.data.sources import DataSetOptions, Opened, Source, file_state, is_data_set, open_data_set, open_tar
from clcnet.files import atomic_path, write_rows
from clcnet.strangers import for_spreadsheet

NUM_FOLDS = 5
PART_NAMES = tuple(f"split_part_{part}" for part in range(1, NUM_FOLDS + 1))
# PIL's names, where this PIL has them; nothing else is decoded, whatever it is called: for EPS, PIL runs Ghostscript
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "QOI")
Image.init()
IMAGE_FORMATS = tuple(name for name in _FORMATS if name in Image.OPEN)
IMAGE_EXTENSIONS = tuple(
    extension for extension, name in Image.registered_extensions().items() if name in (*IMAGE_FORMATS, "MPO")
)
_SYSTEM_FOLDERS = ("@eadir", "__macosx", "#recycle", "@recycle", "$recycle.bin", "lost+found")
_THUMBNAILS = ("thumbs", "thumbnails", "_thumbs", "_thumbnails")


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """The images of one data set, in the order of its tables.

    Attributes:
        root: the folder or tar file that was listed, or the name of a data set.
        files: where each image lies below `root`, with forward slashes; strings, because a million pathlib.Path would
            take half a minute to make.
        names: each image's name in a table: the bare file name while bare names are unique in the data set, else the
            path from the class folder's parent, else the path from `root`; always with forward slashes.
        targets: (N,) index into `class_names`; -1 where the class is not known.
        class_names: all classes of the whole data set, in natural order, as timm numbers them.
        folds: (N,) from 0 to 4: the part that holds the image, or its class-balanced fold where there are no parts.
        classes_by: what says which classes there are: "folders", "labels", a "data set" that names and numbers them, or
            a class "map" in a model's order.
        passed_over: path below `root` of each file and folder that was left out -> why.
        notes: what the user should know of how the folder was read, a line each.
        source: what opens images that are no files of their own.
    """

    root: Path | str
    files: list[str]
    names: list[str]
    targets: np.ndarray
    class_names: list[str]
    folds: np.ndarray
    classes_by: str = "folders"
    passed_over: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    source: Source | None = None

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> Opened:
        """One image, for PIL: a path, or its content."""
        file = self.files[index]
        return os.path.join(self.root, file) if self.source is None else self.source.open(file)

    @property
    def paths(self) -> list[Path]:
        """Where all images of a folder lie, made anew at each call."""
        return [Path(self.root, file) for file in self.files]

    @property
    def has_labels(self) -> bool:
        """Whether the class of every image is known."""
        return bool(self.class_names) and bool((self.targets >= 0).all())

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageSet":
        """The images at `indices`, in that order, with the classes of the whole data set."""
        return dataclasses.replace(
            self,
            files=[self.files[index] for index in indices],
            names=[self.names[index] for index in indices],
            targets=self.targets[indices],
            folds=self.folds[indices],
        )


def image_keys(images: ImageSet) -> NDArray[np.uint8]:
    """What tells each image from every other, and from itself once it was written to: (N, 16), digests."""
    root = os.path.abspath(os.path.realpath(images.root))
    keys = bytearray()
    for file in images.files:
        state = images.source.items[file][1] if images.source else file_state(os.path.join(root, file))
        keys += hashlib.blake2b(state, digest_size=16).digest()
    return np.frombuffer(bytes(keys), np.uint8).reshape(-1, 16)


def list_images(
    folder: Path | str,
    class_map: Path | str | None = None,
    labels: Path | str | None = None,
    any_folder: bool = False,
    model_classes: Collection[str] = (),
    options: DataSetOptions | None = None,
) -> ImageSet:
    """List the images of `folder`, in natural order of class and file name; those of a data set in its own order.

    The order is the same on every machine, and whether or not the folder is cut into five parts. What is hidden, has
    no extension of an image, or is a vendor's folder of thumbnails is passed over and named. Links are followed, as
    timm and torchvision do, except one that leads back to a folder around it.

    In nested folders the class is the folder that holds the image, as in timm. Where folders of one name lie in several
    places, or a folder holds images and folders of images, it may as well be the outermost one, as in torchvision: the
    names of a class map or of the model settle it.

    Args:
        folder: class folders, the five-part layout, or a flat folder of images; a tar file of these; or a name by
            which timm knows a data set, see `open_data_set`.
        class_map: text file with one class folder a line, in the order of their indices; see `class_map_readings`.
        labels: for a folder without class folders; see `read_labels`.
        any_folder: take folders for what they are: where images lie beside folders, it cannot be told which folder is
            the class, or a class map knows none of them, no image has a class. Otherwise these are errors.
        model_classes: names of the model's classes, where it has any.
        options: of a data set.
    """
    if folder == "":
        raise ValueError("the path of the image folder is empty; name it, or give . for the current folder")
    if is_data_set(folder):
        if labels is not None:
            raise ValueError(f"{folder} has labels of its own, so --labels would contradict them; leave it out")
        return _of_data_set(str(folder), options or DataSetOptions(), class_map)
    if options and options != DataSetOptions():
        raise ValueError(f"{folder} is not the name of a data set, so --split and the like say nothing of it")
    root, source = Path(folder), None
    if not root.exists():
        raise FileNotFoundError(f"image folder {root} does not exist; check the path")
    if root.is_dir():
        files, passed_over, notes = _walk(root)
    elif root.suffix.lower() == ".tar":
        source = open_tar(os.fspath(root))
        reasons = {file: _why_left_out(file) for file in source.items}
        files, notes = [file for file, why in reasons.items() if not why], []
        passed_over = {file: why for file, why in reasons.items() if why}
    else:
        raise NotADirectoryError(f"image folder {root} is a file; name the folder or .tar file that holds the images")
    notes += [_in_words(passed_over)] if passed_over else []
    if not files:
        raise ValueError("; ".join([f"image folder {root} holds no images ({' '.join(IMAGE_EXTENSIONS)})", *notes]))
    files.sort()
    part_of = _parts(root, files)
    ways = words.below_what_they_share({file.rpartition("/")[0] for file in files}, skip=bool(part_of))
    map_names = set().union(*words.class_map_readings(Path(class_map))) if class_map is not None else set()
    words.check_splits(root, ways, map_names)
    has_class_folders = words.has_class_folders(root, files, bool(part_of), any_folder, notes)
    classes_by, known = "folders", list[str]()
    class_of: dict[str, str] = {}  # by file, where it is known
    if labels is not None:
        if has_class_folders:
            raise ValueError(
                f"image folder {root} has class folders, so --labels {labels} would contradict them; leave one out"
            )
        of_files, known, more = words.read_labels(Path(labels), root, files)
        classes_by, class_of = "labels", dict(zip(files, of_files, strict=True))
        notes += more
    elif has_class_folders:
        of_folder = words.settle(root, ways, map_names or set(map(plain, model_classes)), any_folder, notes)
        class_of = {file: of_folder[file.rpartition("/")[0]] for file in files} if of_folder else {}
    if class_map is not None:
        if class_of and any_folder and labels is None and map_names.isdisjoint(class_of.values()):
            notes.append(f"no folder is in the class map {class_map}, so no image has a class")
            class_of = {}
        classes_by = "map"
        name_of, known = fit_class_map(Path(class_map), set(class_of.values()))
        class_of = {file: name_of[name] for file, name in class_of.items()}
    files = _in_natural_order(files, class_of if labels is None else {})
    targets, known = number_classes([class_of.get(file) for file in files], known)
    names = _unique_names(files)
    folds = np.array([part_of[file] for file in files]) if part_of else balanced_folds(names, targets)
    return ImageSet(root, files, names, targets, known, folds, classes_by, passed_over, notes, source)


def _of_data_set(name: str, options: DataSetOptions, class_map: Path | str | None) -> ImageSet:
    """The images of one of timm's data sets, in its own order."""
    source, targets, known = open_data_set(name, options)
    files = [*source.items]
    classes_by = "labels" if any(isinstance(label, str) for label in source.labels) else "data set"
    if class_map is not None:
        name_of, mapped = fit_class_map(Path(class_map), known)
        labels = [name_of[known[target]] if UNKNOWN < target < len(known) else None for target in targets.tolist()]
        classes_by, (targets, known) = "map", number_classes(labels, mapped)
    names = _unique_names(files)
    folds = balanced_folds(names, targets)
    return ImageSet(name, files, names, targets, known, folds, classes_by, source.passed_over, source.notes, source)


def balanced_folds(names: Sequence[str], targets: np.ndarray, num_folds: int = NUM_FOLDS) -> np.ndarray:
    """Cut images into folds of equal size in which every class is spread evenly, by nothing but their names.

    Inside a class, images go round the folds in the order of a hash of their names: the same on every machine and for
    every order of the file system, and unrelated to the order in which they were recorded.

    Args:
        names: N names, all different.
        targets: (N,) classes.
        num_folds: how many folds.

    Returns:
        (N,) from 0; fold sizes, and each class's counts over the folds, differ by at most one.
    """
    hashes = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
    order = sorted(range(len(names)), key=lambda index: (targets[index], hashes[index]))
    return spread_folds(order, num_folds)


def spread_folds(order: Sequence[int] | np.ndarray, num_folds: int = NUM_FOLDS) -> np.ndarray:
    """(N,) fold numbers of images that go round the folds in this order."""
    folds = np.empty(len(order), dtype=np.int64)
    folds[np.asarray(order, dtype=np.int64)] = np.arange(len(order)) % num_folds
    return folds


def _walk(root: Path) -> tuple[list[str], dict[str, str], list[str]]:
    """All image files below `root`, relative to it; what was passed over, and why; what to say about links."""
    found: list[str] = []
    passed_over: dict[str, str] = {}
    notes: list[str] = []
    real = os.path.realpath(root)
    seen, folders = {real: "."}, [("", frozenset([real]))]  # folders to come, and the real ones around each

    def fail(error: OSError) -> None:
        raise error

    while folders:
        inside, around = folders.pop()
        folder = os.path.join(root, inside[:-1]) if inside else root
        _, subfolders, files = next(os.walk(folder, onerror=fail))
        reasons = {inside + name: _why_no_image(name) for name in files}
        images = [path for path, why in reasons.items() if not why]
        found += images
        passed_over |= {path: why for path, why in reasons.items() if why}
        below = []
        for name in sorted(subfolders):
            real = os.path.realpath(os.path.join(root, inside, name))
            why = _why_no_folder(name, bool(images)) or ("a link in a circle" if real in around else "")
            if why:
                passed_over[f"{inside}{name}/"] = why
                continue
            if real in seen and not notes:
                notes.append(f"{seen[real]} and {inside}{name} are one folder: what links lead to is listed each time")
            seen.setdefault(real, inside + name)
            below.append((f"{inside}{name}/", around | {real}))
        folders += reversed(below)
    return found, passed_over, notes


def _why_no_image(name: str) -> str:
    """Why a file is passed over; empty for an image."""
    if name.startswith("."):
        return "hidden"
    extension = os.path.splitext(name)[1].lower()
    return "" if extension in IMAGE_EXTENSIONS else f"not decoded here: {extension or 'no extension'}"


def _why_left_out(path: str) -> str:
    """Why a member of a tar file is passed over; empty for an image."""
    *folders, name = path.split("/")
    return next(filter(None, (_why_no_folder(folder, False) for folder in folders)), _why_no_image(name))


def _why_no_folder(name: str, beside_images: bool) -> str:
    if name.startswith("."):
        return "hidden"
    # a class may be called thumbs; but class folders do not lie beside images
    is_system = name.lower() in _SYSTEM_FOLDERS or (beside_images and name.lower() in _THUMBNAILS)
    return "thumbnails or a system's folder" if is_system else ""


def _in_words(passed_over: Mapping[str, str]) -> str:
    of_reason: dict[str, list[str]] = {}
    for name, why in passed_over.items():
        of_reason.setdefault(why, []).append(name)
    parts = (f"{len(names)} {why} ({first_few(names)})" for why, names in sorted(of_reason.items()))
    return f"passed over: {'; '.join(parts)}"


def _in_natural_order(files: list[str], class_of: Mapping[str, str]) -> list[str]:
    """Sort by class, or by folder where none is known, and by file name; where both are the same, by path."""
    group_of = class_of or {file: _tail(file, 2).rpartition("/")[0] for file in files}
    groups = sorted(set(group_of.values()), key=natural_key)
    place = {group: position for position, group in enumerate(groups)}  # quicker to compare than keys
    return sorted(files, key=lambda file: (place[group_of[file]], natural_key(_tail(file, 1)), file))


def _parts(root: Path, files: list[str]) -> dict[str, int]:
    """The part of each image, from 0; empty where the folder is not cut into parts."""
    top_of = {file: file.partition("/")[0] for file in files}
    tops = set(top_of.values())
    present = [name for name in PART_NAMES if name in tops]
    if not present:
        return {}
    if len(present) < NUM_FOLDS:
        missing = ", ".join(name for name in PART_NAMES if name not in present)
        raise ValueError(
            f"image folder {root} holds images in {', '.join(present)} but not {missing}; give all five parts"
        )
    stray = next((file for file in files if top_of[file] not in PART_NAMES), None)
    if stray:
        raise ValueError(f"image folder {root}: {stray} lies outside the five parts; move it into one of them")
    return {file: PART_NAMES.index(top) for file, top in top_of.items()}


def _tail(path: str, num_names: int) -> str:
    """The last names of a path: the file's own, or with that of its folder."""
    return "/".join(path.rsplit("/", num_names)[-num_names:])


def _unique_names(files: list[str]) -> list[str]:
    for num_names in (1, 2):
        names = [_tail(path, num_names) for path in files]
        if len(set(names)) == len(names):
            return names
    return files


def names_of(image_set: ImageSet, index: int) -> set[str]:
    """All names under which a table may speak of one image: bare, with its class folder, from the root."""
    file = image_set.files[index]
    return {_tail(file, 1), _tail(file, 2), file}


def errors_file(output: Path | str) -> Path:
    """Where the images left out are named, with their reasons."""
    return Path(f"{output}.errors.csv")


def write_errors(
    path: Path,
    images: ImageSet,
    reasons: Mapping[int, str],
    spreadsheet_safe: bool = False,
    names: Sequence[str] | None = None,
) -> None:
    """Name the images that could not be read, by index, with their reasons, and what was passed over.

    Where there is neither, remove the file that an earlier run left.
    """
    if not reasons and not images.passed_over:
        path.unlink(missing_ok=True)
        return
    cell = for_spreadsheet if spreadsheet_safe else str
    rows = [(cell((names or images.names)[index]), reason) for index, reason in reasons.items()]
    rows += [(cell(name), f"passed over: {why}") for name, why in images.passed_over.items()]
    with atomic_path(path) as temporary:
        write_rows(temporary, [("file", "reason"), *rows])
