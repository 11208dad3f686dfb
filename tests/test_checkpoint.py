"""Files of weights as people have them: whatever wraps the weights comes off, what is no checkpoint is called so."""

import argparse
import gzip
import json
import os
import pathlib
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from networks import classify
from PIL import Image

from clcnet.classifiers.checkpoint import doubt_top1
from clcnet.classifiers.classifier import Classifier, load_classifier
from clcnet.data.images import list_images

State = dict[str, torch.Tensor]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=3).state_dict()


def load(path: Path, num_classes: int | None = 3, model: str = "test_resnet", **options: Any) -> Classifier:
    return load_classifier(model, weight=path, num_classes=num_classes, device="cpu", **options)


def assert_loads(content: object, state: State, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    found = load(tmp_path / "w.pth").model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def zeros(state: State) -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}, "param_groups": []}},
        lambda state: {"net": state, "acc": 93.0, "epoch": 1},
        lambda state: {"module": state},
        lambda state: {"checkpoint": {"weights": state}},
        lambda state: {"module." + key: tensor for key, tensor in state.items()} | {"n_averaged": torch.tensor(5)},
        lambda state: {"_orig_mod.module." + key: tensor for key, tensor in state.items()},
        lambda state: {key.replace("layer1.", "layer1._orig_mod."): tensor for key, tensor in state.items()},
        lambda state: {
            "state_dict": {"model." + key: tensor for key, tensor in state.items()} | {"loss.weight": torch.ones(3)},
            "hyper_parameters": {"lr": 0.1},
        },
        lambda state: {"state_dict": {"model.backbone." + key: tensor for key, tensor in state.items()}},
        lambda state: {"state_dict": zeros(state), "ema_state_dict": state},
        lambda state: {
            "state_dict": {"model." + key: torch.zeros_like(tensor) for key, tensor in state.items()}
            | {"ema_model.module." + key: tensor for key, tensor in state.items()}
        },
        lambda state: {"model": zeros(state), "model_ema": {"module." + key: value for key, value in state.items()}},
        lambda state: state | {"total_ops": torch.tensor([7.0]), "layer1.0.total_params": torch.tensor([7.0])},
        lambda state: {"model": state, "teacher": zeros(state)},
    ],
)
def test_whatever_wraps_the_weights_comes_off(wrap: Callable[[State], Any], state: State, tmp_path: Path) -> None:
    assert_loads(wrap(state), state, tmp_path)


def test_counters_that_older_files_lack_are_not_missed(state: State, tmp_path: Path) -> None:
    older = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert len(older) < len(state)
    assert_loads(older, older, tmp_path)
    safetensors.torch.save_file(older, tmp_path / "w.safetensors")
    load(tmp_path / "w.safetensors")


def test_a_safetensors_file_loads_under_any_name(
    state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    safetensors.torch.save_file(state, tmp_path / "w.pth")
    torch.save(state, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        classifier = load(tmp_path / name)
        assert all(torch.equal(classifier.model.state_dict()[key], tensor) for key, tensor in state.items())
        assert classifier.name == "test_resnet"  # the pretrained weights' tag does not matter
    assert not caplog.messages


def test_which_of_several_fitting_models_was_taken_is_said(
    state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert_loads({"state_dict": zeros(state), "state_dict_ema": state}, state, tmp_path)
    assert caplog.messages == [f"of state_dict_ema, state_dict in {tmp_path / 'w.pth'}, state_dict_ema was taken"]


def test_two_models_of_which_neither_is_the_usual_one_are_refused(state: State, tmp_path: Path) -> None:
    torch.save({"student": state, "teacher": zeros(state)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="several models that fit: student and teacher; save one alone"):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("model", "num_classes", "message"),
    [
        ("test_resnet", None, "it has 3 classes, the model 1000; give --num_classes 3"),
        ("test_vit", 3, r"does not fit model test_vit: \d+ missing, such as cls_token"),
    ],
)
def test_a_checkpoint_of_another_model_is_one_line(
    state: State, tmp_path: Path, model: str, num_classes: int | None, message: str
) -> None:
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "w.pth", num_classes, model)


def text(content: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def script_module(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "weights")


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize(
    ("write", "what"),
    [
        (text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"), "Git LFS pointer.*git lfs pull"),
        (text("\n<!DOCTYPE html><html>Google Drive - Virus scan warning</html>"), "it is a web page"),
        (text("<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"), "it is a web page"),
        (text(json.dumps({"error": "Repository not found"})), 'it is text that begins with \'{"error"'),
        (text(""), "it is empty"),
        (text(gzip.compress(b"weights")), "gzip; unpack it"),
        (tar, "an archive of files; unpack it"),
        (text(b"PK\x03\x04 and no more"), "cut short or damaged"),
        (script_module, r"TorchScript.*save the state_dict\(\)"),
        (lambda path: np.savez(open(path, "wb"), a=np.ones(2)), "numpy's .npz"),
        (lambda path: torch.save(timm.create_model("test_resnet"), path), "whole pickled model.*resnet.ResNet"),
        (lambda path: torch.save({"model": torch.nn.Linear(2, 2)}, path), "whole pickled model"),
        (lambda path: torch.save({"epoch": 3, "lr": 0.1}, path), "holds no weights, but epoch, lr"),
        (lambda path: torch.save([torch.ones(2)], path), "holds no weights, but list"),
        (lambda path: None, "does not exist; check the path"),
        (os.mkfifo, "pipe or device, not a file"),
        (os.mkdir, "is a folder"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(
    tmp_path: Path, write: Callable[[Path], object], what: str, name: str
) -> None:
    write(tmp_path / name)
    with pytest.raises((ValueError, OSError), match=what) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    with open(tmp_path / "w.pth", "wb") as file:
        pickle.dump({"state_dict": Attack()}, file)
    torch.save({"state_dict": Attack()}, tmp_path / "zip.pth")
    for name, message in {"w.pth": "", "zip.pth": r": .* may run code; save the model's state_dict\(\) alone"}.items():
        with pytest.raises(ValueError, match=f"cannot be read{message}"):
            load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz", "ignore:Sparse")
@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda weight: weight.to_sparse(), "sparse"),
        (lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), "quantised"),
        (lambda weight: weight.to(torch.int8), "quantised"),
        (lambda weight: weight.to("meta"), "without values"),
    ],
)
def test_tensors_that_hold_no_plain_weights_are_refused(
    state: State, tmp_path: Path, spoil: Callable[[torch.Tensor], torch.Tensor], what: str
) -> None:
    torch.save(state | {"fc.weight": spoil(state["fc.weight"])}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"fc.weight is {what}"):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2.lvd142m", "vit_base_patch16_siglip_224.webli"])
def test_a_model_without_a_classifier_is_refused_before_anything_is_downloaded(name: str) -> None:
    with pytest.raises(ValueError, match=rf"model {name} has no classifier \(0 classes\)"):
        load_classifier(name, device="cpu")


@pytest.mark.parametrize("num_classes", [0, 1])
def test_a_folder_whose_model_has_no_classifier_is_refused(tmp_path: Path, num_classes: int) -> None:
    model = timm.create_model("test_resnet", num_classes=num_classes)
    timm.models.save_for_hf(model, tmp_path, model_config={"num_classes": num_classes}, safe_serialization=True)
    with pytest.raises(ValueError, match=rf"has no classifier \({num_classes} class"):
        load_classifier(f"local-dir:{tmp_path}", device="cpu")


def test_weights_for_other_channels_are_refused_by_their_number(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=3, in_chans=4).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="it has 4 channels of an image, the model 3"):
        load(tmp_path / "w.pth")


# ---------------------------------------------------------------- what the training says


def of_timms_training(state: State, **arguments: Any) -> dict[str, Any]:
    """A checkpoint as timm's train.py writes it."""
    known: dict[str, Any] = dict.fromkeys(("img_size", "input_size", "mean", "std", "crop_pct", "in_chans"))
    args = known | {"model": "test_resnet", "interpolation": "", "lr": 0.1, "output": pathlib.Path("out")} | arguments
    return {"epoch": 1, "state_dict": state, "args": argparse.Namespace(**args), "metric": np.float64(80.15)}


def test_what_timms_training_used_is_taken_from_its_checkpoint_and_said(
    state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    used = {"img_size": 32, "mean": [0.1, 0.2, 0.3], "std": (0.4, 0.5, 0.6), "interpolation": "bilinear"}
    used |= {"crop_pct": 0.9, "num_classes": 3}
    torch.save(of_timms_training(state, **used), tmp_path / "w.pth.tar")
    classifier = load(tmp_path / "w.pth.tar", num_classes=None)
    expected = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.9}
    assert expected.items() <= classifier.data_config.items() and classifier.data_config["interpolation"] == "bilinear"
    assert classifier.num_classes == 3 and classifier.trained_top1 == 80.15
    (line,) = caplog.messages
    assert line.startswith(
        f"taken from the training that wrote {tmp_path / 'w.pth.tar'}: num_classes 3, img_size 32, mean"
    )
    again = load_classifier(**classifier.loaded_from, device="cpu")
    assert again.key == classifier.key


def test_flags_win_over_what_the_training_used(state: State, tmp_path: Path) -> None:
    used = {"input_size": [3, 64, 64], "mean": [0.1, 0.2, 0.3], "std": [0.4]}
    used |= {"interpolation": "bilinear", "crop_pct": 0.9}
    torch.save(of_timms_training(state, **used), tmp_path / "w.pth")
    flags = {"img_size": 48, "mean": [0.5], "std": [0.7, 0.8, 0.9], "interpolation": "bicubic", "crop_pct": 1.0}
    config = load(tmp_path / "w.pth", **flags).data_config
    expected = {"input_size": (3, 48, 48), "mean": (0.5, 0.5, 0.5), "std": (0.7, 0.8, 0.9)}
    assert (expected | {"interpolation": "bicubic", "crop_pct": 1.0}).items() <= config.items()
    assert load(tmp_path / "w.pth").data_config["input_size"] == (3, 64, 64)
    torch.save(of_timms_training(state, **used | {"input_size": [3, 64, 48]}), tmp_path / "w.pth")
    assert load(tmp_path / "w.pth", **flags).data_config == config
    with pytest.raises(ValueError, match="is of images of 48x64; give --img-size"):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize("arguments", [{"in_chans": 1}, {"input_size": [1, 32, 32]}])
def test_a_model_trained_on_gray_images_sees_gray_images(tmp_path: Path, arguments: dict[str, Any]) -> None:
    gray = timm.create_model("test_resnet", num_classes=3, in_chans=1).eval()
    arguments |= {"num_classes": 3, "mean": [0.5], "std": [0.25]}
    torch.save(of_timms_training(gray.state_dict(), **arguments), tmp_path / "w.pth")
    classifier = load(tmp_path / "w.pth", num_classes=None)
    assert classifier.image_mode == "L" and classifier.input_size[0] == 1
    side = classifier.input_size[1]
    (tmp_path / "images").mkdir()
    Image.new("L", (side, side), 51).save(tmp_path / "images" / "0.png")  # (51 / 255 - 0.5) / 0.25 = -1.2
    (batch,) = classify(classifier, list_images(tmp_path / "images"))
    with torch.inference_mode():
        expected = gray(torch.full((1, 1, side, side), -1.2)).softmax(dim=1).numpy()
    assert batch.probs == pytest.approx(expected, abs=1e-5)


def test_arguments_that_make_no_sense_are_left_aside(state: State, tmp_path: Path) -> None:
    torch.save(of_timms_training(state, mean="imagenet", std=[0], crop_pct=7, num_classes=3), tmp_path / "w.pth")
    config = load(tmp_path / "w.pth", num_classes=None).data_config
    assert config["mean"] == (0.5, 0.5, 0.5) == config["std"] and config["crop_pct"] == 0.95  # the model's own


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"mean": [0.1, 0.2]}, "--mean takes 1 number or 3.*not 2"), ({"std": [0.5, 0.0, 0.5]}, "--std takes .* above 0")],
)
def test_a_mean_or_deviation_that_cannot_be_is_refused(
    state: State, tmp_path: Path, flags: dict[str, Any], message: str
) -> None:
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "w.pth", **flags)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"metric": 80.5}, 80.5),
        ({"metric": 1.2, "args": {"eval_metric": "loss"}}, None),
        ({"best_acc1": torch.tensor(76.1)}, 76.1),
        ({"acc": 0.93}, 93.0),
        ({"metric": None}, None),
    ],
)
def test_the_checkpoints_own_accuracy_is_found(
    state: State, tmp_path: Path, content: dict[str, Any], expected: float | None
) -> None:
    torch.save({"state_dict": state} | content, tmp_path / "w.pth")
    assert load(tmp_path / "w.pth").trained_top1 == (expected and pytest.approx(expected))


@pytest.mark.parametrize(
    ("num_right", "num_images", "num_classes", "trained", "said"),
    [
        (311, 2000, 10, 80.15, "top-1 is 15.55%, and the checkpoint's own metric 80.15%: check the weights"),
        (311, 2000, 10, None, "hardly more than guessing among 10 classes gives"),
        (1603, 2000, 10, 80.15, ""),
        (1100, 2000, 2, None, "hardly more than guessing"),  # at most 57.2%, and 50 + 0.15 * 50 is 57.5
        (1200, 2000, 2, None, ""),
        (4, 40, 10, None, ""),  # too few to tell
        (0, 1, 10, 80.0, ""),
        (1980, 2000, 10, 80.15, "was the model trained on these images?"),
        (60, 2000, 100, 3.0, ""),  # as poor as it was trained
    ],
)
def test_a_top1_that_cannot_be_right_is_doubted(
    num_right: int, num_images: int, num_classes: int, trained: float | None, said: str
) -> None:
    line = doubt_top1(num_right, num_images, num_classes, trained)
    assert said in line and bool(line) == bool(said)
