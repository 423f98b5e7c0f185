"""Euler-Maruyama, Langevin corrections and Restart, step by step against their formulas."""

import pytest
import torch

from src.diffusion.sampler import DDPM, EulerMaruyama, Heun, PredictorCorrector, Restart
from src.diffusion.schedule import EDM, VE, VP, Linear
from src.diffusion.spacing import Karras, Trailing
from src.errors import UserError
from tests.diffusion.mixture import MixtureDenoiser, three_modes
from tests.diffusion.sampler.networks import recorded_noise

X = recorded_noise(0)(torch.empty(5, 1, 1, 2))
Z = recorded_noise(1)(X)


def _scores(schedule, x, t):
    level = schedule([t]).scalars()[0]
    return -MixtureDenoiser(three_modes(), schedule)(x, level).eps / level.sigma


@pytest.mark.parametrize("t", [0.9, 0.3, 0.01])
def test_euler_maruyama_on_vp(t):
    # Song et al. 2021, eq. 33: f = -beta(t)/2, g^2 = beta(t) with beta(t) = 0.1 + 19.9 t
    schedule, s = VP(), t - 0.005
    beta = 0.1 + 19.9 * t
    expected = X + 0.005 * (beta / 2 * X + beta * _scores(schedule, X, t)) + (0.005 * beta) ** 0.5 * Z
    ours = EulerMaruyama()(MixtureDenoiser(three_modes(), schedule), X, [t, s], noise=recorded_noise())
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", [1.0, 0.3])
def test_euler_maruyama_on_ve(t):
    # eq. 30: f = 0, g^2 = d sigma^2/dt = 2 sigma^2 ln(sigma_max/sigma_min)
    schedule, s = VE(0.01, 50.0), t - 0.001
    x = 50.0 * X
    g2 = 2 * schedule([t]).sigma.item() ** 2 * torch.tensor(5000.0).double().log().item()
    expected = x + 0.001 * g2 * _scores(schedule, x, t) + (0.001 * g2) ** 0.5 * Z
    ours = EulerMaruyama()(MixtureDenoiser(three_modes(), schedule), x, [t, s], noise=recorded_noise())
    # at t = 1 the derivative is one-sided
    torch.testing.assert_close(ours, expected, rtol=2e-3 if t == 1 else 1e-6, atol=1e-6)


def test_langevin_correction_is_algorithm_5():
    # for a batch of one, where the norms of the published code are the image's own; alpha_i = 1 - beta_i
    schedule, x = Linear(), X[:1]
    denoiser = MixtureDenoiser(three_modes(), schedule)
    noise = recorded_noise(2)
    first, second = noise(x), noise(x)
    score = _scores(schedule, x, 700.0)
    alpha = 1 - schedule.beta[699].item()
    step = 2 * alpha * (0.16 * first.norm() / score.norm()) ** 2
    corrected = x + step * score + (2 * step) ** 0.5 * first
    expected = DDPM()(denoiser, corrected, [700.0, 699.0], noise=lambda _: second)
    ours = PredictorCorrector(DDPM())(denoiser, x, [700.0, 699.0], noise=recorded_noise(2))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_corrections_of_an_image_do_not_see_its_neighbours():
    schedule = Linear()
    denoiser = MixtureDenoiser(three_modes(), schedule)
    times, noise = Trailing()(schedule, 10), [recorded_noise(i)(X) for i in range(30)]
    replay, replay_last = iter(noise), iter([z[-1:] for z in noise])
    together = PredictorCorrector(DDPM())(denoiser, X, times, noise=lambda _: next(replay))
    alone = PredictorCorrector(DDPM())(denoiser, X[-1:], times, noise=lambda _: next(replay_last))
    torch.testing.assert_close(together[-1:], alone, rtol=1e-10, atol=1e-10)


def test_restart_is_its_algorithm():
    schedule = EDM()
    denoiser = MixtureDenoiser(three_modes(), schedule)
    times = Karras()(schedule, 18)
    bottom = (times[:-1] - 0.06).abs().argmin().item()
    noise = recorded_noise(3)
    x = Heun()(denoiser, 80 * X, times[: bottom + 1])
    top, end = 0.3 ** (1 / 7), times[bottom].item() ** (1 / 7)
    interval = [(top + i / 2 * (end - top)) ** 7 for i in range(3)]
    for _ in range(2):
        x = x + (interval[0] ** 2 - interval[-1] ** 2) ** 0.5 * noise(x)
        x = Heun()(denoiser, x, interval)
    expected = Heun()(denoiser, x, times[bottom:])
    ours = Restart(Heun())(denoiser, 80 * X, times, noise=recorded_noise(3))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_restart_refuses_steps_that_miss_its_interval():
    schedule = EDM()
    with pytest.raises(UserError, match=r"^sampler.sigma_max=0.3 is below 79.8, the visited level nearest"):
        Restart(Heun())(MixtureDenoiser(three_modes(), schedule), 80 * X, [80.0, 79.9, 79.8, 0.0])
