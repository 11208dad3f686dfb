"""The Hub: networks and policies come back from a folder and from a repository as they were; nothing is pickled."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from huggingface_hub import hub_mixin
from networks import sorted_rows, trained_looking

from clcnet import Cascade, CLCNet, hub
from clcnet.cascade.drift import Expected
from clcnet.cascade.policy import Policy
from clcnet.cascade.pool import Pool
from clcnet.cascade.rules import Fused, Surest
from clcnet.classifiers.classifier import load_classifier
from clcnet.confidence import CLCNET
from clcnet.data.outputs import Record
from clcnet.network.calibration import Calibration

FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's only repository, user/name, as a folder: what is pushed lands there and is downloaded from there."""
    folder = tmp_path / "repository"

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            assert repo_id == "user/name"
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path: Path, **_: Any) -> str:
            shutil.copytree(folder_path, folder)
            return "pushed"

    def download(repo_id: str, filename: str, **_: Any) -> str:
        assert repo_id == "user/name"
        asked.append(filename)
        return str(folder / filename)

    asked: list[str] = []
    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    for module in (hub_mixin, hub):
        monkeypatch.setattr(module, "hf_hub_download", download)
    return folder


@pytest.fixture
def network() -> CLCNet:
    network = trained_looking(num_classes=3)
    network.calibration = Calibration(0.3, (0.5, -0.1, 0.2, -0.3), 0.4)
    network.metadata = {"test": {"auroc": 0.91234}, "tables": ["resnet20.parquet"]}
    return network


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_network_comes_back_from_a_folder_and_from_the_hub(network: CLCNet, repository: Path, tmp_path: Path) -> None:
    rows = sorted_rows(50, 3)
    network.save_pretrained(tmp_path / "folder")
    assert network.push_to_hub("user/name") == "pushed"
    for place in (tmp_path / "folder", repository):
        assert files_in(place) == FILES
    for back in (CLCNet.from_pretrained(tmp_path / "folder"), CLCNet.from_pretrained("user/name")):
        np.testing.assert_array_equal(back.predict(rows), network.predict(rows))
        assert (back.metadata, back.training) == (network.metadata, False)
    card = (repository / "README.md").read_text(encoding="utf-8")
    assert "| test | auroc | 0.9123 |" in card and "Trained on the outputs in resnet20.parquet." in card
    assert "library_name: clcnet" in card


def test_a_damaged_repository_is_refused_in_one_line(network: CLCNet, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path)
    tensors = tmp_path / "model.safetensors"
    state = safetensors.torch.load_file(tensors)
    content = tensors.read_bytes()
    name = "tabnet.final_mapping.weight"
    for damaged, message in (
        (content[:-5], "model.safetensors"),
        (safetensors.torch.save(state | {name: state[name] * np.nan}), f"{name} in model.safetensors holds values"),
        (safetensors.torch.save({name: state[name]}), "model.safetensors lacks"),
        (content + b"\0" * 10**7, "larger than"),
    ):
        tensors.write_bytes(damaged)
        with pytest.raises(ValueError, match=message) as caught:
            CLCNet.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.fixture
def policy(network: CLCNet, classifier_dir: Callable[..., Path]) -> tuple[Policy, list[str]]:
    names = [f"local-dir:{classifier_dir(seed=seed)}" for seed in (1, 2)]
    models = [load_classifier(name, device="cpu") for name in names]
    records = [
        Record(each.name, each.key, flops=flops, loaded_from=each.loaded_from)
        for each, flops in zip(models, (0.004, 0.02), strict=True)
    ]
    expected = Expected(5000, 91.5, (90.7, 92.25), [1.0, 0.25], 0.009)
    return Policy(records, Surest(CLCNET, network=network), [0.6], expected), names


def test_a_policy_comes_back_from_the_hub_and_takes_models_that_the_user_names(policy, repository: Path) -> None:
    ours, names = policy
    ours.naming("hf-hub:user/shallow", "resnet18").push_to_hub("user/name")
    assert files_in(repository) == sorted([*FILES[:2], *(f"clcnet/{name}" for name in FILES)])
    back = Policy.from_pretrained("user/name")
    assert [model.loaded_from["name"] for model in back.models] == ["hf-hub:user/shallow", "resnet18"]
    assert (back.thresholds, back.expected, back.rule.to_json()) == ([0.6], ours.expected, ours.rule.to_json())
    with pytest.raises(ValueError, match="would download hf-hub:user/shallow"):
        Cascade.from_policy(back, "cpu")
    images = list(np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8))
    found, expected = (Cascade.from_policy(each, "cpu", models=names)(images) for each in (back, ours))
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.confidences, expected.confidences)
    card = (repository / "README.md").read_text(encoding="utf-8")
    assert "On 5,000 images that nothing in it was chosen on: top-1 91.50% [90.70, 92.25] at 9M multiply-adds" in card
    assert "| hf-hub:user/shallow | 4M | 100.0% |" in card and "| resnet18 | 20M | 25.0% |" in card


def test_a_fused_policy_needs_no_tensors(policy, tmp_path: Path) -> None:
    rule = Fused(pools=(Pool(np.array([1.2]), np.zeros(3)), Pool(np.array([0.4, 0.8]), np.ones(3))))
    fused = dataclasses.replace(policy[0], rule=rule).naming("resnet18", "resnet50")
    fused.save_pretrained(tmp_path)
    assert files_in(tmp_path) == FILES[:2]
    assert Policy.from_pretrained(tmp_path).rule.to_json() == rule.to_json()


def test_a_policy_whose_models_lie_on_this_machine_is_not_published(policy, repository: Path) -> None:
    with pytest.raises(ValueError, match="lies on this machine alone"):
        policy[0].push_to_hub("user/name")
    assert not repository.exists()


def test_another_network_than_the_policys_is_refused(policy, tmp_path: Path) -> None:
    policy[0].naming("resnet18", "resnet50").save_pretrained(tmp_path)
    config = tmp_path / "clcnet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"note": "changed"}))
    with pytest.raises(ValueError, match="are not those that it was measured with"):
        Policy.from_pretrained(tmp_path)
