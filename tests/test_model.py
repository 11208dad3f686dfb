"""The network against the released one's numbers and a literal O(n^2) implementation, and its weights file."""

import copy
import io
import json
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from literal_clcnet import LiteralCLCNet
from literal_clcnet import sparsemax as literal_sparsemax

from clcnet.layers import GAUSSIAN_REACH, GhostBatchNorm, gaussian_basis, sparsemax, times_gaussian
from clcnet.model import (
    Calibration,
    CLCNet,
    _load_released_state,
    _released_names,
    _to_released_state,
    check_no_other_fold_weights,
    find_fold_weights,
    fit_calibration,
    simple_scores,
)

REFERENCE = Path(__file__).parent / "data" / "clcnet_reference.npz"
CPU = (torch.float32, torch.device("cpu"))
SIZES = (2, 10, 50, 1000)  # n of the reference scores


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(REFERENCE) as arrays:
        return dict(arrays)


def part_of(reference: dict[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): torch.from_numpy(value) for name, value in reference.items() if prefix in name}


@pytest.fixture
def released(reference) -> CLCNet:
    """The network of the reference file."""
    model = CLCNet(num_classes=50)
    _load_released_state(model, part_of(reference, "state/"), 50)
    return model.eval()


def sorted_rows(num_rows: int, num_classes: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 3, (num_rows, num_classes))
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return -np.sort(-probs, axis=1).astype(np.float32)


def trained_looking(masked: bool = False, num_classes: int = 10, seed: int = 3) -> CLCNet:
    """A network whose batch norms have other parameters and statistics than a new one's."""
    torch.manual_seed(seed)
    model = CLCNet(num_classes, masked=masked)
    with torch.no_grad():
        for norm in model.ghost_norms():
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.1)
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    return model.eval()


# ------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("n", SIZES)
def test_evaluation_scores_equal_the_released_ones(released, reference, n):
    expected = reference[f"eval/score_{n}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # n other than 50
        np.testing.assert_allclose(released.predict(reference[f"eval/x_{n}"]), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        forward = released(torch.from_numpy(reference[f"eval/x_{n}"])).numpy()
    np.testing.assert_allclose(forward, expected, rtol=0, atol=1e-5)


def training_step(model: CLCNet, reference: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """One training step on the reference batch; gradients lie in the parameters afterwards."""
    x, y = torch.from_numpy(reference["train/x"]), torch.from_numpy(reference["train/y"])
    model.train()
    score, sparsity = model.score_and_sparsity(x)
    mse = (score - y).square().mean()
    loss = mse - 1e-3 * sparsity
    loss.backward()
    return {"score": score, "sparsity": sparsity, "mse": mse, "loss": loss}


@pytest.mark.parametrize("figure", ["score", "sparsity", "mse", "loss"])
def test_training_step_gives_the_released_figures(released, reference, figure):
    ours = training_step(released, reference)[figure].detach().numpy()
    np.testing.assert_allclose(ours, reference[f"train/{figure}"], rtol=0, atol=1e-5)


def gradients_of(model: CLCNet) -> dict[str, torch.Tensor]:
    """Gradients under the released names."""
    holder = copy.deepcopy(model)
    with torch.no_grad():
        for place, parameter in zip(holder.parameters(), model.parameters(), strict=True):
            place.copy_(parameter.grad)
    return {name: tensor.detach() for name, tensor in _released_names(holder)}


def test_training_step_gives_the_released_gradients(released, reference):
    training_step(released, reference)
    ours, expected = gradients_of(released), part_of(reference, "train/grad/")
    unread = expected.pop("tabnet.encoder.res_att.key.bias")
    assert unread.abs().max() < 2e-8  # cancels in the softmax: rounding is all there is, and we carry no such parameter
    for name, gradient in expected.items():
        # Behind the masks, gradients are 1e-5 and less and come through log(m) of tiny m: there float32 itself, the
        # reference included, is 1e-3 off (see the next test), so an absolute error far below the others is allowed.
        tolerance = 1e-4 * float(gradient.abs().max()) + 1e-7
        np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=tolerance, err_msg=name)


def test_gradients_equal_those_of_the_literal_network_in_float64(reference):
    state = {name: value.double() for name, value in part_of(reference, "state/").items()}
    model = CLCNet(50)
    _load_released_state(model, state, 50)
    model.double()
    literal = LiteralCLCNet({name: value.clone().requires_grad_() for name, value in state.items()})
    literal.training = True
    x, y = torch.from_numpy(reference["train/x"]).double(), torch.from_numpy(reference["train/y"]).double()
    expected_score, expected_sparsity = literal(x)
    leaves = {name: value for name, value in literal.state.items() if value.is_leaf and value.requires_grad}
    loss = (expected_score - y).square().mean() - 1e-3 * expected_sparsity
    expected = dict(zip(leaves, torch.autograd.grad(loss, leaves.values(), allow_unused=True), strict=True))

    score, sparsity = model.train().score_and_sparsity(x)
    ((score - y).square().mean() - 1e-3 * sparsity).backward()
    torch.testing.assert_close(score, expected_score, rtol=0, atol=1e-9)
    ours = gradients_of(model)
    shared = [name for name in ours if ".fc." in name and ".shared." in name]
    compared = [name for name in ours if expected.get(name) is not None and name not in shared]
    assert len(compared) > 40
    for name in compared:
        gradient = expected[name]
        assert (ours[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
    for layer in range(2):  # the literal network holds a shared layer under several names; their gradients add up
        names = [name for name in shared if f"glu_layers.{layer}.fc" in name]
        total = sum(expected[name] for name in names)
        assert (ours[names[0]] - total).abs().max() <= 1e-4 * total.abs().max()


def test_training_step_gives_the_released_running_statistics(released, reference):
    training_step(released, reference)
    ours, expected = dict(_released_names(released)), part_of(reference, "train/after/")
    compared = [name for name in expected if "initial_bn" not in name]  # that one nothing reads
    assert len(compared) == 38
    for name in compared:
        np.testing.assert_allclose(ours[name].detach(), expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [2, 3, 99, 100, 101, 457])
def test_scores_equal_the_literal_network(masked, n):
    model = trained_looking(masked, n)
    literal = LiteralCLCNet(_to_released_state(model), masked)
    rows = sorted_rows(40, n, seed=n)
    rows[0] = [1] + [0] * (n - 1)
    rows[1] = 1 / n
    expected, _ = literal(torch.from_numpy(rows))
    np.testing.assert_allclose(model.predict(rows), expected.numpy(), rtol=2e-5, atol=2e-5)
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.from_numpy(rows)), expected.numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_rows", [2, 100, 128, 129, 300])
def test_training_mode_equals_the_literal_network_for_any_last_part(masked, num_rows):
    model = trained_looking(masked).double()
    literal = LiteralCLCNet(_to_released_state(model), masked)
    literal.training = True
    rows = torch.from_numpy(sorted_rows(num_rows, 10, seed=num_rows)).double()
    expected_score, expected_sparsity = literal(rows)
    score, sparsity = model.train().score_and_sparsity(rows)
    torch.testing.assert_close(score, expected_score, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(sparsity, expected_sparsity, rtol=1e-7, atol=1e-7)
    for name, value in _released_names(model):
        if "running" in name:
            torch.testing.assert_close(value, literal.state[name], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("n", [2, 5, 10, 37, 100, 1000])
def test_released_weights_load_and_give_the_released_scores(shared, split, n):
    (path,) = (shared / "reference").glob(f"CLCNet_imagenet_split_{split}(*).zip")
    with np.load(shared / "reference" / f"released_split_{split}_scores.npz") as arrays:
        rows, expected = arrays[f"x_{n}"], arrays[f"score_{n}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = CLCNet.load(path).predict(rows)
    # Off its own n the network amplifies rounding: in float64 the literal network is up to 2e-5 away from these.
    largest = np.abs(expected).max()
    assert np.abs(ours - expected).max() <= (1e-5 if n == 1000 else 3e-5) * largest


def test_modules_carry_no_parameter_that_nothing_reads(reference):
    model = CLCNet(50)
    training_step(model, reference)
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------------ layers


def test_sparsemax_of_known_rows():
    rows = torch.tensor([[1.0, 0.5, 0.0], [2.0, 0.0, 0.0], [0.3, 0.3, 0.3]])
    # (1 + .5 - 1)/2 = .25 off the first two; all on the first; a third each
    expected = torch.tensor([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(sparsemax(rows), expected)


def test_sparsemax_and_its_gradient_equal_the_literal_one():
    torch.manual_seed(0)
    logits = torch.randn(50, 20, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(50, 20, dtype=torch.float64)
    (ours,) = torch.autograd.grad((sparsemax(logits) * weights).sum(), logits)
    (expected,) = torch.autograd.grad((literal_sparsemax(logits) * weights).sum(), logits)
    torch.testing.assert_close(sparsemax(logits), literal_sparsemax(logits))
    torch.testing.assert_close(ours, expected)


def test_ghost_batch_norm_equals_torch_part_by_part():
    torch.manual_seed(0)
    ours, theirs = GhostBatchNorm(1, 4, 64, momentum=0.1), torch.nn.BatchNorm1d(4, momentum=0.1)
    x = torch.randn(150, 4) * 3 + 1  # parts of 50
    expected = torch.cat([theirs(part) for part in x.chunk(3)])
    torch.testing.assert_close(ours(x.unsqueeze(0))[0], expected)
    torch.testing.assert_close(ours.running_mean[0], theirs.running_mean)
    torch.testing.assert_close(ours.running_var[0], theirs.running_var)


def test_ghost_batch_norm_refuses_a_single_row():
    with pytest.raises(ValueError, match="1 row"):
        GhostBatchNorm(1, 4, 64, momentum=0.1)(torch.zeros(1, 4))


@pytest.mark.parametrize("n", [2, 200, 201, 333, 1000])
def test_banded_product_equals_the_full_one(n):
    x = torch.rand(7, n)
    full = x @ gaussian_basis(n, 100, CPU)
    torch.testing.assert_close(times_gaussian(x, 100), full, rtol=1e-5, atol=1e-6)
    assert np.exp(-(GAUSSIAN_REACH**2) / 2) < 3e-11


def test_gaussian_basis_at_known_places():
    basis = gaussian_basis(100, 100, CPU)
    assert basis[0, 0] == 1  # t_0 = 0/100
    assert basis[1, 1] == pytest.approx(np.exp(-((1 / 99 - 0.01) ** 2) / 2e-4))


# ----------------------------------------------------------------------------------------------------------- predict


def test_predict_takes_numpy_and_torch_and_gives_back_the_same(released):
    rows = sorted_rows(5, 50)
    from_numpy, from_torch = released.predict(rows), released.predict(torch.from_numpy(rows))
    assert isinstance(from_numpy, np.ndarray) and from_numpy.dtype == np.float32 and from_numpy.shape == (5,)
    assert isinstance(from_torch, torch.Tensor)
    np.testing.assert_array_equal(from_numpy, from_torch)
    np.testing.assert_allclose(released.predict(rows.astype(np.float64)), from_numpy, atol=1e-6)


def test_predict_does_not_depend_on_the_batch_size_or_the_mode(released):
    rows = sorted_rows(100, 50)
    whole = released.predict(rows)
    np.testing.assert_allclose(released.predict(rows, batch_size=7), whole, rtol=1e-5, atol=1e-6)
    before = {name: value.clone() for name, value in released.state_dict().items()}
    released.train()
    np.testing.assert_array_equal(released.predict(rows), whole)
    assert released.training
    assert all(torch.equal(value, before[name]) for name, value in released.state_dict().items())


def test_predict_of_no_rows_is_empty(released):
    assert released.predict(np.empty((0, 50), dtype=np.float32)).shape == (0,)


def test_another_n_warns_once_and_says_both(released):
    with pytest.warns(UserWarning, match="n = 50 .* n = 10") as caught:
        scores = released.predict(sorted_rows(3, 10))
        released.predict(sorted_rows(3, 10))
        released.predict(sorted_rows(3, 50))
    assert len(caught) == 1
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("n", [2, 3, 10, 257])
def test_ties_one_hot_and_uniform_rows_give_finite_scores(n):
    one_hot, uniform = np.zeros(n, dtype=np.float32), np.full(n, 1 / n, dtype=np.float32)
    one_hot[0] = 1
    tied = np.zeros(n, dtype=np.float32)
    tied[:2] = 0.5
    model = trained_looking(num_classes=n)
    model.calibration = Calibration(0.1, (1.0, 0.2, -0.1, 0.3), 2.0)
    for calibrated in (False, True):
        assert np.isfinite(model.predict(np.stack([one_hot, uniform, tied]), calibrated)).all()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (1, 0.5, r"row 3 is not sorted .* 0\.2 comes before 0\.5 at position 3"),
        (0, 0.7, r"row 3 sums to 1\.1"),
        (2, -0.1, r"row 3 holds -0\.1 at position 4"),
        (1, float("nan"), r"row 3 holds nan at position 3"),
        (-1, float("inf"), r"row 3 holds inf at position 2"),
    ],
)
def test_bad_rows_are_refused_with_row_and_value(released, column, value, message):
    rows = np.tile(np.array([0.6, 0.2, 0.1, 0.1], dtype=np.float32), (4, 1))
    rows[2, column + 1 if column else 0] = value
    if value == float("inf"):
        rows[2] = [0.6, value, 0.1, 0.1]
    with pytest.raises(ValueError, match=message):
        released.predict(rows)


@pytest.mark.parametrize("shape", [(3, 1), (3,), (2, 3, 4)])
def test_a_bad_shape_is_refused(released, shape):
    with pytest.raises(ValueError, match="shape"):
        released.predict(np.ones(shape, dtype=np.float32))


# ------------------------------------------------------------------------------------------------------- calibration


def test_simple_scores_of_a_known_row():
    rows = torch.tensor([[0.5, 0.25, 0.125, 0.125], [1.0, 0.0, 0.0, 0.0]])
    floor = float(np.log(1e-12))
    entropy = 0.5 * np.log(2) + 0.25 * np.log(4) + 2 * 0.125 * np.log(8)
    expected = torch.tensor([[0.0, np.log(0.25), np.log(0.125), np.log(entropy)], [-floor, floor, floor, floor]])
    torch.testing.assert_close(simple_scores(rows), expected.float())


def test_calibration_follows_its_formula():
    calibration = Calibration(0.5, (1.0, 0.0, 0.0, 0.0), 2.0)
    rows = torch.tensor([[0.5, 0.25, 0.25]])  # log-odds 0: base 0.5
    base = 1 / (1 + np.exp(-0.5))
    expected = 1 / (1 + np.exp(-(0.5 + 2 * (0.9 - base))))
    assert float(calibration.apply(torch.tensor([0.9]), rows)) == pytest.approx(expected, rel=1e-6)


def test_fitted_regression_equals_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    rows = torch.from_numpy(sorted_rows(500, 6, seed=1))
    correct = torch.rand(500, generator=torch.Generator().manual_seed(0)) < rows[:, 0]
    calibration = fit_calibration(torch.zeros(500), rows, correct, torch.arange(500) < 50)
    scores = simple_scores(rows).double()
    standard = (scores - scores.mean(0)) / (scores.std(0) + 1e-6)
    reference = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(standard, correct)
    ours = scores @ torch.tensor(calibration.weights, dtype=torch.float64) + calibration.intercept
    np.testing.assert_allclose(ours, reference.decision_function(standard), rtol=1e-4, atol=1e-4)


def test_a_network_that_knows_more_gets_weight_and_noise_gets_none_to_speak_of():
    generator = torch.Generator().manual_seed(0)
    rows = torch.from_numpy(sorted_rows(2000, 6, seed=2))
    correct = torch.rand(2000, generator=generator) < 0.5
    held_back = torch.arange(2000) % 2 == 0
    oracle = torch.where(correct, 0.9, 0.1)
    noise = torch.rand(2000, generator=generator)
    assert fit_calibration(oracle, rows, correct, held_back).network > 3
    assert fit_calibration(noise, rows, correct, held_back).network < 0.5
    assert fit_calibration(1 - oracle, rows, correct, held_back).network == 0  # never turned around


def test_the_networks_weight_comes_from_the_rows_held_back():
    rows = torch.from_numpy(sorted_rows(400, 6, seed=2))
    correct = torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.5
    held_back = torch.arange(400) >= 300
    raw = torch.full((400,), 0.5)
    raw[:300] = correct[:300].float()  # knows what it learnt by heart, and nothing else
    assert fit_calibration(raw, rows, correct, held_back).network < 0.5


# ------------------------------------------------------------------------------------------------------ weights file


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


def test_masked_networks_stay_masked(tmp_path):
    trained_looking(masked=True).save(tmp_path / "net.zip")
    assert CLCNet.load(tmp_path / "net.zip").masked


def test_the_same_network_gives_the_same_file(tmp_path):
    for name in "ab":
        trained_looking().save(tmp_path / f"{name}.zip", {"fold": 1})
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_saved_files_hold_the_released_names_shapes_and_sharing(tmp_path, released, reference):
    released.save(tmp_path / "net.zip")
    with zipfile.ZipFile(tmp_path / "net.zip") as archive:
        assert archive.namelist() == ["model_params.json", "network.pt"]
        params = json.loads(archive.read("model_params.json"))
        state = torch.load(io.BytesIO(archive.read("network.pt")), weights_only=True)
    expected = part_of(reference, "state/")
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


@pytest.fixture
def parts(tmp_path) -> tuple[Path, dict[str, bytes]]:
    """A place for a broken weights file, and the members of a good one."""
    trained_looking().save(tmp_path / "good.zip")
    with zipfile.ZipFile(tmp_path / "good.zip") as archive:
        return tmp_path / "broken.zip", {name: archive.read(name) for name in archive.namelist()}


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def edited(members: dict[str, bytes], **init_params: object) -> dict[str, bytes]:
    params = json.loads(members["model_params.json"])
    params["init_params"] |= init_params
    return members | {"model_params.json": json.dumps(params).encode()}


def saved(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        CLCNet.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.zip"):
        CLCNet.load(tmp_path / "nowhere.zip")


def test_a_file_that_is_no_zip_is_refused(parts):
    parts[0].write_bytes(b"not a zip")
    refused(parts[0], "not a readable zip")


def test_a_truncated_zip_is_refused(parts):
    path, members = parts
    write_zip(path, members)
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "not a readable zip")


@pytest.mark.parametrize("name", ["model_params.json", "network.pt"])
def test_a_missing_member_is_named(parts, name):
    path, members = parts
    write_zip(path, {key: value for key, value in members.items() if key != name})
    refused(path, f"no member {name}")


def test_parameters_that_are_no_json_are_refused(parts):
    path, members = parts
    write_zip(path, members | {"model_params.json": b"{"})
    refused(path, "not JSON")


@pytest.mark.parametrize(
    ("params", "message"), [(b"[]", "not a JSON object"), (b"{}", "no init_params"), (b'{"init_params": 3}', "no init")]
)
def test_parameters_of_another_kind_are_refused(parts, params, message):
    path, members = parts
    write_zip(path, members | {"model_params.json": params})
    refused(path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_d": "8"}, "n_d"),
        ({"n_steps": 10**9}, "n_steps"),
        ({"input_dim": 0}, "input_dim"),
        ({"mapping_dim": True}, "mapping_dim"),
        ({"gamma": None}, "gamma"),
        ({"mask_type": "entmax"}, "entmax"),
        ({"n_d": 9}, "shape"),
    ],
)
def test_impossible_parameters_are_named(parts, change, message):
    path, members = parts
    write_zip(path, edited(members, **change))
    refused(path, message)


def test_a_later_format_version_is_refused(parts):
    path, members = parts
    params = json.loads(members["model_params.json"]) | {"format_version": 2}
    write_zip(path, members | {"model_params.json": json.dumps(params).encode()})
    refused(path, "format version 2")


@pytest.mark.parametrize("calibration", [{}, {"intercept": 1, "weights": [1], "network": 0}, "none", [1]])
def test_an_unknown_calibration_is_refused(parts, calibration):
    path, members = parts
    params = json.loads(members["model_params.json"]) | {"calibration": calibration}
    write_zip(path, members | {"model_params.json": json.dumps(params).encode()})
    refused(path, "calibration")


def test_missing_extra_misshapen_and_infinite_tensors_are_named(parts):
    path, members = parts
    state = torch.load(io.BytesIO(members["network.pt"]), weights_only=True)
    name = "tabnet.final_mapping.weight"
    for change, message in (
        ({key: value for key, value in state.items() if key != name}, f"lacks {name}"),
        (state | {"tabnet.more": torch.zeros(1)}, "unknown tabnet.more"),
        (state | {name: torch.zeros(1, 9)}, r"shape \(1, 9\), expected \(1, 8\)"),
        (state | {name: torch.full((1, 8), float("nan"))}, "not finite"),
        (state | {name: [1.0]}, "is a list"),
        ([1, 2], "holds a list"),
    ):
        write_zip(path, members | {"network.pt": saved(change)})
        refused(path, message)


def test_pickled_code_is_never_run(parts, tmp_path):
    path, members = parts
    write_zip(path, members | {"network.pt": saved({"tabnet.final_mapping.weight": Trap(tmp_path / "sprung")})})
    refused(path, "not a plain torch state dict")
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_member_that_unpacks_to_too_much_is_refused_unread(parts):
    path, members = parts
    write_zip(path, members | {"network.pt": bytes(65 * 2**20)})
    assert path.stat().st_size < 2**20
    refused(path, "declares")


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
