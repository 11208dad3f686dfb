"""Step 3 from the command line to the file: content, going on, several processes, outputs left alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import forking
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scripts import CLASSES, GENERATE, interrupt_after
from timm.data import ImageDataset, create_loader, resolve_model_data_config

import generate_data_for_CLCNet as script
from clcnet import cli
from clcnet.classifiers.classifier import Classifier
from clcnet.data.images import list_images
from clcnet.data.outputs import Outputs

Factory = Callable[..., Path]
Generate = Callable[..., dict[str, object]]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(classifier_dir: Factory) -> str:
    return f"local-dir:{classifier_dir()}"


@pytest.fixture
def generate(model: str) -> Generate:
    def run(folder: Path, output: Path, *arguments: str) -> dict[str, object]:
        return script.main(script.get_args_parser().parse_args(command_line(folder, model, output, *arguments)))

    return run


def command_line(folder: Path, model: str, output: Path, *arguments: str) -> list[str]:
    fixed = ["--data-path", str(folder), "--model", model, "--output", str(output), "-j", "0", "--device", "cpu"]
    return [*fixed, "-b", "4", "--store", str(output.with_suffix(".store")), *arguments]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of a model sees."""
    calls: list[int] = []
    probabilities = Classifier.probabilities

    def count(self: Classifier, batch: torch.Tensor) -> torch.Tensor:
        calls.append(len(batch))
        return probabilities(self, batch)

    monkeypatch.setattr(Classifier, "probabilities", count)
    return calls


def expected_rows(folder: Path, model: str, **overrides: object) -> tuple[np.ndarray, np.ndarray]:
    """Sorted probabilities and labels by timm's own folder reader, loader and model, in timm's order."""
    network = timm.create_model(model, pretrained=True).eval()
    config = resolve_model_data_config(network, overrides)
    loader = create_loader(ImageDataset(folder), batch_size=4, device=torch.device("cpu"), num_workers=0, **config)
    with torch.inference_mode():
        batches = [(network(images).softmax(dim=1), labels) for images, labels in loader]
    probs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return probs.sort(dim=1, descending=True).values.numpy(), (probs.argmax(dim=1) == labels).numpy()


# ---------------------------------------------------------------- content


def test_tables_hold_what_timm_says_in_timms_order_and_the_second_one_runs_no_model(
    image_folder: Factory,
    generate: Generate,
    model: str,
    tmp_path: Path,
    seen: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = image_folder()
    Image.new("RGBA", (32, 32), (9, 9, 9, 100)).save(folder / "bee" / "glass.png")
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(folder / "cat" / "deep.png")
    names = [f"{name}_{index:04d}.png" for name in CLASSES for index in range(5)]
    probs, correct = expected_rows(folder, model)
    for suffix in (".csv", ".parquet"):
        outcome = generate(folder, tmp_path / f"table{suffix}")
        table = Outputs.load(tmp_path / f"table{suffix}")
        assert table.names == [*names[:10], "glass.png", *names[10:], "deep.png"]
        np.testing.assert_allclose(table.sorted_probs, probs, atol=1e-6, rtol=0)
        np.testing.assert_array_equal(table.correct, correct)
        assert outcome["top1"] == pytest.approx(100 * correct.mean())
        assert (outcome["num_images"], outcome["num_rows"], outcome["num_unreadable"]) == (17, 17, 0)
        assert seen == [4, 4, 4, 4, 1]
    assert 0 < correct.mean() < 1
    said = capsys.readouterr().out
    assert said.count("1 with transparency, which is dropped") == 2
    assert said.count("1 with values beyond 8 bits, which are clipped") == 2
    made = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert made == ["images", "table.csv", "table.parquet", "table.store"]


def test_preprocessing_overrides_reach_the_model(
    image_folder: Factory, generate: Generate, model: str, tmp_path: Path
) -> None:
    folder = image_folder(size=50)
    flags = ["--img-size", "40", "--crop-pct", "0.8", "--crop-mode", "squash", "--interpolation", "bilinear"]
    generate(folder, tmp_path / "t.csv", *flags)
    overrides = {"img_size": 40, "crop_pct": 0.8, "crop_mode": "squash", "interpolation": "bilinear"}
    np.testing.assert_allclose(
        Outputs.load(tmp_path / "t.csv").sorted_probs, expected_rows(folder, model, **overrides)[0], atol=1e-6, rtol=0
    )


def test_classes_come_from_folders_or_a_file_of_labels_in_the_order_of_a_class_map(
    image_folder: Factory, generate: Generate, tmp_path: Path
) -> None:
    folder, flat = image_folder(), tmp_path / "flat"
    generate(folder, tmp_path / "folders.csv")
    flat.mkdir()
    paths = list_images(folder).paths
    for path in paths:
        shutil.copy(path, flat)
    (tmp_path / "labels.csv").write_text("".join(f"{path.name},{path.parent.name}\n" for path in paths))
    generate(flat, tmp_path / "labels_table.csv", "--labels", str(tmp_path / "labels.csv"))
    assert (tmp_path / "labels_table.csv").read_bytes() == (tmp_path / "folders.csv").read_bytes()

    (tmp_path / "map.txt").write_text("cat\nbee\nant\n")
    generate(folder, tmp_path / "mapped.csv", "--class-map", str(tmp_path / "map.txt"))
    plain, mapped = Outputs.load(tmp_path / "folders.csv"), Outputs.load(tmp_path / "mapped.csv")
    np.testing.assert_array_equal(plain.sorted_probs, mapped.sorted_probs)
    bees = np.array([name.startswith("bee") for name in plain.names])
    np.testing.assert_array_equal(plain.correct[bees], mapped.correct[bees])
    assert not (plain.correct & mapped.correct)[~bees].any()


def test_real_images_give_the_known_accuracy(shared: Path, generate: Generate, tmp_path: Path) -> None:
    cifar = shared / "cifar10"
    for name in ("airplane", "cat"):
        shutil.copytree(cifar / "imagenet_splits_5" / "split_part_1" / name, tmp_path / "images" / name)
    model = ["--model", f"local-dir:{cifar / 'shallow'}", "-b", "100"]
    outcome = generate(tmp_path / "images", tmp_path / "t.csv", *model)
    # the other eight classes have no images here; names, not positions, tell that "cat" is the model's fourth class
    assert outcome["num_rows"] == 401 and outcome["top1"] == pytest.approx(73.8, abs=0.3)


def test_defaults_are_those_of_the_specification() -> None:
    args = script.get_args_parser().parse_args([])
    assert (args.model, args.data_path) == ("tf_efficientnet_b4.aa_in1k", cli.IMAGENET_SPLITS)
    for model, name in (
        ("tf_efficientnet_b4", "tf_efficientnet_b4"),
        ("local-dir:/some/where/deep/", "deep"),
        ("hf-hub:timm/resnet18.a1_in1k", "timm_resnet18_a1_in1k"),
    ):
        assert script.default_output(model) == cli.ROOT / f"{name}_output_ds_for_CLCNet.csv"


# ---------------------------------------------------------------- going on


def test_the_same_command_goes_on_after_the_last_whole_batch_and_ends_with_the_same_bytes(
    image_folder: Factory,
    generate: Generate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seen: list[int],
) -> None:
    folder, output = image_folder(), tmp_path / "t.csv"
    (folder / "ant" / "ant_0000b, empty.png").touch()
    generate(folder, tmp_path / "whole.csv")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt, match="kept in .*t.store; the same command goes on"):
            generate(folder, output)
    assert not output.exists()
    seen.clear()
    outcome = generate(folder, output, "--resume")
    printed = capsys.readouterr().out
    assert "7 of 16 images were classified before" in printed  # of eight, one could not be read
    assert seen == [1, 4, 4]  # the unreadable one is tried again, apart from the others
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert outcome["num_unreadable"] == 1 and outcome["num_rows"] == 15
    said = f"of 15 images, 1 unreadable ones left out ({output}.errors.csv)"
    assert said in printed.splitlines()[-1]
    errors = Path(f"{output}.errors.csv").read_text()
    assert errors == 'file,reason\n"ant_0000b, empty.png",cannot identify image file\n'


def test_what_determines_an_answer_is_looked_at_and_nothing_else(
    image_folder: Factory, classifier_dir: Factory, generate: Generate, tmp_path: Path, seen: list[int]
) -> None:
    folder = image_folder()
    generate(folder, tmp_path / "t.csv")
    for flags in (["--crop-mode", "squash"], ["--amp"], ["--channels-last"]):
        seen.clear()
        generate(folder, tmp_path / "t.csv", *flags)
        assert sum(seen) == 15, flags
    seen.clear()
    generate(folder, tmp_path / "t.csv", "--batch-size", "5", "--seed", "1")
    assert seen == []
    Image.new("RGB", (32, 32)).save(folder / "ant" / "ant_0002.png")  # another picture of the same name
    Image.new("RGB", (32, 32)).save(folder / "ant" / "new.png")
    generate(folder, tmp_path / "t.csv")
    assert seen == [2]
    generate(folder, tmp_path / "t.csv", "--model", f"local-dir:{classifier_dir(seed=1)}")
    assert sum(seen) == 2 + 16


def test_more_processes_than_batches_leave_some_without_work(
    image_folder: Factory, generate: Generate, model: str, tmp_path: Path
) -> None:
    folder = image_folder(images_per_class=2)
    generate(folder, tmp_path / "one.csv")
    command = command_line(folder, model, tmp_path / "three.csv")
    assert forking.run_together(3, forking.run_script, GENERATE, command) == [0] * 3
    assert (tmp_path / "three.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


# ---------------------------------------------------------------- refusals


def test_what_gives_no_table_is_refused_and_the_old_one_stays(
    image_folder: Factory, generate: Generate, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text("old")
    for folder in ("flat", "broken/ant"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "flat" / "a.png")
    (tmp_path / "broken" / "ant" / "bad.png").touch()
    for folder, message in (
        (tmp_path / "flat", "does not say which classes its images have"),
        (tmp_path / "broken", r"none of the 1 images .* can be read \(bad.png: cannot identify"),
        (image_folder(classes=("ant", "bee", "dog")), "class 'dog' of the images is not among the classes of"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(folder, tmp_path / "t.csv")
        assert (tmp_path / "t.csv").read_text() == "old"
