"""A model folder comes from a stranger: what it says is checked, and timm is told nothing but the architecture."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from clcnet.classifiers import model_config
from clcnet.classifiers import models as timm_models
from clcnet.classifiers.classifier import load_classifier
from clcnet.strangers import LARGEST_JSON

DROPOUT = {"drop_path", "drop_path_prob", "drop_path_rate", "drop_path_rates", "transformer_drop_path"}
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def spoilt(classifier_dir: Callable[..., Path], tmp_path: Path) -> Callable[[Change], str]:
    """Change the config.json of an honest model folder and return the model's name."""

    def make(change: Change) -> str:
        folder = tmp_path / "model"
        folder.mkdir()
        for file in classifier_dir().iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        return f"local-dir:{folder}"

    return make


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, in a process that may open no socket."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """What a stranger would have Python import."""
    path = tmp_path / "sitecustomize.py"
    path.write_text("raise SystemExit('a stranger was here')\n")
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        {"pretrained_cfg_overlay": {"url": "http://localhost:9/x.pth", "source": ""}},
        {"pretrained_cfg": {"url": "http://localhost:9/x.pth"}},
        {"cache_dir": "elsewhere"},
        {"checkpoint_path": "x.pth"},
        {"pretrained": False},
        {"pretrained_strict": False},
        {"features_only": True},
        {"scriptable": True},
        {"device": "meta"},
        {"pruned": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_arguments_that_are_not_the_architectures_are_refused(
    spoilt: Callable[[Change], str], working_folder: Path, arguments: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match="is no argument of test_resnet"):
        load_classifier(spoilt(lambda config: config["model_args"].update(arguments)), device="cpu")
    assert not list(working_folder.iterdir())


def test_no_architecture_takes_an_argument_that_names_a_place() -> None:
    for architecture in timm.list_models():
        taken = model_config._arguments_of(architecture)
        assert not [name for name in taken if any(word in name for word in ("url", "hub", "cache", "file", "folder"))]
        assert {name for name in taken if "path" in name} <= DROPOUT
        assert not taken & {"pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "device"}


def test_where_weights_lie_is_not_for_the_folder_to_say(
    spoilt: Callable[[Change], str], working_folder: Path, text: Path
) -> None:
    elsewhere = {"url": text.as_uri(), "file": str(text), "hf_hub_id": "a/b", "hf_hub_filename": text.name}
    elsewhere |= {"source": "", "custom_load": "hf", "state_dict": {"fc.weight": 1}, "an": "unknown key"}
    name = spoilt(lambda config: config["pretrained_cfg"].update(elsewhere))
    classifier = load_classifier(name, device="cpu")
    kept = timm_models.configuration(classifier.model)
    assert not kept.keys() & {"url", "hf_hub_id", "hf_hub_filename", "state_dict"} and kept["custom_load"] is False
    assert kept["source"] == "local-dir" and f"local-dir:{kept['file']}" == name
    assert not list(working_folder.iterdir())


def test_a_model_of_the_hub_is_checked_too_and_takes_its_weights_from_its_own_repository(
    spoilt: Callable[[Change], str], working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(
        spoilt(lambda config: config["pretrained_cfg"].update(hf_hub_id="an/other", url="u", source="")).split(":")[1]
    )
    asked: list[tuple[object, ...]] = []

    def download(repository: str, file: str, revision: str | None) -> str:
        asked.append((repository, file, revision))
        return str(folder / file)

    def weights(repository: str, **_: object) -> dict[str, torch.Tensor]:
        asked.append((repository,))
        return dict(timm.models.load_state_dict(str(folder / "model.safetensors")))

    monkeypatch.setattr("clcnet.classifiers.models.hf_hub_download", download)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", weights)
    classifier = load_classifier("hf-hub:some/one@v1", device="cpu")
    assert asked == [("some/one", "config.json", "v1"), ("some/one@v1",)]
    assert classifier.label_names == ["ant", "bee", "cat"]
    (folder / "config.json").write_text('{"architecture": "test_resnet", "model_args": {"cache_dir": "."}}')
    with pytest.raises(ValueError, match="model hf-hub:some/one: .*config.json: model_args 'cache_dir'"):
        load_classifier("hf-hub:some/one", device="cpu")


FACTS: dict[str, tuple[object, ...]] = {
    "input_size": ("big", [3, 32], [2, 32, 32], [3, 0, 32], [3, 32, 10**6], [3, 32.5, 32]),
    "mean": (0.5, [], [0.5, 0.5], ["a", "b", "c"], [float("nan")] * 3, [10**400] * 3),
    "std": ([0, 0, 0], [-1, -1, -1], [float("inf")], {"a": 1}),
    "crop_pct": ("all", 0, -1, 1e-9, 100, True, float("nan")),
    "interpolation": ("random", 3, ["bicubic"]),
    "crop_mode": ("corner",),
    "fixed_input_size": (1,),
    "label_names": ("abc", 3, [["ant"]], {"0": None}),
    "label_offset": (-1,),
    "first_conv": (5,),
    "classifier": ([1],),
}
ARGUMENTS: dict[str, tuple[object, ...]] = {
    "num_classes": (-1, "3", 3.0, True, 10**9),
    "in_chans": (4,),
    "img_size": ([32, 32, 32],),
    "act_layer": ("http://localhost/x",),
    "layers": ([[[[[[2]]]]]],),
    "drop_rate": (float("inf"),),
}
WRONG = [("pretrained_cfg", "", key, value) for key, values in FACTS.items() for value in values]
WRONG += [("model_args", "model_args ", key, value) for key, values in ARGUMENTS.items() for value in values]


@pytest.mark.parametrize(("part", "said", "key", "value"), WRONG, ids=str)
def test_what_is_of_the_wrong_kind_or_out_of_range_is_one_line(
    spoilt: Callable[[Change], str], part: str, said: str, key: str, value: object
) -> None:
    with pytest.raises(ValueError, match=rf"config.json: {said}{key} is .*, not .*; mend it there") as caught:
        load_classifier(spoilt(lambda config: config[part].update({key: value})), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "is not a timm model's configuration .*more than 500 lists"),
        (" " * (LARGEST_JSON + 1), "is larger than the 8,388,608 bytes"),
        ("{", "is not a timm model's configuration"),
        ("[]", "is not a timm model's configuration"),
        ('{"architecture": "nonesuch"}', "knows no nonesuch, the architecture in .*config.json"),
        ('{"architecture": "test_resnet", "num_classes": 3}', "local-dir.*cannot be loaded"),  # there are no weights
        ('{"architecture": ["test_resnet"]}', "is not a timm model's configuration"),
        ('{"architecture": "test_resnet", "pretrained_cfg": [1]}', "is not a timm model's configuration"),
        ('{"architecture": "test_resnet", "model_args": 5}', "is not a timm model's configuration"),
    ],
    ids=["deep", "large", "cut", "list", "unknown", "bare", "listed", "facts", "arguments"],
)
def test_a_folder_that_holds_no_model_is_one_line(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        load_classifier(f"local-dir:{tmp_path}", device="cpu")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        load_classifier(f"local-dir:{tmp_path}", device="cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_flat_configuration_of_older_versions_is_read(tmp_path: Path) -> None:
    flat = {"architecture": "test_resnet", "num_classes": 2, "labels": ["ant", "bee"], "input_size": [3, 48, 48]}
    (tmp_path / "config.json").write_text(json.dumps(flat | {"url": "", "license": "none", "crop_pct": 0.9}))
    network = timm.create_model("test_resnet", num_classes=2)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    classifier = load_classifier(f"local-dir:{tmp_path}", device="cpu")
    assert classifier.label_names == ["ant", "bee"] and [*classifier.input_size] == [3, 48, 48]
    assert classifier.data_config["crop_pct"] == 0.9


@pytest.mark.parametrize("img_size", [None, 48])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("test_vit", {"img_size": 64, "dynamic_img_size": True, "act_layer": "relu"}),
        ("test_efficientnet", {"bn_eps": 1e-3, "act_layer": "relu"}),
        ("test_byobnet", {"drop_rate": 0.1}),
        ("test_convnext", {"in_chans": 1}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "depth": 2, "img_size": 48}),
    ],
)
def test_an_honest_folder_is_the_model_that_timm_makes_of_it(
    tmp_path: Path, architecture: str, options: dict[str, Any], img_size: int | None
) -> None:
    network = timm.create_model(architecture, num_classes=3, **options)
    timm.models.save_for_hf(network, tmp_path, model_config={"label_names": ["x", "y", "z"]}, safe_serialization=True)
    name = f"local-dir:{tmp_path}"
    ours = load_classifier(name, device="cpu", img_size=img_size)
    theirs = timm.create_model(
        pretrained=True, **timm.models.resolve_model_input_args(name, {"img_size": img_size})
    ).eval()
    assert ours.label_names == ["x", "y", "z"]
    assert ours.data_config == timm.data.resolve_model_data_config(theirs, {"img_size": img_size})
    images = torch.rand(2, options.get("in_chans", 3), *ours.input_size[1:])
    assert torch.equal(ours.model(images), theirs(images))


def test_the_real_models_keep_their_preprocessing_and_names(shared: Path) -> None:
    for config in sorted(shared.glob("*/*/config.json")):
        name = f"local-dir:{config.parent}"
        if not any(file.suffix in (".safetensors", ".bin", ".pth") for file in config.parent.iterdir()):
            continue
        ours, theirs = load_classifier(name, device="cpu"), timm.create_model(name)
        assert ours.data_config == timm.data.resolve_model_data_config(theirs)
        assert theirs.pretrained_cfg.get("label_names") in (None, ours.label_names)
        assert os.path.samefile(timm_models.configuration(ours.model)["file"], config.parent)
