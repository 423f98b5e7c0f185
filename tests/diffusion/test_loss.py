"""The training loss against DDPM's formula and against data whose best loss is known."""

import numpy as np
import pytest
import torch
from torch import nn

from src.diffusion.denoiser import Denoiser
from src.diffusion.loss import DenoisingLoss
from src.diffusion.parameterization import Eps
from src.diffusion.schedule import Linear
from src.diffusion.time_sampling import Uniform
from src.diffusion.weighting import Simple
from tests.diffusion import reference_numpy as reference

T = 1000


class Wavy(nn.Module):
    """Depends on the image and on the label, so that a wrong time shows."""

    def forward(self, x, label, condition=None):
        return torch.sin(x + label.view(-1, 1, 1, 1) / 100)


def _draws(shape=(4, 3, 4, 4), seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, shape), rng.standard_normal(shape)


def test_l_simple_of_ddpm():
    # Ho et al. 2020, eq. 14, at t = 1, 2, T/2, T: mean over pixels of (eps - F(x_t, t - 1))^2
    alphabar = reference.alphabar_of(reference.betas_linear(T))
    x0, eps = _draws()
    times = [1, 2, T // 2, T]
    loss = DenoisingLoss(Denoiser(Wavy(), Linear(T), Eps()), Simple(), Uniform())
    ours = loss(torch.from_numpy(x0), torch.tensor(times, dtype=torch.float64), torch.from_numpy(eps))
    assert ours.dtype == torch.float64 and ours.shape == (4,)
    for i, t in enumerate(times):
        x_t = np.sqrt(alphabar[t]) * x0[i] + np.sqrt(1 - alphabar[t]) * eps[i]
        expected = np.mean((eps[i] - np.sin(x_t + (t - 1) / 100)) ** 2)
        assert ours[i].item() == pytest.approx(expected, rel=1e-10)
