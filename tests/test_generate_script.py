"""Step 3 from the command line to the file: content, resuming after a kill, several processes, outputs left alone."""

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forking
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scripts import interrupt_after
from timm.data import ImageDataset, create_loader, resolve_model_data_config

import generate_data_for_CLCNet as script
from clcnet import cli
from clcnet.classifiers.classifier import Classifier
from clcnet.data.images import list_images
from clcnet.data.outputs import Outputs

Factory = Callable[..., Path]
Generate = Callable[..., dict[str, object]]
CLASSES = ("ant", "bee", "cat")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(classifier_dir: Factory) -> str:
    return f"local-dir:{classifier_dir()}"


@pytest.fixture
def generate(model: str) -> Generate:
    def run(folder: Path, output: Path, *arguments: str) -> dict[str, object]:
        return script.main(parse(folder, model, output, *arguments))

    return run


def parse(folder: Path, model: str, output: Path, *arguments: str):
    return script.get_args_parser().parse_args(command_line(folder, model, output, *arguments))


def command_line(folder: Path, model: str, output: Path, *arguments: str) -> list[str]:
    fixed = ["--data-path", str(folder), "--model", model, "--output", str(output), "-j", "0", "--device", "cpu"]
    return [*fixed, "-b", "4", "--store", str(output.with_suffix(".store")), *arguments]


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


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_table_holds_what_timm_says_in_timms_order(
    image_folder: Factory, generate: Generate, model: str, tmp_path: Path, suffix: str
) -> None:
    folder = image_folder(classes=CLASSES, images_per_class=5)  # 15 images do not fill the last batch of four
    outcome = generate(folder, tmp_path / f"table{suffix}")
    table = Outputs.load(tmp_path / f"table{suffix}")
    probs, correct = expected_rows(folder, model)
    assert table.names == [f"{name}_{index:04d}.png" for name in CLASSES for index in range(5)]
    np.testing.assert_allclose(table.sorted_probs, probs, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(table.correct, correct)
    assert 0 < correct.mean() < 1
    assert outcome["top1"] == pytest.approx(100 * correct.mean())
    assert (outcome["num_images"], outcome["num_rows"], outcome["num_unreadable"]) == (15, 15, 0)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == [
        "images",
        f"table{suffix}",
        "table.store",
    ]


def test_five_parts_give_the_rows_of_the_plain_folder(
    image_folder: Factory, generate: Generate, tmp_path: Path
) -> None:
    generate(image_folder("plain"), tmp_path / "plain.csv")
    generate(image_folder("parts", five_parts=True), tmp_path / "parts.csv")
    assert (tmp_path / "plain.csv").read_bytes() == (tmp_path / "parts.csv").read_bytes()


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


def test_a_flat_folder_with_a_file_of_labels_gives_the_same_labels_as_class_folders(
    image_folder: Factory, generate: Generate, tmp_path: Path
) -> None:
    folder = image_folder()
    generate(folder, tmp_path / "folders.csv")
    images = list_images(folder)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in images.paths:
        shutil.copy(path, flat)
    lines = [f"{path.name},{path.parent.name}\n" for path in images.paths]
    (tmp_path / "labels.csv").write_text("".join(lines))
    generate(flat, tmp_path / "by_name.csv", "--labels", str(tmp_path / "labels.csv"))
    assert (tmp_path / "by_name.csv").read_bytes() == (tmp_path / "folders.csv").read_bytes()


def test_a_class_map_orders_the_classes(image_folder: Factory, generate: Generate, tmp_path: Path) -> None:
    folder = image_folder()
    generate(folder, tmp_path / "plain.csv")
    (tmp_path / "map.txt").write_text("cat\nbee\nant\n")
    generate(folder, tmp_path / "mapped.csv", "--class-map", str(tmp_path / "map.txt"))
    plain, mapped = Outputs.load(tmp_path / "plain.csv"), Outputs.load(tmp_path / "mapped.csv")
    np.testing.assert_array_equal(plain.sorted_probs, mapped.sorted_probs)
    bees = [name.startswith("bee") for name in plain.names]
    np.testing.assert_array_equal(plain.correct[bees], mapped.correct[bees])
    assert not (plain.correct & mapped.correct)[np.logical_not(bees)].any()


def test_real_images_give_the_known_accuracy(shared: Path, tmp_path: Path) -> None:
    cifar = shared / "cifar10"
    for name in ("airplane", "cat"):
        shutil.copytree(cifar / "imagenet_splits_5" / "split_part_1" / name, tmp_path / "images" / name)
    args = parse(tmp_path / "images", f"local-dir:{cifar / 'shallow'}", tmp_path / "t.csv", "-b", "100")
    outcome = script.main(args)
    # the other eight classes have no images here; names, not positions, tell that "cat" is the model's fourth class
    assert outcome["num_rows"] == 401 and outcome["top1"] == pytest.approx(73.8, abs=0.3)


def test_defaults_are_those_of_the_specification() -> None:
    args = script.get_args_parser().parse_args(["--model", "tf_efficientnet_b4"])
    assert args.data_path == cli.IMAGENET_SPLITS
    assert script.default_output(args.model) == cli.ROOT / "tf_efficientnet_b4_output_ds_for_CLCNet.csv"
    assert script.default_output("local-dir:/some/where/deep/") == cli.ROOT / "deep_output_ds_for_CLCNet.csv"
    assert (
        script.default_output("hf-hub:timm/resnet18.a1_in1k").name == "timm_resnet18_a1_in1k_output_ds_for_CLCNet.csv"
    )
    assert script.get_args_parser().parse_args([]).model == "tf_efficientnet_b4.aa_in1k"


# ---------------------------------------------------------------- images that cannot be read


def test_unreadable_images_are_left_out_named_and_counted(
    image_folder: Factory, generate: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder()
    generate(folder, tmp_path / "good.csv")
    (folder / "ant" / "ant_0001b, empty.png").touch()
    (folder / "cat" / "text.jpg").write_text("no image")
    outcome = generate(folder, tmp_path / "t.csv")
    assert outcome["num_unreadable"] == 2 and outcome["num_rows"] == 15
    assert Outputs.load(tmp_path / "t.csv").names == Outputs.load(tmp_path / "good.csv").names
    lines = (tmp_path / "t.csv.errors.csv").read_text().splitlines()
    assert lines == [
        "file,reason",
        '"ant_0001b, empty.png",cannot identify image file',
        "text.jpg,cannot identify image file",
    ]
    last = capsys.readouterr().out.splitlines()[-1]
    assert "15 images, 2 unreadable ones left out" in last and "t.csv.errors.csv" in last


def test_the_exit_code_is_three_when_images_were_left_out(
    image_folder: Factory, model: str, tmp_path: Path, monkeypatch
) -> None:
    folder = image_folder()
    monkeypatch.setattr(sys, "argv", ["generate", *command_line(folder, model, tmp_path / "t.csv")])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        for bad, code in [(False, 0), (True, 3)]:
            if bad:
                (folder / "ant" / "bad.png").touch()
            with pytest.raises(SystemExit) as exit:
                cli.run(script.main, script.get_args_parser())
            assert exit.value.code == code
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_a_folder_of_nothing_but_unreadable_images_leaves_the_old_table(generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "images" / "ant").mkdir(parents=True)
    (tmp_path / "images" / "ant" / "bad.png").touch()
    (tmp_path / "t.csv").write_text("old")
    with pytest.raises(ValueError, match=r"none of the 1 images .* can be read \(bad.png: cannot identify"):
        generate(tmp_path / "images", tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == "old"


# ---------------------------------------------------------------- resuming


@pytest.fixture
def interrupted(
    image_folder: Factory, generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path, bytes]:
    """Sixteen files, one unreadable; an output whose run was stopped after two batches; the bytes it should get."""
    folder = image_folder()
    (folder / "ant" / "ant_0000b.png").touch()
    generate(folder, tmp_path / "whole.csv")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt, match="kept in .*t.store; the same command goes on"):
            generate(folder, tmp_path / "t.csv")
    return folder, tmp_path / "t.csv", (tmp_path / "whole.csv").read_bytes()


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


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_the_same_command_goes_on_after_the_last_whole_batch_and_ends_with_the_same_bytes(
    interrupted: tuple[Path, Path, bytes],
    generate: Generate,
    capsys: pytest.CaptureFixture[str],
    seen: list[int],
    flags: list[str],
) -> None:
    folder, output, expected = interrupted
    assert not output.exists()
    outcome = generate(folder, output, *flags)
    assert "7 of 16 images were classified before" in capsys.readouterr().out  # of eight, one could not be read
    assert seen == [1, 4, 4]  # the unreadable one is tried again, apart from the others
    assert output.read_bytes() == expected
    assert outcome["num_unreadable"] == 1 and outcome["num_rows"] == 15
    assert Path(f"{output}.errors.csv").read_text() == "file,reason\nant_0000b.png,cannot identify image file\n"


def test_a_second_table_of_the_same_images_runs_no_model_and_says_the_same_of_them(
    image_folder: Factory, generate: Generate, tmp_path: Path, seen: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder()
    Image.new("RGBA", (32, 32), (9, 9, 9, 100)).save(folder / "bee" / "glass.png")
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(folder / "cat" / "deep.png")
    generate(folder, tmp_path / "t.csv")
    assert sum(seen) == 17
    generate(folder, tmp_path / "t.parquet")
    assert sum(seen) == 17
    assert (Outputs.load(tmp_path / "t.parquet").sorted_probs == Outputs.load(tmp_path / "t.csv").sorted_probs).all()
    said = capsys.readouterr().out
    assert said.count("1 with transparency, which is dropped") == 2
    assert said.count("1 with values beyond 8 bits, which are clipped") == 2


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
    script.main(parse(folder, f"local-dir:{classifier_dir(seed=1)}", tmp_path / "t.csv"))
    assert sum(seen) == 2 + 16


def test_a_run_killed_at_ten_random_points_ends_with_the_bytes_of_an_uninterrupted_one(
    image_folder: Factory, generate: Generate, model: str, tmp_path: Path
) -> None:
    folder = image_folder(images_per_class=50)
    (folder / "bee" / "bad.png").touch()
    generate(folder, tmp_path / "whole.csv")
    output, store = tmp_path / "t.csv", tmp_path / "t.store"
    generator = random.Random(0)
    progress = []

    def kept() -> int:
        return sum(path.stat().st_size for path in store.glob("*/*.answers"))

    for kill in range(10):
        process = forking.start(forking.generate, *command_line(folder, model, output))
        aim = (kill + generator.random()) / 10 * 151 * (16 + 2 + 3 * 4)  # so many bytes of records, more each time
        while process.is_alive() and kept() < aim:
            time.sleep(0.0005)
        time.sleep(generator.random() * 0.005)
        process.kill()
        process.join()
        if output.exists():  # it was quick enough to finish
            break
        progress.append(kept())
    assert len(progress) >= 8 and len(set(progress)) > 5
    generate(folder, output)
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert Path(f"{output}.errors.csv").read_bytes() == (tmp_path / "whole.csv.errors.csv").read_bytes()


# ---------------------------------------------------------------- several processes


def test_two_processes_give_the_file_of_one_and_resume_what_one_began(
    image_folder: Factory, generate: Generate, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_folder(images_per_class=7)  # 22 files: five whole batches for two processes, and half of one
    (folder / "ant" / "bad.png").touch()
    generate(folder, tmp_path / "one.csv")
    expected = (tmp_path / "one.csv").read_bytes()
    command = command_line(folder, model, tmp_path / "two.csv")
    assert forking.run_together(2, forking.generate, *command) == [0, 0]
    assert (tmp_path / "two.csv").read_bytes() == expected
    shutil.rmtree(tmp_path / "two.store")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            generate(folder, tmp_path / "two.csv")
    assert forking.run_together(2, forking.generate, *command) == [0, 0]
    assert (tmp_path / "two.csv").read_bytes() == expected
    assert (tmp_path / "two.csv.errors.csv").read_bytes() == (tmp_path / "one.csv.errors.csv").read_bytes()


def test_more_processes_than_batches_leave_some_without_work(
    image_folder: Factory, generate: Generate, model: str, tmp_path: Path
) -> None:
    folder = image_folder(images_per_class=2)
    generate(folder, tmp_path / "one.csv")
    assert forking.run_together(3, forking.generate, *command_line(folder, model, tmp_path / "three.csv")) == [0] * 3
    assert (tmp_path / "three.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


def test_torchrun_starts_it_as_the_readme_says(
    image_folder: Factory, generate: Generate, model: str, tmp_path: Path
) -> None:
    folder = image_folder()
    (folder / "bee" / "bad.png").touch()
    generate(folder, tmp_path / "one.csv")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(cli.ROOT / "generate_data_for_CLCNet.py")]
    done = subprocess.run(
        [*command, *command_line(folder, model, tmp_path / "two.csv")], capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr  # it would take 3 for a crash
    for suffix in (".csv", ".csv.errors.csv"):
        assert (tmp_path / f"two{suffix}").read_bytes() == (tmp_path / f"one{suffix}").read_bytes()
    assert done.stdout.count("top-1") == 1  # one process speaks
    assert "of 15 images, 1 unreadable ones left out" in done.stdout.splitlines()[-1]


# ---------------------------------------------------------------- refusals


def test_images_without_labels_are_refused(generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "flat" / "a.png")
    with pytest.raises(ValueError, match="does not say which classes its images have"):
        generate(tmp_path / "flat", tmp_path / "t.csv")


def test_a_model_with_other_classes_is_refused_before_anything_is_written(
    image_folder: Factory, generate: Generate, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text("old")
    with pytest.raises(ValueError, match="class 'dog' of the images is not among the classes of"):
        generate(image_folder(classes=("ant", "bee", "dog")), tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == "old"


def test_two_runs_do_not_write_the_same_output(image_folder: Factory, generate: Generate, tmp_path: Path) -> None:
    from clcnet.files import output_lock

    with output_lock(tmp_path / "t.csv"), pytest.raises(OSError, match="another run is writing"):
        generate(image_folder(), tmp_path / "t.csv")
