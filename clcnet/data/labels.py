"""Which class is it? Class folders, class maps and label files: the user's word for what is right.

A wrong guess here is a silently wrong accuracy: what can be read in two ways is settled by other words of the user's,
or refused. Which of a model's classes these are is for `clcnet.classifiers.classes`.
"""

import csv
import io
import os
import re
import struct
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clcnet.data.checks import UNKNOWN
from clcnet.strangers import read_bytes

_DIGITS = re.compile(r"([0-9]+)")
_SPLIT = re.compile(r"(train|val|dev|test)(ing|id|idation)?[-_ ]?[0-9]*", re.IGNORECASE)
_WHOLE_NUMBER = re.compile(r"([0-9]+)(\.0+)?")  # pandas writes whole numbers as 3.0 where a cell of the column is empty
_WORDNET_LINE = re.compile(r"(n\d{8})\s")
_SEPARATORS = (",", "\t", ";", None)  # the last for white space, as in Caffe's val.txt
_ROWS_LOOKED_AT = 200  # to find the separator
_HEADERS = {"file", "filename", "image", "imageid", "id", "img", "name", "path", "label", "class", "category", "target"}
_NO_LABEL = ("", "nan", "null", "n/a", "#n/a", "<na>")
_NO_NUMBER = ("na", "none", "-", "?", "-1")  # may be names, but not among numbers
_NAMES_SHOWN = 3
_LARGEST, _MOST_LINES, _LONGEST_LINE = 2**27, 2**22, 4000  # bytes, of a file; lines; characters
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_ANOTHER = (0, 0)  # closeness of names of two images
_LARGEST_META = 2**23  # bytes unpacked, of meta.mat, which is 2 MB


def number_classes(labels: Sequence[Any], names: Sequence[str] = ()) -> tuple[NDArray[np.int64], list[str]]:
    """Number the classes of N images.

    Args:
        labels: numbers or names; None where the class is not known.
        names: of all classes in order, where they are known; labels that are not all among them are put in natural
            order.

    Returns:
        targets: (N,) index into the names, UNKNOWN where the class is not known.
        names: of all classes, in order.
    """
    names = list(map(plain, names))
    if any(isinstance(label, str) for label in labels):
        labels = [None if label is None else plain(str(label)) for label in labels]
        words = {*labels} - {None}
        names = names if words <= {*names} else sorted(words, key=natural_key)
        number_of = {name: number for number, name in enumerate(names)}
        labels = [None if label is None else number_of[label] for label in labels]
    numbers = [UNKNOWN if label is None else max(int(label), UNKNOWN) for label in labels]
    names = names or [str(number) for number in range(max(numbers, default=UNKNOWN) + 1)]
    return np.array(numbers, dtype=np.int64), names


def natural_key(text: str) -> tuple[list[str | int], str]:
    """Sort key under which `img2` comes before `img10`, without regard to case; as timm sorts classes and files."""
    pieces: list[str | int] = [*_DIGITS.split(text.lower())]
    pieces[1::2] = map(int, pieces[1::2])
    return pieces, text


def plain(name: str) -> str:
    """A name in the one form in which names are compared: é is one letter here, and two on a Mac's disk."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def first_few(names: Sequence[str]) -> str:
    """The first of some names, for a message."""
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")


def _read_lines(path: Path) -> list[str]:
    """The lines of a text, with their ends."""
    try:
        text = read_bytes(path, _LARGEST).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    num_lines = sum(map(text.count, _LINE_ENDS))
    if num_lines > _MOST_LINES:
        raise ValueError(f"{path} has {num_lines:,} lines, more than the {_MOST_LINES:,} that are read")
    lines = text.splitlines(keepends=True)
    longest = max(range(len(lines)), key=lambda number: len(lines[number]), default=0)
    if lines and len(lines[longest]) > _LONGEST_LINE:
        raise ValueError(f"{path}: line {longest + 1} has {len(lines[longest]):,} characters; name classes in fewer")
    return lines


# ---------------------------------------------------------------- folders


def below_what_they_share(folders: Collection[str], skip: int = 0) -> dict[str, tuple[str, ...]]:
    """The way to each folder from where ways part: without the `skip` first names and those that all have in common."""
    ways = {folder: tuple(plain(folder).split("/"))[skip:] for folder in folders}
    shared = min(len(os.path.commonprefix([*ways.values()])), min(map(len, ways.values())) - 1)
    return {folder: way[max(shared, 0) :] for folder, way in ways.items()}


def check_splits(root: Path, ways: Mapping[str, tuple[str, ...]], known: Collection[str]) -> None:
    """Refuse what holds train/ and val/: merged, the images that a model was trained on would flatter it."""
    place = {way[0]: folder[: len(folder) - len("/".join(way[1:]))].rstrip("/") for folder, way in ways.items() if way}
    split_of = {name: found[1].lower() for name in place if name not in known and (found := _SPLIT.fullmatch(name))}
    if len(set(split_of.values())) > 1:
        raise ValueError(
            f"image folder {root} holds several splits ({', '.join(sorted(split_of))}); name the one that you mean, "
            f"such as {root / place[max(split_of)]}"
        )


def has_class_folders(root: Path, files: Sequence[str], in_parts: bool, any_folder: bool, notes: list[str]) -> bool:
    """Whether folders say which class images have: not in a flat folder, or where images lie beside folders and may."""
    flat = [file for file in files if file.count("/") == in_parts]
    if len(flat) == len(files) and not in_parts:
        return False
    if flat and any_folder:
        notes.append(f"{flat[0]} lies beside folders, so no folder is taken for a class")
    elif flat:
        raise ValueError(f"image folder {root}: {flat[0]} lies beside the class folders; move it into one of them")
    return not flat


def settle(
    root: Path, ways: Mapping[str, tuple[str, ...]], known: Collection[str], any_folder: bool, notes: list[str]
) -> dict[str, str]:
    """The class of each folder, the innermost on its way or the outermost, by the classes that are known; else timm's.

    Empty where no folder may be a class.
    """
    inner, outer = ({folder: way[end] for folder, way in ways.items()} for end in (-1, 0))
    if inner == outer:
        return inner
    for reading in (inner, outer):
        if known and set(reading.values()) <= set(known):
            return reading
    doubt = _doubt_innermost(set(ways.values()))
    if not doubt:
        innermost, outermost = (first_few(sorted(set(way.values()), key=natural_key)) for way in (inner, outer))
        notes.append(
            f"the classes are the innermost folders ({innermost}), as in timm, not the outermost ({outermost})"
        )
        return inner
    if any_folder:
        notes.append(f"{doubt}, so no folder is taken for a class; a --class-map settles it")
        return {}
    raise ValueError(
        f"image folder {root}: {doubt}, so the class may be the innermost folder or the outermost; give a "
        "--class-map that names the classes, or one folder for each class"
    )


def _doubt_innermost(ways: set[tuple[str, ...]]) -> str:
    """Why the innermost folder on each way may be no class at all; empty where that reading is a sound one."""
    places: dict[str, tuple[str, ...]] = {}
    for way in sorted(ways, key=lambda way: natural_key("/".join(way))):
        other = places.setdefault(way[-1], way)
        if other != way:
            return f"folder {way[-1]} lies in {'/'.join(other[:-1]) or '.'} and in {'/'.join(way[:-1])}"
    for way in sorted(ways):
        holder = next((way[:end] for end in range(1, len(way)) if way[:end] in ways), None)
        if holder:
            return f"folder {'/'.join(holder)} holds images and the folder {'/'.join(way)} of images"
    return ""


# ---------------------------------------------------------------- class maps


def class_map_readings(path: Path) -> list[list[str]]:
    """The classes that a class map names, in every way in which its lines can be read; the likeliest first.

    A line is a class (timm), or its first word is (synset_words.txt: `n01440764 tench, Tinca tinca`), or a number
    stands before or after it (CUB's classes.txt: `1 001.Black_footed_Albatross`) and gives its place.
    """
    if path.suffix.lower() not in (".txt", ".names", ".tsv", ".lst", ".list", ""):
        raise ValueError(
            f"class map {path}: only text files are read, one class folder a line; timm's pickles may run code"
        )
    lines = [plain(line.strip()) for line in _read_lines(path) if line.strip()]
    heads = [re.split(r"[\s,;:]+", line, maxsplit=1) for line in lines]
    tails = [re.split(r"(?<![\s,;])[\s,;]++(?=[0-9]+$)", line) for line in lines]
    numbered = _by_number(heads, 0) or _by_number(tails, 1)
    first_words = [head[0] for head in heads]
    if all(map(_WORDNET_LINE.match, lines)):
        return [first_words, lines]
    return [*([numbered] if numbered else []), lines, first_words]


def _by_number(rows: list[list[str]], column: int) -> list[str] | None:
    """Names in the order of the numbers beside them, which run from 0 or 1 without a gap; None where they do not."""
    if not rows or not all(len(row) == 2 and row[column].isascii() and row[column].isdigit() for row in rows):
        return None
    places = sorted((int(row[column]), row[1 - column]) for row in rows)
    first = places[0][0]
    complete = first in (0, 1) and [number for number, _ in places] == list(range(first, first + len(rows)))
    names = [name for _, name in places]
    return names if complete and len(set(names)) == len(names) else None


def fit_class_map(path: Path, classes: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Find the reading of a class map in which every class of the images has its line.

    Returns:
        The map's name for each of the classes, and all the map's classes in order.
    """
    readings = class_map_readings(path)
    known = next((known for known in readings if set(classes) <= set(known)), readings[0])
    repeated = [name for name, count in Counter(known).items() if count > 1]
    if repeated:
        raise ValueError(f"class map {path} names {repeated[0]!r} more than once")
    unknown = sorted(set(classes) - set(known), key=natural_key)
    if not unknown:
        return {name: name for name in classes}, known
    if len(unknown) == len(classes) and all(name.isascii() and name.isdigit() for name in unknown):
        first, last = min(int(unknown[0]), 1), int(unknown[-1])
        if last == len(known) - 1 + first or (first == 0 and last < len(known)):  # they number the map's lines
            return {name: known[int(name) - first] for name in unknown}, known
    raise ValueError(f"class {unknown[0]!r} is not in the class map {path} ({first_few(known)}); add a line for it")


# ---------------------------------------------------------------- label files


class _Finder:
    """Finds the rows of a label file that speak of an image: by its path or name, with or without extension."""

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self._root = [plain(part) for part in root.resolve().parts]
        self.extensions = set(map(_extension, files))
        self._of_images = {self._key(plain(file)) for file in files}

    def _key(self, name: str) -> str:
        bare = name.rpartition("/")[2]
        return (os.path.splitext(bare)[0] if _extension(bare) in self.extensions else bare).casefold()

    def knows(self, name: str) -> bool:
        """Whether an image has this name."""
        return self._key(_with_slashes(name)) in self._of_images

    def find(self, names: Sequence[str], files: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
        """Each image with its rows, those whose name comes closest to its own; `names` are all rows'."""
        rows = defaultdict(list)  # by key, those that may speak of it
        for number, name in enumerate(map(_with_slashes, names)):
            rows[self._key(name)].append((number, name))
        for file in files:
            image = plain(file)
            closeness = {number: self._closeness(name, image) for number, name in rows.get(self._key(image), ())}
            best = max(closeness.values(), default=_ANOTHER)
            yield file, [number for number, close in closeness.items() if close == best != _ANOTHER]

    def _closeness(self, name: str, file: str) -> tuple[int, int]:
        """How alike the names of a row and of an image are, and how many folders above them agree."""
        *above, own = name.split("/")
        *place, bare = [*self._root, *file.split("/")]
        likeness = 3 if own == bare else 2 if own.casefold() == bare.casefold() else 1
        pairs = zip(reversed(above), reversed(place), strict=False)
        agree = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if likeness == 1 and _extension(own) in self.extensions:
            return _ANOTHER  # a.jpg is another file than a.png
        if agree < min(len(above), file.count("/")):
            return _ANOTHER  # ant/1.png is another file than bee/1.png
        return likeness, agree


def _extension(name: str) -> str:
    """In small letters and with its dot."""
    return os.path.splitext(name)[1].lower()


def _with_slashes(name: str) -> str:
    return plain(name.replace("\\", "/"))


def read_labels(path: Path, root: Path, files: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Read a file of labels.

    Args:
        path: rows of file and label, separated by commas, tabs, semicolons or white space, with or without a header;
            or the ground truth of ILSVRC2012's validation images, a line an image.
        root: the folder of the images.
        files: N images below it.

    Returns:
        The class of each image; all classes of the file in order, numbers by their size and names in natural order;
        and what the user should know of how the file was read.
    """
    finder = _Finder(root, files)
    rows = _rows(path, finder)
    if all(len(row) == 1 for row in rows):
        return *_read_ground_truth(path, [row[0] for row in rows], files), []
    for number, row in enumerate(rows, start=1):
        if len(row) > 2:
            raise ValueError(f"{path}: row {number} has {len(row)} columns instead of 2 (file,label)")
    names, labels = ([(*row, "")[column].strip() for row in rows] for column in (0, 1))
    if not any(map(finder.knows, names)) and any(_extension(label) in finder.extensions for label in labels):
        names, labels = labels, names
    if _has_header(names, labels, finder):
        names[0] = labels[0] = ""
    labels = _clean(labels)
    classes, moved = [], []
    for image, found in finder.find(names, files):
        if not found:
            raise ValueError(f"{path} has no label for {image}; add a row for it")
        first = found[0]
        for other in found:
            if labels[other] != labels[first]:
                raise ValueError(f"{path}: row {other + 1} labels {names[other]} a second time and differently")
        if labels[first] == "":
            raise ValueError(f"{path}: row {first + 1} has no label for {image}; fill it in")
        if not _lies_at(_with_slashes(names[first]), root, image):
            moved.append(names[first])
        classes.append(labels[first])
    notes = [f"the labels of {path} are matched by file name alone: {moved[0]} lies elsewhere"] if moved else []
    return classes, sorted({label for label in labels if label}, key=natural_key), notes


def _lies_at(name: str, root: Path, image: str) -> bool:
    return "/" not in name or f"{root.resolve().as_posix()}/{image}".endswith(f"/{name.removeprefix('./').lstrip('/')}")


def _rows(path: Path, finder: _Finder) -> list[list[str]]:
    """Cut the file into rows by the separator under which most names in its first rows are images'."""
    lines = _read_lines(path)
    try:
        tries = [_cut(lines[:_ROWS_LOOKED_AT], separator) for separator in _SEPARATORS]
        fits = [sum(len(row) > 1 and any(map(finder.knows, row)) for row in rows) for rows in tries]
        if not any(fits):  # perhaps none of the images is among the first rows
            fits = [sum(len(row) == 2 for row in rows) for rows in tries]
        rows = _cut(lines, _SEPARATORS[fits.index(max(fits))])
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file ({error}); give rows of file,label") from None
    if not rows:
        raise ValueError(f"{path} is empty; give rows of file,label")
    return rows


def _cut(lines: list[str], separator: str | None) -> list[list[str]]:
    if separator is None:
        return [line.strip().rsplit(None, 1) for line in lines if line.strip()]
    rows = [row for row in csv.reader(lines, delimiter=separator) if row]
    for row in rows:
        while len(row) > 2 and not row[-1].strip():
            row.pop()
    return rows


def _has_header(names: list[str], labels: list[str], finder: _Finder) -> bool:
    """Whether the first row names the columns: no image is called so, and it looks unlike those below it."""
    if finder.knows(names[0]) or _extension(names[0]) in finder.extensions:
        return False
    if set(re.split(r"[\W_]+", f"{names[0]} {labels[0]}".lower())) & _HEADERS:
        return True
    return len(names) > 1 and (_extension(names[1]) in finder.extensions or all(map(finder.knows, names[1:])))


def _clean(labels: list[str]) -> list[str]:
    """Labels in the form in which they are compared: numbers without leading zeros, empty where there is none."""
    cleaned = ["" if label.lower() in _NO_LABEL else plain(label) for label in labels]
    numbers = [_WHOLE_NUMBER.fullmatch(label) for label in cleaned]
    odd = {label.lower() for label, number in zip(cleaned, numbers, strict=True) if label and not number}
    if not any(numbers) or not odd <= set(_NO_NUMBER):
        return cleaned
    return [str(int(number[1])) if number else "" for number in numbers]


def _read_ground_truth(path: Path, ids: list[str], files: Sequence[str]) -> tuple[list[str], list[str]]:
    """Read a line an image of ILSVRC2012's validation: line k is of ILSVRC2012_val_<k, 8 digits>.JPEG.

    It is a WordNet id, or an ILSVRC2012_ID from 1 to 1000. These are not in the order of the WordNet ids by which
    folders and models number the classes; the development kit's meta.mat, beside the ground truth, translates them.
    """
    truths = []
    for image in files:
        number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.\w+", image.rpartition("/")[2])
        if number is None or not 1 <= int(number[1]) <= len(ids):
            raise ValueError(
                f"{image}: not a name of the {len(ids)} images of {path} (ILSVRC2012_val_00000001.JPEG ...); for other "
                "images give rows of file,label"
            )
        truths.append((int(number[1]), ids[int(number[1]) - 1].strip()))
    if all(re.fullmatch(r"n\d{8}", truth) for _, truth in truths):
        return [truth for _, truth in truths], sorted({truth.strip() for truth in ids})
    wnid_of = _wordnet_ids(path)
    for line, truth in truths:
        if not (truth.isascii() and truth.isdigit()) or int(truth) not in wnid_of:
            raise ValueError(f"{path}: row {line} is {truth!r}, not an ILSVRC2012 id that meta.mat knows")
    return [wnid_of[int(truth)] for _, truth in truths], sorted(wnid_of.values(), key=natural_key)


def _wordnet_ids(path: Path) -> dict[int, str]:
    meta = path.with_name("meta.mat")
    if not meta.exists():
        raise FileNotFoundError(
            f"{path} holds ILSVRC2012 ids; put the development kit's meta.mat beside it to translate them"
        )
    from scipy.io import loadmat  # here, because only this one format needs it

    content = read_bytes(meta, _LARGEST_META)
    try:
        _check_unpacked(content)
        synsets = loadmat(io.BytesIO(content), squeeze_me=True, struct_as_record=False)["synsets"]
        return {int(synset.ILSVRC2012_ID): str(synset.WNID) for synset in synsets if int(synset.num_children) == 0}
    except Exception as error:  # on damaged bytes scipy raises nearly anything
        reason = " ".join(str(error)[:200].split()) or type(error).__name__
        raise ValueError(f"{meta} is not the development kit's ({reason}); copy it anew") from None


def _check_unpacked(content: bytes) -> None:
    """Refuse a MATLAB file (version 5: 128 bytes, then elements of kind, size and data) that unpacks to too much."""
    start = 128
    while start + 8 <= len(content):
        kind, size = struct.unpack_from("<II", content, start)
        start += 8
        if kind == 15:  # compressed
            unpacked = zlib.decompressobj().decompress(content[start : start + size], _LARGEST_META + 1)
            if len(unpacked) > _LARGEST_META:
                raise ValueError(f"it unpacks to more than {_LARGEST_META:,} bytes")
        start += size
