"""The reverse step's mean and variance against the papers' formulas, on full and on respaced chains."""

import numpy as np
import pytest
import torch

from src.diffusion.denoiser import posterior_mean
from src.diffusion.schedule import Cosine, Linear
from src.diffusion.variance import Large, Small
from tests.diffusion import reference_numpy as reference

T = 1000
TABLES = {
    "linear": (Linear(T), reference.alphabar_of(reference.betas_linear(T))),
    "cosine": (Cosine(T), reference.alphabar_of(reference.betas_cosine(T))),
}
FULL = [(1, 0), (2, 1), (T // 2, T // 2 - 1), (T, T - 1)]
RESPACED = [(1, 0), (21, 1), (501, 481), (1000, 980)]


@pytest.mark.parametrize("steps", [FULL, RESPACED], ids=["full", "respaced"])
@pytest.mark.parametrize("name", TABLES)
def test_posterior(name, steps):
    schedule, alphabar = TABLES[name]
    x0, x_t = np.random.default_rng(0).standard_normal((2, len(steps), 1, 2, 2))
    times, befores = (torch.tensor(column, dtype=torch.float64) for column in zip(*steps, strict=True))
    t, s = schedule(times), schedule(befores)
    mean = posterior_mean(torch.from_numpy(x0), torch.from_numpy(x_t), t, s).numpy()
    small, large = Small()(t, s, None), Large()(t, s, None)
    for i, (a, b) in enumerate(steps):
        expected = reference.posterior_mean(alphabar, a, b, x0[i], x_t[i])
        np.testing.assert_allclose(mean[i], expected, rtol=1e-10)
        np.testing.assert_allclose(large[i], reference.beta_between(alphabar, a, b), rtol=1e-10)
        np.testing.assert_allclose(small[i], reference.posterior_variance(alphabar, a, b), rtol=1e-10)


def test_floats_and_tensors_agree():
    schedule = Linear(T)
    times = torch.tensor([1000.0, 980.0, 1.0, 0.0], dtype=torch.float64)
    grid = schedule(times)
    for i, (t, s) in enumerate(zip(grid.scalars()[:-1], grid.scalars()[1:], strict=True)):
        pair = schedule(times[i : i + 1]), schedule(times[i + 1 : i + 2])
        assert Small()(t, s, None) == pytest.approx(Small()(*pair, None).item(), rel=1e-12)
        assert Large()(t, s, None) == pytest.approx(Large()(*pair, None).item(), rel=1e-12)
