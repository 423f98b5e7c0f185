"""Checks the adaptive solver against torchdiffeq and against its tolerance."""

import math

import pytest
import torch

from src.diffusion.noise_level import NoiseLevel
from src.diffusion.sampler import Dopri5
from src.diffusion.schedule import EDM, Cosine, RectifiedFlow
from src.errors import UserError
from tests.diffusion.mixture import MixtureDenoiser, three_modes
from tests.diffusion.sampler.networks import recorded_noise

SIGMA_MIN, SIGMA_MAX = 0.01, 50.0


def _start(scale=1.0):
    return scale * recorded_noise(0)(torch.empty(16, 1, 1, 2))


def test_agrees_with_torchdiffeq():
    from torchdiffeq import odeint

    mixture = three_modes()

    def derivative(sigma, x):
        return (x - mixture.posterior_mean(x, NoiseLevel(1.0, sigma, sigma))) / sigma

    sigmas = torch.tensor([SIGMA_MAX, 1.0, SIGMA_MIN], dtype=torch.float64)
    expected = odeint(derivative, _start(SIGMA_MAX), sigmas, rtol=1e-9, atol=1e-9, method="dopri5")
    denoiser = MixtureDenoiser(mixture, EDM(SIGMA_MIN, SIGMA_MAX))
    states = list(Dopri5(1e-9).trajectory(denoiser, _start(SIGMA_MAX), sigmas))
    for state, x in zip(states, expected, strict=True):
        torch.testing.assert_close(state.x, x, rtol=1e-6, atol=1e-6)
    assert states[-1].evaluations == denoiser.calls


@pytest.mark.parametrize("schedule", [EDM(), Cosine(), RectifiedFlow()], ids=lambda s: type(s).__name__)
def test_error_follows_the_tolerance(schedule):
    denoiser = MixtureDenoiser(three_modes(), schedule)
    times = [schedule.t_max, 0.0]
    x_T = _start(schedule([schedule.t_max]).sigma.item())
    reference = Dopri5(1e-11)(denoiser, x_T, times)
    errors, evaluations = [], []
    for tolerance in (1e-3, 1e-5, 1e-7):
        *_, last = Dopri5(tolerance).trajectory(denoiser, x_T, times)
        errors.append((last.x - reference).square().mean().sqrt().item())
        evaluations.append(last.evaluations)
        assert errors[-1] < 30 * tolerance
    assert errors == sorted(errors, reverse=True)
    assert evaluations == sorted(evaluations)


def test_result_does_not_depend_on_the_intermediate_times():
    schedule = Cosine()
    denoiser = MixtureDenoiser(three_modes(), schedule)
    one = Dopri5(1e-9)(denoiser, _start(), [1000.0, 0.0])
    many = Dopri5(1e-9)(denoiser, _start(), [1000.0, 700.0, 300.0, 20.0, 0.0])
    torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-6)


def test_each_state_has_the_prediction_at_the_start_of_its_interval():
    denoiser = MixtureDenoiser(three_modes(), Cosine())
    times = [1000.0, 700.0, 300.0, 0.0]
    before, *states, _ = Dopri5(1e-5).trajectory(denoiser, _start(), times)
    for time, state in zip(times[:2], states, strict=True):
        (level,) = Cosine()([time]).scalars()
        torch.testing.assert_close(state.prediction.x0, denoiser(before.x, level).x0, rtol=1e-6, atol=1e-6)
        before = state


def test_nan_is_reported_with_its_time_and_not_as_a_missed_tolerance():
    class Diverged(MixtureDenoiser):
        def forward(self, x_t, level, condition=None):
            return super().forward(x_t * (math.nan if level.label < 400 else 1.0), level)

    denoiser = Diverged(three_modes(), Cosine())
    with pytest.raises(UserError, match=r"images are not finite .* from t = [4-6]\d\d\b.* on:"):
        Dopri5(1e-5)(denoiser, _start(), [1000.0, 700.0, 300.0, 0.0])
    with pytest.raises(UserError, match=r"images are not finite .* from t = 300 on:"):
        Dopri5(1e-5)(denoiser, _start(), [300.0, 0.0])


def test_unreachable_tolerance_is_an_error():
    schedule = EDM()
    denoiser = MixtureDenoiser(three_modes(), schedule)
    with pytest.raises(UserError, match=r"^sampler.tolerance=1e-30 is not reached"):
        Dopri5(1e-30, max_evaluations=500)(denoiser, _start(80.0), [80.0, 0.0])
    with pytest.raises(ValueError, match=r"^tolerance must be positive"):
        Dopri5(0.0)
