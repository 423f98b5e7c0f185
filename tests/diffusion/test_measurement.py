"""Linear operators against their definition as matrices, and the blur against SciPy."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from src.diffusion.measurement import Blur, Downsample, Mask, enlarged

SHAPE = (2, 4, 6)  # not square, so that swapped sides fail
KNOWN = torch.rand(1, 1, *SHAPE[1:], generator=torch.Generator().manual_seed(0)) < 0.5
OPERATORS = [Mask(KNOWN), Downsample(2), Downsample(1), Blur(0.8), Blur(3.0)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix_of(operator):
    """A, shape (M, D): the measurements of the unit images as columns."""
    size = SHAPE[0] * SHAPE[1] * SHAPE[2]
    units = torch.eye(size, dtype=torch.float64).view(size, *SHAPE)
    return operator(units).flatten(1).T


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: type(o).__name__)
def test_adjoint_and_solution_are_those_of_the_matrix(operator):
    A, x = matrix_of(operator), random(3, *SHAPE)
    y = operator(x)
    torch.testing.assert_close(y.flatten(1), x.flatten(1) @ A.T)
    other = random(*y.shape, seed=1)
    torch.testing.assert_close(operator.adjoint(other).flatten(1), other.flatten(1) @ A)
    scale, shift = 0.7, 0.3
    S = scale * A @ A.T + shift * torch.eye(len(A), dtype=torch.float64)
    expected = torch.linalg.solve(S, y.flatten(1).T).T
    solved = operator.solve(y, scale, shift).flatten(1)
    torch.testing.assert_close(solved, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("operator", OPERATORS[:3], ids=lambda o: type(o).__name__)
def test_pseudo_inverse(operator):
    y = operator(random(3, *SHAPE))
    expected = y.flatten(1) @ torch.linalg.pinv(matrix_of(operator)).T
    torch.testing.assert_close(operator.pseudo_inverse(y).flatten(1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("std", [0.5, 1.0, 2.5])
def test_blur_is_scipy_s_gaussian_filter(std):
    x = random(2, *SHAPE)
    expected = np.stack(
        [[gaussian_filter(plane, std, mode="reflect") for plane in image] for image in x.numpy()]
    )
    torch.testing.assert_close(Blur(std)(x), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_enlarged_repeats_each_pixel():
    small = torch.tensor([[[[1.0, 2.0]]]])
    assert enlarged(small, 2).tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2]]]]


@pytest.mark.parametrize(("make", "message"), [(lambda: Blur(0.0), "std"), (lambda: Downsample(0), "factor")])
def test_numbers_are_checked(make, message):
    with pytest.raises(ValueError, match=f"^{message} must be"):
        make()
