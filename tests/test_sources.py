"""Images from timm's data sets and from tar files: the rows of a folder of the same images, in a fixed order."""

import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import scripts
from PIL import Image
from scripts import EVALUATE_CUSTOM, EVALUATE_FOLDS, GENERATE, Workshop, refusal

from clcnet.data.images import errors_file, image_keys, list_images
from clcnet.data.sources import DataSetOptions

CLASSES = ("ant", "bee", "cat")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture
def folder(image_folder: Callable[..., Path]) -> Path:
    """Fifteen images, one of which is broken."""
    folder = image_folder("images/test")
    (folder / "bee" / "bee_0002.png").write_bytes(b"broken")
    return folder


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_shards(to: Path, folder: Path, sidecar: str = "cls") -> Path:
    """Two shards of WebDataset with the images of a folder, in its order."""
    images = list_images(folder)
    for shard, places in enumerate(np.array_split(np.arange(len(images)), 2)):
        members = []
        for place in places:
            label = int(images.targets[place])
            content = str(label) if sidecar == "cls" else json.dumps({"class": label, "other": 7})
            stem = images.names[place].removesuffix(".png")
            members += [(f"{stem}.png", images.paths[place].read_bytes()), (f"{stem}.{sidecar}", content.encode())]
        write_tar(to / f"shard-{shard:04d}.tar", members)
    return to


def parquet_of(folder: Path, to: Path, names: bool = True) -> Path:
    """A data set of Hugging Face's as most are: bytes of images in Parquet, classes that it names and numbers."""
    import datasets

    images = list_images(folder)
    cells = [{"bytes": path.read_bytes(), "path": path.name if names else None} for path in images.paths]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    data = datasets.Dataset.from_dict({"image": cells, "label": images.targets.tolist()}, features)
    to.mkdir()
    data.to_parquet(to / "test-0.parquet")
    return to


def source(kind: str, folder: Path, tmp_path: Path) -> list[object]:
    """The images of a folder in another form: its name, and flags."""
    if kind == "tar":
        write_tar(tmp_path / "a.tar", ((f"./{p.relative_to(folder)}", p.read_bytes()) for p in folder.rglob("*.png")))
        return [tmp_path / "a.tar"]
    if kind == "wds":
        return [f"wds/{write_shards(tmp_path / 'shards', folder)}"]
    if kind == "wds json":
        shards = write_shards(tmp_path / "shards", folder, "json")
        return [f"wds/{shards}/shard-{{0000..0001}}.tar", "--target-key", "class"]
    if kind == "parquet":
        return [f"hfds/{parquet_of(folder, tmp_path / 'data')}"]
    if kind == "torch":
        shutil.copytree(folder, tmp_path / "root" / "validation")
        return ["torch/image_folder", "--data-dir", tmp_path / "root"]
    return [f"{kind}/{folder.parent}", "--split", "test"]


KINDS = ["tar", "wds", "wds json", "hfds", "hfids", "parquet", "torch"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_gives_the_table_of_the_folder_and_the_broken_image_is_named(
    workshop: Workshop, folder: Path, tmp_path: Path, kind: str
) -> None:
    command = [*workshop.command(GENERATE, tmp_path / "folder"), "--data-path", folder]
    assert scripts.run(GENERATE, *command).code == 3
    command = [*workshop.command(GENERATE, tmp_path / "out"), "--data-path", *source(kind, folder, tmp_path)]
    finished = scripts.run(GENERATE, *command, "--workers", 2)
    assert finished.code == 3, finished
    expected, found = (tmp_path / name / "table.csv" for name in ("folder", "out"))
    assert found.read_bytes() == expected.read_bytes()
    assert errors_file(found).read_text() == "file,reason\nbee_0002.png,cannot identify image file\n"
    again = scripts.run(GENERATE, *command)
    assert again.code == 3 and "14 of 15 images were classified before" in again.out
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("kind", ["tar", "wds", "hfids"])
def test_steps_4_and_5_take_data_sets(workshop: Workshop, folder: Path, tmp_path: Path, kind: str) -> None:
    images = source(kind, folder, tmp_path)
    finished = scripts.run(EVALUATE_CUSTOM, *workshop.command(EVALUATE_CUSTOM, tmp_path), "--custom-data", *images)
    assert finished.code == 3, finished
    rows = (tmp_path / "custom-data-result.csv").read_text().splitlines()[1:]
    names = [row.split(",")[0].rpartition("/")[2] for row in rows]
    assert names == [f"{name}_{index:04d}.png" for name in CLASSES for index in range(5) if (name, index) != ("bee", 2)]
    words = workshop.command(EVALUATE_FOLDS, tmp_path)
    finished = scripts.run(EVALUATE_FOLDS, *words, "--imagenet-split", *images)
    assert finished.code in (2, 3), finished  # the weights' folds are those of other images


def test_keys_tell_images_apart_and_change_with_what_holds_them(folder: Path, tmp_path: Path) -> None:
    for kind in ("tar", "wds", "hfds", "hfids", "parquet"):
        (tmp_path / kind).mkdir()
        name, *_ = source(kind, folder, tmp_path / kind)
        keys = [image_keys(list_images(name)) for _ in range(2)]  # type: ignore[arg-type]
        assert len(np.unique(keys[0], axis=0)) == 15 and (keys[0] == keys[1]).all(), kind
    (folder / "ant" / "ant_0000.png").write_bytes(b"other")
    write_shards(tmp_path / "wds" / "shards", folder)
    for kind in ("wds", "hfids"):
        name = f"wds/{tmp_path}/wds/shards" if kind == "wds" else f"hfids/{folder.parent}"
        assert (image_keys(list_images(name))[0] != keys[0][0]).any(), kind


def test_images_without_names_are_called_by_their_numbers(folder: Path, tmp_path: Path) -> None:
    images = list_images(f"hfds/{parquet_of(folder, tmp_path / 'data', names=False)}")
    assert images.names == [f"{number:02d}" for number in range(15)]
    assert images.class_names == [*CLASSES] and images.classes_by == "data set"


def test_shards_that_repeat_their_keys_name_images_by_shard_and_key(tmp_path: Path) -> None:
    for shard in "ab":
        write_tar(tmp_path / "shards" / f"{shard}.tar", [("1.jpg", b"x"), ("1.cls", b"2"), ("2.txt", b"no image")])
    images = list_images(f"wds/{tmp_path}/shards")
    assert images.names == ["a/1.jpg", "b/1.jpg"] and images.targets.tolist() == [2, 2]
    assert list(images.passed_over) == ["a/2", "b/2"] and "only txt" in images.passed_over["a/2"]


def test_a_class_map_and_missing_labels(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text("cat\nwasp\nbee\nant\n")
    name = f"hfds/{parquet_of(folder, tmp_path / 'data')}"
    images = list_images(name, class_map=tmp_path / "map.txt")
    assert (
        images.class_names == ["cat", "wasp", "bee", "ant"] and images.targets.tolist() == [3] * 5 + [2] * 5 + [0] * 5
    )
    write_tar(tmp_path / "shards" / "0.tar", [("1.jpg", b"x"), ("2.jpg", b"y"), ("2.cls", b"-1")])
    assert not list_images(f"wds/{tmp_path}/shards").has_labels


def test_a_stream_that_gives_pictures_alone_is_kept_without_loss(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tfds does, which decodes by itself; its library is not among those of the tests."""
    (folder / "bee" / "bee_0002.png").unlink()
    pictures = [Image.open(path).convert("RGB") for path in list_images(folder).paths]

    class Reader(list):  # type: ignore[type-arg]
        class_to_idx = {name: index for index, name in enumerate(CLASSES)}

    stream = Reader(zip(pictures, list_images(folder).targets, strict=True))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", sys)
    monkeypatch.setattr("timm.data.readers.reader_factory.create_reader", lambda *_, **__: stream)
    images = list_images("tfds/insects", options=DataSetOptions(split="test"))
    assert images.targets.tolist() == [0] * 5 + [1] * 4 + [2] * 5
    for place, picture in enumerate(pictures):
        with Image.open(images.open(place)) as kept:  # type: ignore[arg-type]
            assert kept.tobytes() == picture.tobytes()


def test_a_data_set_of_torchvisions_that_lies_in_memory_is_called_by_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dataset:  # as CIFAR-10, whose files cannot be made up
        data = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
        targets = [1, 0, 1]
        classes = ["plane", ("car", "motor car")]

        def __getitem__(self, place: int) -> tuple[Image.Image, int]:
            return Image.fromarray(self.data[place]), self.targets[place]

        def __len__(self) -> int:
            return 3

    monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: Dataset())
    images = list_images("torch/cifar10", options=DataSetOptions(data_dir="data"))
    assert images.names == ["0", "1", "2"] and images.targets.tolist() == [1, 0, 1]
    assert images.class_names == ["plane", "car, motor car"]
    assert images.open(2).tobytes() == Dataset.data[2].tobytes()  # type: ignore[union-attr]
    before = image_keys(images)
    monkeypatch.setattr(Dataset, "data", Dataset.data + 1)
    after = image_keys(list_images("torch/cifar10", options=DataSetOptions(data_dir="data")))
    assert len(np.unique(before, axis=0)) == 3 and (before != after).any(axis=1).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hfds/nobody/nothing"], "hfds/nobody/nothing cannot be read"),
        (["wds/absent/x.tar"], "wds/absent/x.tar cannot be read"),
        (["wds/FOLDER"], "holds no .tar files"),
        (["hfds/SPLITS"], "it holds several splits: .*; give one of them as --split"),
        (["hfds/FOLDER", "--target-key", "colour"], "colour"),
        (["torch/cifar10"], "give --data-dir"),
        (["torch/cifar10", "--data-dir", "FOLDER"], "Dataset not found"),
        (["tfds/mnist"], "needs the library tensorflow_datasets .*; pip install tensorflow_datasets"),
        (["FOLDER", "--split", "test"], "is not the name of a data set"),
        (["hfds/FOLDER", "--labels", "x.csv"], "has labels of its own"),
        (["BROKEN.tar"], "is no tar file, or a compressed one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_data_set_that_cannot_be_had_is_one_line(
    workshop: Workshop, folder: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    if words[0] == "hfds/SPLITS":
        shutil.copytree(folder, folder.parent / "train")
    (tmp_path / "BROKEN.tar").write_bytes(b"no tar" * 1000)
    places = {"FOLDER": str(folder.parent), "SPLITS": str(folder.parent), "BROKEN": str(tmp_path / "BROKEN")}
    for word, place in places.items():
        words = [each.replace(word, place) for each in words]
    line = refusal(scripts.run(GENERATE, *workshop.command(GENERATE, tmp_path / "out"), "--data-path", *words))
    assert message.partition(".*")[0] in line and message.rpartition(".*")[2] in line


def test_images_of_several_classes_each_are_refused(folder: Path, tmp_path: Path) -> None:
    import datasets

    (tmp_path / "data").mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": [datasets.Value("int64")]})
    cells = [{"bytes": list_images(folder).paths[0].read_bytes(), "path": None}]
    data = datasets.Dataset.from_dict({"image": cells, "label": [[0, 1]]}, features)
    data.to_parquet(tmp_path / "data" / "test-0.parquet")
    with pytest.raises(ValueError, match="data cannot be read"):
        list_images(f"hfds/{tmp_path / 'data'}")


def test_a_tar_file_of_other_things_is_listed_as_a_folder_is(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar", [("ant/1.png", b"x"), ("ant/.2.png", b"y"), ("__MACOSX/3.png", b"z"), ("ant/4.txt", b"")]
    )
    images = list_images(tmp_path / "a.tar")
    assert images.files == ["ant/1.png"] and images.class_names == ["ant"]
    assert images.passed_over == {
        "ant/.2.png": "hidden",
        "__MACOSX/3.png": "thumbnails or a system's folder",
        "ant/4.txt": "not decoded here: .txt",
    }
