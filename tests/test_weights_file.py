"""The weights file: the released format both ways, refusals, and finding the five of a folder."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import part_of, read_reference, released_network, sorted_rows, trained_looking

from clcnet.network.calibration import Calibration
from clcnet.network.model import CLCNet
from clcnet.network.weights import check_no_other_fold_weights, find_fold_weights


def test_saved_networks_load_with_the_same_scores_calibration_and_metadata(tmp_path):
    model = trained_looking()
    model.calibration = Calibration(0.25, (1.5, 0.125, -0.5, 0.1), 0.75)
    path = tmp_path / "folder" / "net.zip"
    model.save(path, {"fold": 3, "training_folds": [1, 2, 4, 5]})
    again = CLCNet.load(path)
    rows = sorted_rows(20, 10)
    np.testing.assert_array_equal(again.predict(rows), model.predict(rows))
    np.testing.assert_array_equal(again.predict(rows, calibrated=False), model.predict(rows, calibrated=False))
    assert again.calibration == model.calibration
    assert again.metadata == {"fold": 3, "training_folds": [1, 2, 4, 5]}
    assert (again.num_classes, again.training) == (10, False)


def test_the_same_network_gives_the_same_file(tmp_path):
    for name in "ab":
        trained_looking().save(tmp_path / f"{name}.zip", {"fold": 1})
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_saved_files_hold_the_released_names_shapes_and_sharing(tmp_path):
    released_network().save(tmp_path / "net.zip")
    with zipfile.ZipFile(tmp_path / "net.zip") as archive:
        assert archive.namelist() == ["model_params.json", "network.pt"]
        params = json.loads(archive.read("model_params.json"))
        state = torch.load(io.BytesIO(archive.read("network.pt")), weights_only=True)
    expected = part_of(read_reference(), "state/")
    assert {name: value.shape for name, value in state.items()} == {k: v.shape for k, v in expected.items()}
    assert {name: value.dtype for name, value in state.items()} == {k: v.dtype for k, v in expected.items()}
    assert state["tabnet.encoder.initial_bn.running_var"].eq(1).all()  # what nothing reads is neutral
    assert state["tabnet.encoder.nor_att.value.weight"].eq(0).all()
    shared = [value for name, value in state.items() if "shared" in name and "layers.1.fc" in name]
    assert len({value.data_ptr() for value in shared}) == 1
    assert params["init_params"]["input_dim"] == 50 and params["class_attrs"] == {"preds_mapper": None}
    assert params["format_version"] == 1


def test_released_weights_saved_again_hold_the_same_parameters(shared, tmp_path):
    (path,) = (shared / "reference").glob("CLCNet_imagenet_split_1(*).zip")
    model = CLCNet.load(path)
    assert model.calibration is None and model.num_classes == 1000
    model.save(tmp_path / "again.zip")
    with zipfile.ZipFile(path) as first, zipfile.ZipFile(tmp_path / "again.zip") as second:
        states = [torch.load(io.BytesIO(z.read("network.pt")), "cpu", weights_only=True) for z in (first, second)]
        params = [json.loads(z.read("model_params.json"))["init_params"] for z in (first, second)]
    assert states[0].keys() == states[1].keys()
    assert params[0].keys() == params[1].keys()
    unread = ("initial_bn", "nor_att", "res_att.key.bias", "num_batches_tracked")
    for name, value in states[0].items():
        assert value.shape == states[1][name].shape
        if not any(word in name for word in unread):
            assert torch.equal(value, states[1][name]), name


def test_metadata_may_not_hide_what_the_file_needs(tmp_path):
    with pytest.raises(ValueError, match="calibration"):
        CLCNet(10).save(tmp_path / "net.zip", {"calibration": 1})
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.zip"):
        CLCNet.load(tmp_path / "nowhere.zip")


# ------------------------------------------------------------------------------------------------------ fold weights


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def test_fold_weights_are_found_under_our_and_the_released_names_in_order(tmp_path):
    touch(tmp_path, *(f"CLCNet_imagenet_split_{fold}.zip" for fold in (5, 3, 1, 2)))
    touch(tmp_path, "CLCNet_imagenet_split_4(MSE_0.1097).zip", "CLCNet_custom_data.zip", "CLCNet_imagenet_split.csv")
    names = [path.name for path in find_fold_weights(tmp_path)]
    assert names[2:4] == ["CLCNet_imagenet_split_3.zip", "CLCNet_imagenet_split_4(MSE_0.1097).zip"]
    assert len(names) == 5


def test_a_fold_without_weights_and_one_with_two_are_named(tmp_path):
    touch(tmp_path, *(f"CLCNet_imagenet_split_{fold}.zip" for fold in (1, 2, 4, 5)))
    with pytest.raises(FileNotFoundError, match="0 weights for fold 3"):
        find_fold_weights(tmp_path)
    touch(tmp_path, "CLCNet_imagenet_split_3.zip", "CLCNet_imagenet_split_3(MSE_0.1).zip")
    with pytest.raises(ValueError, match="2 weights for fold 3"):
        find_fold_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_fold_weights(tmp_path / "nowhere")


def test_released_weights_in_the_way_of_new_ones_are_named(tmp_path):
    touch(tmp_path, "CLCNet_imagenet_split_1.zip")
    check_no_other_fold_weights(tmp_path)
    check_no_other_fold_weights(tmp_path / "nowhere")
    touch(tmp_path, "CLCNet_imagenet_split_3(MSE_0.1).zip")
    with pytest.raises(ValueError, match="split_3"):
        check_no_other_fold_weights(tmp_path)
