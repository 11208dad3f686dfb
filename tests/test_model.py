"""The network against the released one's numbers and a literal O(n^2) implementation, and `predict`."""

import copy

import numpy as np
import pytest
import torch
from literal_clcnet import LiteralCLCNet
from networks import part_of, read_reference, released_network, sorted_rows, trained_looking

from clcnet.network.calibration import Calibration
from clcnet.network.model import CLCNet, load_released_state, released_names, to_released_state

SIZES = (2, 10, 50, 1000)  # n of the reference scores
OFF_ITS_N = "this CLCNet was trained at n"


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return read_reference()


@pytest.fixture
def released() -> CLCNet:
    return released_network()


@pytest.mark.filterwarnings(f"ignore:{OFF_ITS_N}")
@pytest.mark.parametrize("n", SIZES)
def test_evaluation_scores_equal_the_released_ones(released, reference, n):
    expected = reference[f"eval/score_{n}"]
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
    return {name: tensor.detach() for name, tensor in released_names(holder)}


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
    load_released_state(model, state)
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
    ours, expected = dict(released_names(released)), part_of(reference, "train/after/")
    compared = [name for name in expected if "initial_bn" not in name]  # that one nothing reads
    assert len(compared) == 38
    for name in compared:
        np.testing.assert_allclose(ours[name].detach(), expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("n", [2, 3, 99, 100, 101, 457])
def test_scores_equal_the_literal_network(n):
    model = trained_looking(n)
    literal = LiteralCLCNet(to_released_state(model))
    rows = sorted_rows(40, n, seed=n)
    rows[0] = [1] + [0] * (n - 1)
    rows[1] = 1 / n
    expected, _ = literal(torch.from_numpy(rows))
    np.testing.assert_allclose(model.predict(rows), expected.numpy(), rtol=2e-5, atol=2e-5)
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.from_numpy(rows)), expected.numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("num_rows", [2, 100, 128, 129, 300])
def test_training_mode_equals_the_literal_network_for_any_last_part(num_rows):
    model = trained_looking().double()
    literal = LiteralCLCNet(to_released_state(model))
    literal.training = True
    rows = torch.from_numpy(sorted_rows(num_rows, 10, seed=num_rows)).double()
    expected_score, expected_sparsity = literal(rows)
    score, sparsity = model.train().score_and_sparsity(rows)
    torch.testing.assert_close(score, expected_score, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(sparsity, expected_sparsity, rtol=1e-7, atol=1e-7)
    for name, value in released_names(model):
        if "running" in name:
            torch.testing.assert_close(value, literal.state[name], rtol=1e-7, atol=1e-7)


@pytest.mark.filterwarnings(f"ignore:{OFF_ITS_N}")
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("n", [2, 5, 10, 37, 100, 1000])
def test_released_weights_load_and_give_the_released_scores(shared, split, n):
    (path,) = (shared / "reference").glob(f"CLCNet_imagenet_split_{split}(*).zip")
    with np.load(shared / "reference" / f"released_split_{split}_scores.npz") as arrays:
        rows, expected = arrays[f"x_{n}"], arrays[f"score_{n}"]
    ours = CLCNet.load(path).predict(rows)
    # Off its own n the network amplifies rounding: in float64 the literal network is up to 2e-5 away from these.
    largest = np.abs(expected).max()
    assert np.abs(ours - expected).max() <= (1e-5 if n == 1000 else 3e-5) * largest


def test_modules_carry_no_parameter_that_nothing_reads(reference):
    model = CLCNet(50)
    training_step(model, reference)
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------------- predict


def test_predict_does_not_depend_on_the_batch_size_or_the_mode(released):
    rows = sorted_rows(100, 50)
    whole = released.predict(rows)
    for batch_size in (1, 2, 3, 7, 65):  # to the last bit: what a run finds again must not change its result
        np.testing.assert_array_equal(released.predict(rows, batch_size=batch_size), whole)
    before = {name: value.clone() for name, value in released.state_dict().items()}
    released.train()
    np.testing.assert_array_equal(released.predict(rows), whole)
    assert released.training
    assert all(torch.equal(value, before[name]) for name, value in released.state_dict().items())


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_no_rows_is_refused(released, batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
        released.predict(sorted_rows(3, 50), batch_size=batch_size)


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
    ("row", "message"),
    [
        ([0.4, 0.1, 0.4, 0.1], r"row 3, probability 3 \(0\.4\) is larger than the one before it"),
        ([0.6, 0.3, 0.1, 0.1], r"row 3 sums to 1\.1"),
        ([0.6, 0.2, 0.1, -0.1], r"row 3, probability 4 \(-0\.1\) is negative"),
        ([0.6, 0.2, np.nan, 0.1], r"row 3, probability 3 \(nan\) is not a finite number"),
        ([0.6, np.inf, 0.1, 0.1], r"row 3, probability 2 \(inf\) is not a finite number"),
    ],
)
def test_bad_rows_are_refused_with_row_and_value(released, row, message):
    rows = np.tile(np.float32([0.6, 0.2, 0.1, 0.1]), (4, 1))
    rows[2] = row
    with pytest.raises(ValueError, match=message):
        released.predict(rows)


def frozen(rows):
    copy = rows.copy()
    copy.flags.writeable = False
    return copy


AS_GIVEN = {
    "reversed": lambda rows: np.sort(rows)[:, ::-1],
    "by columns": np.asfortranarray,
    "every second row": lambda rows: np.repeat(rows, 2, axis=0)[::2],
    "every second column": lambda rows: np.repeat(rows, 2, axis=1)[:, ::2],
    "read-only": frozen,
    "big-endian": lambda rows: rows.astype(">f4"),
    "float64": lambda rows: rows.astype(np.float64),
    "longdouble": lambda rows: rows.astype(np.longdouble),
    "a list": lambda rows: rows.tolist(),
    "torch, transposed": lambda rows: torch.from_numpy(rows.T.copy()).T,
    "torch, negated view": lambda rows: torch.complex(torch.zeros(rows.shape), -torch.from_numpy(rows)).conj().imag,
    "torch, with gradient": lambda rows: torch.from_numpy(rows).requires_grad_(),
    "torch, float64": lambda rows: torch.from_numpy(rows).double(),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("given", AS_GIVEN)
def test_every_layout_of_the_same_rows_has_the_scores_of_the_plain_one(released, given):
    rows = sorted_rows(5, 50)
    scores = released.predict(AS_GIVEN[given](rows))
    assert isinstance(scores, torch.Tensor) == given.startswith("torch")
    assert str(scores.dtype).endswith("float32") and scores.shape == (5,)
    np.testing.assert_array_equal(scores, released.predict(rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_as_the_float32_numbers_that_it_holds(released, dtype):
    rows = torch.zeros(3, 50, dtype=dtype)
    rows[:, :2] = torch.tensor([[1, 0], [0.75, 0.25], [0.5, 0.5]])
    np.testing.assert_array_equal(released.predict(rows), released.predict(rows.float()))
    if dtype == torch.float16:
        np.testing.assert_array_equal(released.predict(rows.numpy()), released.predict(rows.float()))


@pytest.mark.parametrize(
    ("probs", "words"),
    [
        (np.ones((3, 1), np.float32), "ndarray of float32 and shape (3, 1)"),
        (np.ones(3), "ndarray of float64 and shape (3,)"),
        (np.ones((2, 3, 4)), "ndarray of float64 and shape (2, 3, 4)"),
        ([], "ndarray of float64 and shape (0,)"),
        (np.ones((3, 2), object), "ndarray of object and shape (3, 2)"),
        (np.ones((3, 2), int), "ndarray of int64 and shape (3, 2)"),
        (np.ones((3, 2), complex), "ndarray of complex128 and shape (3, 2)"),
        (np.ma.masked_all((3, 2)), "MaskedArray of float64 and shape (3, 2)"),
        (None, "ndarray of object and shape ()"),
        (torch.ones(3, 2, dtype=torch.bool), "Tensor of torch.bool and shape (3, 2)"),
        (torch.ones(3, 2).to_sparse(), "Tensor of torch.float32 and shape (3, 2)"),
        (torch.ones(3, 2, device="meta"), "Tensor of torch.float32 and shape (3, 2)"),
    ],
)
def test_what_is_no_plain_table_of_numbers_is_refused_with_its_dtype_and_shape(released, probs, words):
    with pytest.raises(ValueError) as caught:
        released.predict(probs)
    assert str(caught.value).endswith(f"of shape (N, n) with n >= 2, not a {words}")
