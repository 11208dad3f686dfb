"""Which images a folder holds, in which order, of which class, in which fold."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from hypothesis import given
from hypothesis import strategies as st

from clcnet.data.images import balanced_folds, list_images, natural_key


def touch(root: Path, *names: str) -> Path:
    """Listing never opens an image, so empty files will do."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_classes_and_files_are_in_natural_order(tmp_path: Path) -> None:
    touch(tmp_path, "class10/b.png", "class9/img10.JPEG", "class9/img9.jpg", "class9/notes.txt", "class9/.hidden.png")
    images = list_images(tmp_path)
    assert images.class_names == ["class9", "class10"]
    assert images.names == ["img9.jpg", "img10.JPEG", "b.png"]
    assert images.targets.tolist() == [0, 0, 1]


def test_a_class_absent_from_one_part_does_not_shift_the_others(tmp_path: Path) -> None:
    touch(tmp_path, *(f"split_part_{part}/{name}/{part}.png" for part in range(1, 6) for name in ("ant", "bee", "cat")))
    (tmp_path / "split_part_2/ant/2.png").unlink()
    images = list_images(tmp_path)
    target_of = {
        path.relative_to(tmp_path).as_posix(): target for path, target in zip(images.paths, images.targets, strict=True)
    }
    assert target_of["split_part_2/bee/2.png"] == 1
    assert target_of["split_part_2/cat/2.png"] == 2


def test_the_order_is_the_same_whether_or_not_the_folder_is_cut(image_folder: Callable[..., Path]) -> None:
    whole, cut = list_images(image_folder("whole")), list_images(image_folder("cut", five_parts=True))
    assert whole.names == cut.names
    assert whole.targets.tolist() == cut.targets.tolist()
    assert cut.folds.tolist() == [0, 1, 2, 3, 4] * 3


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["ant/1.png", "bee/2.png"], ["1.png", "2.png"]),
        (["ant/1.png", "bee/1.png"], ["ant/1.png", "bee/1.png"]),
        (["train/ant/1.png", "val/bee/1.png"], ["ant/1.png", "bee/1.png"]),
        (["train/ant/1.png", "val/ant/1.png"], ["train/ant/1.png", "val/ant/1.png"]),
    ],
)
def test_names_are_as_short_as_they_can_be_and_never_collide(
    tmp_path: Path, files: list[str], names: list[str]
) -> None:
    assert list_images(touch(tmp_path, *files)).names == names


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    images = list_images(touch(tmp_path, "1.png", "2.png"))
    assert images.targets.tolist() == [-1, -1]
    assert images.class_names == [] and not images.has_labels


@pytest.mark.parametrize("header", ["file,label\n", "image_id,class\n", ""])
def test_a_label_file_gives_a_flat_folder_its_classes(tmp_path: Path, header: str) -> None:
    touch(tmp_path / "images", "1.png", "2.png")
    (tmp_path / "labels.csv").write_text(f"{header}2.png,ant\n1.png,bee\nelsewhere.png,cat\n")
    images = list_images(tmp_path / "images", labels=tmp_path / "labels.csv")
    assert images.class_names == ["ant", "bee", "cat"]
    assert images.targets.tolist() == [1, 0]


def test_whole_numbers_as_labels_are_class_indices(tmp_path: Path) -> None:
    touch(tmp_path / "images", "1.png", "2.png")
    (tmp_path / "labels.csv").write_text("1.png,10\n2.png,02\n")
    assert list_images(tmp_path / "images", labels=tmp_path / "labels.csv").targets.tolist() == [10, 2]


def test_the_official_ground_truth_is_translated_by_the_development_kit(tmp_path: Path) -> None:
    touch(tmp_path / "images", "ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000003.JPEG")
    (tmp_path / "truth.txt").write_text("2\n1\n3\n")
    synset = np.dtype([("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    rows = [(1, "n03", 0), (2, "n02", 0), (3, "n01", 0), (4, "n00", 3)]  # the last is an inner node, not a class
    scipy.io.savemat(tmp_path / "meta.mat", {"synsets": np.array(rows, dtype=synset)})
    images = list_images(tmp_path / "images", labels=tmp_path / "truth.txt")
    assert images.class_names == ["n01", "n02", "n03"]
    assert images.targets.tolist() == [1, 0]


def test_images_of_another_split_do_not_get_the_ground_truth_of_the_validation_images(tmp_path: Path) -> None:
    touch(tmp_path / "images", "ILSVRC2012_test_00000001.JPEG")
    (tmp_path / "truth.txt").write_text("1\n")
    synset = np.dtype([("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    scipy.io.savemat(tmp_path / "meta.mat", {"synsets": np.array([(1, "n03", 0), (2, "n02", 0)], dtype=synset)})
    with pytest.raises(ValueError, match="ILSVRC2012_test_00000001.JPEG: not a name of the 1 images of"):
        list_images(tmp_path / "images", labels=tmp_path / "truth.txt")


def test_images_of_one_class_and_name_are_in_the_order_of_their_paths(tmp_path: Path) -> None:
    touch(tmp_path, "b/ant/2.png", "b/ant/10.png", "a/ant/10.png", "a/Bee/1.png")
    assert list_images(tmp_path).names == ["b/ant/2.png", "a/ant/10.png", "b/ant/10.png", "a/Bee/1.png"]


def test_a_class_map_numbers_the_classes(tmp_path: Path) -> None:
    touch(tmp_path / "images", "ant/1.png", "bee/2.png")
    (tmp_path / "map.txt").write_text("bee\nwasp\nant\n")
    images = list_images(tmp_path / "images", class_map=tmp_path / "map.txt")
    assert images.class_names == ["bee", "wasp", "ant"]
    assert images.targets.tolist() == [2, 0]


def test_a_circle_of_links_is_walked_once(tmp_path: Path) -> None:
    touch(tmp_path, "ant/1.png", "bee/2.png")
    (tmp_path / "ant" / "again").symlink_to(tmp_path)
    assert list_images(tmp_path).names == ["1.png", "2.png"]


def bad_folders(root: Path) -> dict[str, tuple[Path, str]]:
    """Folders that cannot be listed, each with the message that it gets."""
    (root / "empty").mkdir()
    touch(root, "file.png", "text/notes.txt", "mixed/1.png", "mixed/ant/2.png")
    touch(root / "missing", *(f"split_part_{part}/ant/{part}.png" for part in (1, 2, 4, 5)))
    touch(root / "stray", "ant/1.png", *(f"split_part_{part}/ant/{part}.png" for part in range(1, 6)))
    touch(root / "hollow", *(f"split_part_{part}/ant/{part}.png" for part in range(1, 5)))
    (root / "hollow/split_part_5").mkdir()
    return {
        "absent": (root / "absent", "absent does not exist"),
        "file": (root / "file.png", "is a file; name the folder"),
        "empty": (root / "empty", "holds no images"),
        "no images": (root / "text", "holds no images"),
        "mixed": (root / "mixed", "1.png lies beside the class folders"),
        "missing part": (root / "missing", "but not split_part_3"),
        "stray class": (root / "stray", "ant/1.png lies outside the five parts"),
        "hollow part": (root / "hollow", "split_part_5 holds no images"),
    }


@pytest.mark.parametrize(
    "case", ["absent", "file", "empty", "no images", "mixed", "missing part", "stray class", "hollow part"]
)
def test_a_bad_folder_gets_one_clear_line(tmp_path: Path, case: str) -> None:
    folder, message = bad_folders(tmp_path)[case]
    with pytest.raises((OSError, ValueError), match=message):
        list_images(folder)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("1.png,ant\n", "has no label for 2.png"),
        ("1.png,ant,x\n", "row 1 has 3 columns instead of 2"),
        ("1.png,ant\n2.png,ant\n1.png,bee\n", "row 3 labels 1.png a second time"),
        ("5\n7\n", "put the development kit's meta.mat beside it"),
    ],
)
def test_a_bad_label_file_gets_one_clear_line(tmp_path: Path, labels: str, message: str) -> None:
    touch(tmp_path / "images", "1.png", "2.png")
    (tmp_path / "labels.csv").write_text(labels)
    with pytest.raises((OSError, ValueError), match=message):
        list_images(tmp_path / "images", labels=tmp_path / "labels.csv")


def test_a_class_map_that_would_run_code_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "ant/1.png", "map.pkl")
    with pytest.raises(ValueError, match="map.pkl: only text files are read, .* timm's pickles may run code"):
        list_images(tmp_path, class_map=tmp_path / "map.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1.png,caf\xe9\n".encode("latin-1"), "labels.csv is not UTF-8 text; save it as UTF-8"),
        ("1.png,ant\n".encode("utf-16"), "labels.csv is not UTF-8 text"),
        (b"1.png," + b"a" * 200_000, "labels.csv is not a CSV file .*; give rows of file,label"),
    ],
    ids=["Latin-1", "UTF-16", "an endless cell"],
)
def test_a_label_file_that_is_no_text_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    touch(tmp_path / "images", "1.png")
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list_images(tmp_path / "images", labels=tmp_path / "labels.csv")


@pytest.mark.parametrize(
    ("class_map", "message"), [("ant\n", "'bee' is not in the class map"), ("ant\nbee\nant\n", "more than once")]
)
def test_a_bad_class_map_gets_one_clear_line(tmp_path: Path, class_map: str, message: str) -> None:
    touch(tmp_path / "images", "ant/1.png", "bee/2.png")
    (tmp_path / "map.txt").write_text(class_map)
    with pytest.raises(ValueError, match=message):
        list_images(tmp_path / "images", class_map=tmp_path / "map.txt")


@pytest.mark.parametrize(
    ("name", "message"), [("map.txt", "map.txt is not UTF-8 text"), ("map.csv", "map.csv: only text files are read")]
)
def test_a_class_map_that_is_no_text_is_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    touch(tmp_path / "images", "ant/1.png")
    (tmp_path / name).write_bytes("ant\n".encode("utf-16"))
    with pytest.raises(ValueError, match=message):
        list_images(tmp_path / "images", class_map=tmp_path / name)


@pytest.mark.parametrize(
    ("name", "truth", "message"),
    [
        ("ILSVRC2012_val_00000003.png", "2\n1\n", "not a name of the 2 images of"),
        ("photo.png", "2\n1\n", "not a name of the 2 images of"),
        ("ILSVRC2012_val_00000002.png", "2\n9\n", "row 2 is '9', not an ILSVRC2012 id that meta.mat knows"),
        ("ILSVRC2012_val_00000002.png", "2\nn01\n", "row 2 is 'n01', not an ILSVRC2012 id that meta.mat knows"),
    ],
)
def test_a_ground_truth_that_does_not_fit_the_images_is_refused(
    tmp_path: Path, name: str, truth: str, message: str
) -> None:
    touch(tmp_path / "images", name)
    (tmp_path / "truth.txt").write_text(truth)
    synset = np.dtype([("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    rows = np.array([(1, "n02", 0), (2, "n01", 0)], dtype=synset)
    scipy.io.savemat(tmp_path / "meta.mat", {"synsets": rows})
    with pytest.raises(ValueError, match=message):
        list_images(tmp_path / "images", labels=tmp_path / "truth.txt")


def test_labels_beside_class_folders_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "images", "ant/1.png")
    (tmp_path / "labels.csv").write_text("1.png,ant\n")
    with pytest.raises(ValueError, match="would contradict them"):
        list_images(tmp_path / "images", labels=tmp_path / "labels.csv")


targets_of_classes = st.lists(st.integers(0, 4), min_size=5, max_size=200)


@given(targets_of_classes, st.randoms())
def test_folds_are_complete_balanced_and_do_not_depend_on_the_order(targets: list[int], random) -> None:
    names = [f"{target}/{index}.png" for index, target in enumerate(targets)]
    folds = balanced_folds(names, np.array(targets))
    sizes = np.bincount(folds, minlength=5)
    assert sizes.sum() == len(names) and sizes.max() - sizes.min() <= 1
    for target in set(targets):
        counts = np.bincount(folds[np.array(targets) == target], minlength=5)
        assert counts.max() - counts.min() <= 1
    order = random.sample(range(len(names)), len(names))
    shuffled = balanced_folds([names[index] for index in order], np.array(targets)[order])
    assert shuffled.tolist() == folds[order].tolist()


def test_folds_of_a_plain_folder_never_change() -> None:
    # written down so that a weight trained today still knows tomorrow which images it has not seen
    names = [f"image_{index}.png" for index in range(10)]
    assert balanced_folds(names, np.zeros(10, dtype=int)).tolist() == [0, 1, 3, 0, 4, 2, 4, 1, 2, 3]


@given(st.lists(st.text(max_size=8), max_size=20))
def test_natural_order_takes_any_text(names: list[str]) -> None:
    assert sorted(sorted(names, key=natural_key), key=natural_key) == sorted(reversed(names), key=natural_key)


def test_natural_order_counts() -> None:
    assert sorted(["b2", "b10", "a", "B1"], key=natural_key) == ["a", "B1", "b2", "b10"]
