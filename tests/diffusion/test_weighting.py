"""Checks weightings against the papers' formulas."""

import numpy as np
import pytest
import torch

from src.diffusion.noise_level import NoiseLevel
from src.diffusion.parameterization import EDM, Eps
from src.diffusion.parameterization import Velocity as Flow
from src.diffusion.schedule import EDM as Sigma
from src.diffusion.schedule import VE, Linear, RectifiedFlow
from src.diffusion.weighting import EDM as EDMWeighting
from src.diffusion.weighting import P2, SNR, LearnedUncertainty, MinSNR, Simple, Velocity

ALPHA, SIGMA = np.array([0.99, 0.6, 0.1]), np.array([0.1, 0.8, 0.99])
LEVEL = NoiseLevel(torch.from_numpy(ALPHA), torch.from_numpy(SIGMA), torch.zeros(3))
RATIO = (ALPHA / SIGMA) ** 2


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        (Simple(), 1 / 0.7**2 * np.ones(3)),
        (SNR(), RATIO),
        (MinSNR(5.0), np.minimum(RATIO, 5)),
        (P2(1.0, 1.0), RATIO / (1 + RATIO)),
        (P2(2.0, 0.5), RATIO / np.sqrt(2 + RATIO)),
        (EDMWeighting(0.5), ((SIGMA / ALPHA) ** 2 + 0.25) / (SIGMA / ALPHA * 0.5) ** 2),
        (LearnedUncertainty(SNR()), RATIO),
        (Velocity(0.2), 1 / np.maximum(SIGMA, 0.2) ** 2),
    ],
)
def test_weights_on_the_error_of_x0(weighting, expected):
    c_out = torch.full((3,), 0.7, dtype=torch.float64)
    np.testing.assert_allclose(weighting(LEVEL, c_out), expected, rtol=1e-12)


def test_edm_weighs_edm_targets_equally():
    for schedule in (Sigma(), VE(), Linear()):
        level = schedule(schedule.time_at(torch.rand(9, dtype=torch.float64)))
        c_out = EDM(0.5).coefficients(level)[2]
        torch.testing.assert_close(EDMWeighting(0.5)(level, c_out) * c_out**2, torch.ones_like(c_out))


def test_velocity_weighs_the_flow_equally():
    level = RectifiedFlow()(torch.tensor([0.05, 0.5, 1.0], dtype=torch.float64))
    c_out = Flow().coefficients(level)[2]
    torch.testing.assert_close(Velocity(0.05)(level, c_out) * c_out**2, torch.ones_like(c_out))


def test_snr_weighs_eps_equally():
    level = Linear()(torch.tensor([1.0, 500.0, 1000.0], dtype=torch.float64))
    c_out = Eps().coefficients(level)[2]
    torch.testing.assert_close(SNR()(level, c_out) * c_out**2, torch.ones_like(c_out))


def test_uncertainty_starts_at_zero_and_learns_the_expected_loss():
    # E[loss]/exp(u) + u is minimal at u = ln E[loss] (Karras et al. 2024, eq. 22); here the loss depends on sigma
    torch.manual_seed(0)
    schedule, weighting = Sigma(), LearnedUncertainty(EDMWeighting())
    level = schedule(schedule.time_at(torch.linspace(0, 0.999, 64, dtype=torch.float64)))
    loss = (0.3 + torch.sin(level.log_snr / 2) ** 2).float()
    assert torch.equal(weighting.balance(loss, level), loss)
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        weighting.balance(loss, level).mean().backward()
        optimizer.step()
    # at the optimum the balanced loss is 1 + ln(loss), for every noise level
    balanced = weighting.balance(loss, level).detach()
    assert (balanced - 1 - loss.log()).abs().max() < 0.01


def test_uncertainty_is_applied_only_in_training():
    weighting = LearnedUncertainty(SNR())
    torch.nn.init.normal_(weighting.uncertainty.weight)
    losses = torch.tensor([0.1, 1.0, 3.0])
    assert not torch.equal(weighting.balance(losses, LEVEL), losses)
    assert torch.equal(weighting.eval().balance(losses, LEVEL), losses)


def test_uncertainty_is_computed_in_the_precision_of_the_losses():
    # u = sum_i w_i sqrt(2) cos(f_i ln(sigma/alpha)/4 + phase_i), EDM2's magnitude-preserving features
    weighting = LearnedUncertainty(SNR())
    torch.nn.init.normal_(weighting.uncertainty.weight, std=0.1)
    f, phases, w = (
        v.detach().double().numpy()
        for v in (weighting.frequencies, weighting.phases, weighting.uncertainty.weight[0])
    )
    u = (w * np.sqrt(2) * np.cos(np.log(SIGMA / ALPHA)[:, None] / 4 * f + phases)).sum(axis=1)
    losses = np.array([0.1, 1.0, 3.0])
    ours = weighting.balance(torch.from_numpy(losses), LEVEL).detach()
    np.testing.assert_allclose(ours, losses / np.exp(u) + u, rtol=1e-12)


def test_uncertainty_is_finite_for_pure_noise():
    level = NoiseLevel(torch.zeros(1).double(), torch.ones(1).double(), torch.zeros(1))
    assert LearnedUncertainty(SNR()).balance(torch.ones(1), level).isfinite().all()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: MinSNR(0.0), "gamma"),
        (lambda: P2(k=0.0), "k"),
        (lambda: P2(gamma=-1.0), "gamma"),
        (lambda: EDMWeighting(0.0), "sigma_data"),
        (lambda: LearnedUncertainty(SNR(), 0), "features"),
    ],
)
def test_invalid_arguments_are_refused(make, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        make()
