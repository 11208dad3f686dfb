"""The layers against numbers worked out by hand, torch's own and literal ones."""

import numpy as np
import pytest
import torch
from literal_clcnet import sparsemax as literal_sparsemax

from clcnet.network.layers import GAUSSIAN_REACH, GhostBatchNorm, gaussian_basis, sparsemax, times_gaussian

CPU = (torch.float32, torch.device("cpu"))


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
