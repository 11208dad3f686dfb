"""Which class an image is of: class folders, class maps and label files, in all the shapes that people have them."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from test_images import touch

from clcnet.data.images import list_images


def classes_of(folder: Path, **options: object) -> dict[str, str]:
    """By file, the name of its class."""
    images = list_images(folder, **options)  # type: ignore[arg-type]
    return {file: images.class_names[target] for file, target in zip(images.files, images.targets, strict=True)}


# ---------------------------------------------------------------- label files

LABEL_FILES = {
    "commas": "1.png,ant\n2.png,bee\n",
    "a header": "file,label\n1.png,ant\n2.png,bee\n",
    "a header in German": "Bild;Klasse\n1.png;ant\n2.png;bee\n",
    "other images": "image_id,class\n1.png,ant\n2.png,bee\nelsewhere.png,cat\n",
    "Caffe's val.txt": "1.png ant\n2.png bee\n",
    "tabs": "1.png\tant\r\n2.png\tbee\r\n",
    "semicolons": "1.png;ant\n2.png;bee\n",
    "a byte-order mark and quotes": '\ufeff"1.png","ant"\n"2.png","bee"\n',
    "ids": "id,label\n1,ant\n2,bee\n",
    "ids without a header": "1,ant\n2,bee\n",
    "a foreign path": "/content/images/1.png,ant\n/content/images/2.png,bee\n",
    "a Windows path": "images\\1.png,ant\nimages\\2.png,bee\n",
    "a dot": "./1.png,ant\n./2.png,bee\n",
    "capitals": "1.PNG,ant\n2.PNG,bee\n",
    "the label first": "label,file\nant,1.png\nbee,2.png\n",
    "a comma at the end": "1.png,ant,\n2.png,bee,\n",
    "paths of several splits": "train/1.png,bee\nimages/1.png,ant\nimages/2.png,bee\n",
    "twice the same": "1.png,ant\n2.png,bee\n1.png,ant\n",
}


@pytest.mark.parametrize("content", LABEL_FILES.values(), ids=LABEL_FILES)
def test_a_label_file_is_read_in_all_its_shapes(tmp_path: Path, content: str) -> None:
    touch(tmp_path / "images", "1.png", "2.png")
    (tmp_path / "labels.csv").write_bytes(content.encode())
    images = list_images(tmp_path / "images", labels=tmp_path / "labels.csv")
    assert [images.class_names[target] for target in images.targets] == ["ant", "bee"]
    assert images.class_names == ["ant", "bee", "cat"][: len(images.class_names)] and images.classes_by == "labels"
    assert any("matched by file name alone" in note for note in images.notes) == ("/content" in content)


@pytest.mark.parametrize(
    ("content", "classes"),
    [
        ("1.png,10\n2.png,02\n", ["2", "10"]),
        ("1.png,10.0\n2.png,2.0\n", ["2", "10"]),  # pandas, where a cell of the column is empty
        ("file,label\n1.png,10\n2.png,2\n3.png,\n", ["2", "10"]),  # an image that is not there
        ("1.png,10\n2.png,2\n3.png,-1\n", ["2", "10"]),
        ("1.png,10\n2.png,2\n3.png,none\n", ["2", "10"]),
        ("1.png,10\n2.png,2\n3.png,other\n", ["2", "10", "other"]),
        ("1.png,10\n2.png,2\n3.png,0\n", ["0", "2", "10"]),
    ],
)
def test_numbers_are_kept_as_numbers_whatever_stands_beside_them(
    tmp_path: Path, content: str, classes: list[str]
) -> None:
    touch(tmp_path / "images", "1.png", "2.png")
    (tmp_path / "labels.csv").write_text(content)
    images = list_images(tmp_path / "images", labels=tmp_path / "labels.csv")
    assert images.class_names == classes
    assert [images.class_names[target] for target in images.targets] == ["10", "2"]


def test_names_are_found_in_another_unicode_form(tmp_path: Path) -> None:
    touch(tmp_path / "images", unicodedata.normalize("NFD", "café.png"))
    (tmp_path / "labels.csv").write_text(f"café.png,{unicodedata.normalize('NFD', 'été')}\n", encoding="utf-8")
    assert list_images(tmp_path / "images", labels=tmp_path / "labels.csv").class_names == ["été"]
    touch(tmp_path / "folders", unicodedata.normalize("NFD", "été") + "/1.png")
    (tmp_path / "map.txt").write_text("hiver\nété\n", encoding="utf-8")
    assert list_images(tmp_path / "folders", class_map=tmp_path / "map.txt").targets.tolist() == [1]


def test_a_name_below_another_folder_is_another_image(tmp_path: Path) -> None:
    touch(tmp_path / "images", "a.png", "x/1.png", "y/1.png")
    (tmp_path / "labels.csv").write_text("a.png,ant\ny/1.png,bee\nx/1.png,cat\n")
    options = {"labels": tmp_path / "labels.csv", "any_folder": True}
    assert classes_of(tmp_path / "images", **options) == {"a.png": "ant", "y/1.png": "bee", "x/1.png": "cat"}
    (tmp_path / "labels.csv").write_text("a.png,ant\ny/1.png,bee\nz/1.png,cat\n")
    with pytest.raises(ValueError, match="has no label for x/1.png"):
        list_images(tmp_path / "images", labels=tmp_path / "labels.csv", any_folder=True)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (b"1.png,ant\n", "has no label for 2.png"),
        (b"1.png,ant\n2.jpg,ant\n", "has no label for 2.png"),
        (b"1.png,ant\n2.png,\n", "row 2 has no label for 2.png"),
        (b"file,label\n1.png,ant\n2.png\n", "row 3 has no label for 2.png"),
        (b"1.png,3\n2.png,nan\n", "row 2 has no label for 2.png"),
        (b"1.png,3\n2.png,-1\n", "row 2 has no label for 2.png"),
        (b"1.png,ant,x\n", "row 1 has 3 columns instead of 2"),
        (b"1.png,ant\n2.png,ant\n1.png,bee\n", "row 3 labels 1.png a second time"),
        (b"a/1.png,ant\nb/1.png,bee\n2.png,ant\n", "row 2 labels b/1.png a second time"),
        (b"", "is empty"),
        (b"5\n7\n", "1.png: not a name of the 2 images of .*; for other images give rows of file,label"),
        ("1.png,café\n".encode("latin-1"), "labels.csv is not UTF-8 text; save it as UTF-8"),
        ("1.png,ant\n".encode("utf-16"), "labels.csv is not UTF-8 text"),
        (b"1.png," + b"a" * 200_000, "labels.csv: line 1 has 200,006 characters"),
    ],
)
def test_a_bad_label_file_gets_one_clear_line(tmp_path: Path, labels: bytes, message: str) -> None:
    touch(tmp_path / "images", "1.png", "2.png")
    (tmp_path / "labels.csv").write_bytes(labels)
    with pytest.raises((OSError, ValueError), match=message):
        list_images(tmp_path / "images", labels=tmp_path / "labels.csv")


def test_labels_beside_class_folders_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "images", "ant/1.png")
    (tmp_path / "labels.csv").write_text("1.png,ant\n")
    with pytest.raises(ValueError, match="would contradict them"):
        list_images(tmp_path / "images", labels=tmp_path / "labels.csv")


# ---------------------------------------------------------------- ILSVRC2012's ground truth


def truth(tmp_path: Path, lines: str, *images: str, meta: bool = True) -> dict[str, Path]:
    """A ground truth, and the development kit that knows three classes."""
    touch(tmp_path / "images", *images)
    (tmp_path / "truth.txt").write_text(lines)
    synset = np.dtype([("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    rows = [(1, "n03", 0), (2, "n02", 0), (3, "n01", 0), (4, "n00", 3)]  # the last is an inner node, not a class
    if meta:
        scipy.io.savemat(tmp_path / "meta.mat", {"synsets": np.array(rows, dtype=synset)})
    return {"labels": tmp_path / "truth.txt"}


def test_the_official_ground_truth_is_translated_by_the_development_kit(tmp_path: Path) -> None:
    options = truth(tmp_path, "2\n1\n3\n", "ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000003.JPEG")
    images = list_images(tmp_path / "images", **options)
    assert images.class_names == ["n01", "n02", "n03"]
    assert images.targets.tolist() == [1, 0]


def test_a_ground_truth_of_wordnet_ids_needs_no_translation(tmp_path: Path) -> None:
    lines = "n00000002\nn00000001\nn00000003\n"
    options = truth(tmp_path, lines, "ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000003.JPEG", meta=False)
    images = list_images(tmp_path / "images", **options)
    assert images.class_names == ["n00000001", "n00000002", "n00000003"] and images.targets.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("ILSVRC2012_val_00000003.png", "2\n1\n", "not a name of the 2 images of"),
        ("ILSVRC2012_test_00000001.png", "2\n1\n", "not a name of the 2 images of"),
        ("ILSVRC2012_val_00000002.png", "2\n9\n", "row 2 is '9', not an ILSVRC2012 id that meta.mat knows"),
        ("ILSVRC2012_val_00000002.png", "2\nn01\n", "row 2 is 'n01', not an ILSVRC2012 id that meta.mat knows"),
    ],
)
def test_a_ground_truth_that_does_not_fit_the_images_is_refused(
    tmp_path: Path, name: str, lines: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list_images(tmp_path / "images", **truth(tmp_path, lines, name))


def test_a_ground_truth_without_the_development_kit_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="put the development kit's meta.mat beside it"):
        list_images(tmp_path / "images", **truth(tmp_path, "2\n", "ILSVRC2012_val_00000001.JPEG", meta=False))


# ---------------------------------------------------------------- class maps


@pytest.mark.parametrize(
    "content",
    [
        "bee\nwasp\nant\n",
        "\ufeffbee\r\n\r\nwasp\r\nant\r\n",
        "bee Apis mellifera\nwasp Vespula\nant Formica, of any kind\n",
        "bee\tApis\nwasp\tVespula\nant\tFormica\n",
        "0 bee\n1 wasp\n2 ant\n",
        "1: bee\n2: wasp\n3: ant\n",
        "ant 2\nbee 0\nwasp 1\n",
    ],
)
def test_a_class_map_is_read_in_all_its_shapes(tmp_path: Path, content: str) -> None:
    touch(tmp_path / "images", "ant/1.png", "bee/2.png")
    (tmp_path / "map.txt").write_bytes(content.encode())
    images = list_images(tmp_path / "images", class_map=tmp_path / "map.txt")
    assert images.class_names == ["bee", "wasp", "ant"] and images.classes_by == "map"
    assert images.targets.tolist() == [2, 0]


def test_whole_lines_come_before_their_first_words(tmp_path: Path) -> None:
    touch(tmp_path / "images", "golden eagle/1.png", "golden retriever/2.png")
    (tmp_path / "map.txt").write_text("golden retriever\ngolden eagle\n")
    assert list_images(tmp_path / "images", class_map=tmp_path / "map.txt").targets.tolist() == [1, 0]


def test_synset_words_name_classes_where_no_folder_does(tmp_path: Path) -> None:
    touch(tmp_path / "images", "1.png")
    (tmp_path / "map.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n")
    assert list_images(tmp_path / "images", class_map=tmp_path / "map.txt").class_names == ["n01440764", "n01443537"]


@pytest.mark.parametrize(("numbers", "names"), [("02", "ac"), ("13", "ac"), ("0", "a"), ("3", "c")])
def test_numbers_as_labels_number_the_lines_of_a_class_map(tmp_path: Path, numbers: str, names: str) -> None:
    touch(tmp_path / "images", *(f"{number}.png" for number in numbers))
    (tmp_path / "map.txt").write_text("a\nb\nc\n")
    (tmp_path / "labels.csv").write_text("".join(f"{number}.png,{number}\n" for number in numbers))
    options = {"labels": tmp_path / "labels.csv", "class_map": tmp_path / "map.txt"}
    assert "".join(classes_of(tmp_path / "images", **options).values()) == names


def test_numbers_that_may_be_counted_from_0_or_1_are_not_guessed(tmp_path: Path) -> None:
    touch(tmp_path / "images", "1.png")
    (tmp_path / "map.txt").write_text("a\nb\nc\n")
    (tmp_path / "labels.csv").write_text("1.png,1\n")
    with pytest.raises(ValueError, match="class '1' is not in the class map"):
        list_images(tmp_path / "images", labels=tmp_path / "labels.csv", class_map=tmp_path / "map.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("map.txt", "ant\n", r"class 'bee' is not in the class map .* \(ant\); add a line for it"),
        ("map.txt", "ant\nbee\nant\n", "names 'ant' more than once"),
        ("map.pkl", "", "map.pkl: only text files are read, .* timm's pickles may run code"),
        ("map.csv", "", "map.csv: only text files are read"),
        ("map.txt", None, "map.txt is not UTF-8 text"),
    ],
)
def test_a_bad_class_map_gets_one_clear_line(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    touch(tmp_path / "images", "ant/1.png", "bee/2.png")
    (tmp_path / name).write_bytes("ant\n".encode("utf-16") if content is None else content.encode())
    with pytest.raises(ValueError, match=message):
        list_images(tmp_path / "images", class_map=tmp_path / name)


# ---------------------------------------------------------------- nested folders

NESTED = {
    "years inside of classes": ["ant/1/a.png", "ant/2/b.png", "bee/1/c.png"],
    "classes inside of years": ["1/ant/a.png", "2/ant/b.png", "1/bee/c.png"],
    "a folder inside of a class": ["ant/a.png", "ant/more/b.png", "bee/c.png"],
}


@pytest.mark.parametrize("files", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("wrapped", ["", "photos/all/"])
def test_which_of_two_folders_is_the_class_is_not_guessed_but_settled_by_names(
    tmp_path: Path, files: list[str], wrapped: str
) -> None:
    root = touch(tmp_path / "images", *(wrapped + file for file in files))
    with pytest.raises(ValueError, match="the class may be the innermost folder or the outermost; give a --class-map"):
        list_images(root)
    images = list_images(root, any_folder=True)
    assert not images.has_labels and "no folder is taken for a class" in images.notes[0]
    (tmp_path / "map.txt").write_text("bee\nant\n")
    expected = {"a.png": "ant", "b.png": "ant", "c.png": "bee"}
    for options in ({"class_map": tmp_path / "map.txt"}, {"model_classes": ["ant", "bee", "cat"]}):
        found = classes_of(root, **options)
        assert {file.rpartition("/")[2]: name for file, name in found.items()} == expected


def test_nested_folders_that_timm_and_torchvision_see_otherwise_are_said(tmp_path: Path) -> None:
    images = list_images(touch(tmp_path, "insects/ant/1.png", "insects/bee/2.png", "fish/tench/3.png"))
    assert images.class_names == ["ant", "bee", "tench"]
    assert images.notes == [
        "the classes are the innermost folders (ant, bee, tench), as in timm, not the outermost (fish, insects)"
    ]
    assert list_images(touch(tmp_path / "insects")).notes == []


def test_a_map_that_knows_no_folder_is_said(tmp_path: Path) -> None:
    touch(tmp_path / "images", "june/1.png")
    (tmp_path / "map.txt").write_text("ant\n")
    images = list_images(tmp_path / "images", class_map=tmp_path / "map.txt", any_folder=True)
    assert images.targets.tolist() == [-1] and images.class_names == ["ant"]
    assert "no folder is in the class map" in images.notes[0]


@pytest.mark.parametrize("splits", [("train", "val"), ("Training", "test"), ("coco/train2017", "coco/val2017")])
@pytest.mark.parametrize("any_folder", [True, False])
def test_splits_are_not_merged(tmp_path: Path, splits: tuple[str, str], any_folder: bool) -> None:
    root = touch(tmp_path / "images", *(f"{split}/ant/{split[-1]}.png" for split in splits))
    with pytest.raises(ValueError, match=f"holds several splits .*; name the one that you mean, such as .*{splits[1]}"):
        list_images(root, any_folder=any_folder)
    assert len(list_images(root / splits[1])) == 1


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert list_images(touch(tmp_path, "bus/1.png", "train/2.png")).class_names == ["bus", "train"]
    touch(tmp_path, "test/3.png")
    (tmp_path / "map.txt").write_text("test\nbus\ntrain\n")
    assert list_images(tmp_path, class_map=tmp_path / "map.txt").targets.tolist() == [1, 0, 2]
