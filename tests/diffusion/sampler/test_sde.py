"""Checks Euler-Maruyama, Langevin corrections and Restart against their formulas."""

import pytest
import torch

from src.diffusion.sampler import (
    DDPM,
    EulerMaruyama,
    Heun,
    MultistepDPMSolver,
    PredictorCorrector,
    Restart,
)
from src.diffusion.schedule import EDM, VE, VP, Linear, RectifiedFlow, ZeroTerminalSNR
from src.diffusion.spacing import Karras, Trailing
from src.errors import UserError
from tests.diffusion.mixture import MixtureDenoiser, three_modes
from tests.diffusion.sampler.networks import recorded_noise

X = recorded_noise(0)(torch.empty(5, 1, 1, 2))
Z = recorded_noise(1)(X)


def _scores(schedule, x, t):
    level = schedule([t]).scalars()[0]
    return -MixtureDenoiser(three_modes(), schedule)(x, level).eps / level.sigma


@pytest.mark.parametrize("t", [1.0, 0.9, 0.3, 0.01])
def test_euler_maruyama_on_vp(t):
    # Song et al. 2021, eq. 33: f = -beta(t)/2, g^2 = beta(t) with beta(t) = 0.1 + 19.9 t
    schedule, s = VP(), t - 0.005
    beta = 0.1 + 19.9 * t
    expected = X + 0.005 * (beta / 2 * X + beta * _scores(schedule, X, t)) + (0.005 * beta) ** 0.5 * Z
    ours = EulerMaruyama()(MixtureDenoiser(three_modes(), schedule), X, [t, s], noise=recorded_noise())
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("t", [1.0, 0.3])
def test_euler_maruyama_on_ve(t):
    # eq. 30: f = 0, g^2 = d sigma^2/dt = 2 sigma^2 ln(sigma_max/sigma_min)
    schedule, s = VE(0.01, 50.0), t - 0.001
    x = 50.0 * X
    g2 = 2 * schedule([t]).sigma.item() ** 2 * torch.tensor(5000.0).double().log().item()
    expected = x + 0.001 * g2 * _scores(schedule, x, t) + (0.001 * g2) ** 0.5 * Z
    ours = EulerMaruyama()(MixtureDenoiser(three_modes(), schedule), x, [t, s], noise=recorded_noise())
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("t", "s"), [(80.0, 79.0), (0.01, 0.008), (0.0022, 0.002)])
def test_euler_maruyama_on_edm(t, s):
    # f = 0, g^2 = d sigma^2/dt = 2 sigma with sigma = t
    schedule, x = EDM(), t * X
    expected = x + (t - s) * 2 * t * _scores(schedule, x, t) + ((t - s) * 2 * t) ** 0.5 * Z
    ours = EulerMaruyama()(MixtureDenoiser(three_modes(), schedule), x, [t, s], noise=recorded_noise())
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_euler_maruyama_on_a_flow():
    # alpha = 1 - t, sigma = t: f = -1/(1 - t), g^2 = 2 t + 2 t^2/(1 - t) = 2 t/(1 - t)
    schedule, t, s = RectifiedFlow(), 0.7, 0.65
    f, g2 = -1 / 0.3, 1.4 / 0.3
    expected = X - 0.05 * (f * X - g2 * _scores(schedule, X, t)) + (0.05 * g2) ** 0.5 * Z
    ours = EulerMaruyama()(MixtureDenoiser(three_modes(), schedule), X, [t, s], noise=recorded_noise())
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", [Linear(), ZeroTerminalSNR(Linear())], ids=["linear", "zero"])
@pytest.mark.parametrize("t", [1.0, 500.0, 999.0])
def test_drift_and_diffusion_of_a_table(schedule, t):
    # finite differences of the rows; the continuous linear schedule has f = -beta/2, g^2 = beta
    f, g2 = schedule.drift_and_diffusion(t)
    before, level, after = (schedule([t + i]).scalars()[0] for i in (-1, 0, 1))
    assert f == pytest.approx((after.alpha - before.alpha) / 2 / level.alpha, rel=1e-12)
    if isinstance(schedule, Linear):
        beta = 1000 * (1e-4 + (0.02 - 1e-4) * (t - 0.5) / 999) / 1000
        assert (f, g2) == pytest.approx((-beta / 2, beta), rel=0.02 if t > 1 else 0.3)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_sde_step_from_pure_noise_discards_the_noise(order, eta):
    # the limit alpha_t -> 0 of SDE-DPM-Solver++: x_s = alpha_s x0 + sigma_s z
    schedule = ZeroTerminalSNR(Linear())
    denoiser = MixtureDenoiser(three_modes(), schedule)
    pure, level = schedule([1000.0, 900.0]).scalars()
    expected = level.alpha * denoiser(X, pure).x0 + level.sigma * Z
    sampler = MultistepDPMSolver(order, eta=eta)
    ours = sampler(denoiser, X, [1000.0, 900.0], noise=recorded_noise())
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_langevin_correction_is_algorithm_5():
    # for a batch of one, where the norms of the published code are those of the image; alpha_i = 1 - beta_i
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


def test_langevin_correction_with_norms_averaged_over_the_batch():
    # score SDE's code: mean over the batch of the norms of the noise and of the score
    schedule = Linear()
    denoiser, noise = MixtureDenoiser(three_modes(), schedule), recorded_noise(2)
    first, second = noise(X), noise(X)
    score = _scores(schedule, X, 700.0)
    norm, score_norm = (v.flatten(1).norm(dim=1).mean() for v in (first, score))
    step = 2 * (1 - schedule.beta[699].item()) * (0.16 * norm / score_norm) ** 2
    corrected = X + step * score + (2 * step) ** 0.5 * first
    expected = DDPM()(denoiser, corrected, [700.0, 699.0], noise=lambda _: second)
    sampler = PredictorCorrector(DDPM(), batch_norms=True)
    ours = sampler(denoiser, X, [700.0, 699.0], noise=recorded_noise(2))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_corrections_do_not_depend_on_other_images_of_the_batch():
    schedule = Linear()
    denoiser = MixtureDenoiser(three_modes(), schedule)
    times, noise = Trailing()(schedule, 10), [recorded_noise(i)(X) for i in range(30)]
    replay, replay_last = iter(noise), iter([z[-1:] for z in noise])
    together = PredictorCorrector(DDPM())(denoiser, X, times, noise=lambda _: next(replay))
    alone = PredictorCorrector(DDPM())(denoiser, X[-1:], times, noise=lambda _: next(replay_last))
    torch.testing.assert_close(together[-1:], alone, rtol=1e-10, atol=1e-10)


def test_restart_equals_the_published_algorithm():
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


def test_nested_restarts_visit_each_interval():
    schedule = EDM()
    low, high = (0.06, 0.3, 2, 2), (1.0, 5.0, 3, 1)
    for inner, outer in ((low, high), (high, low)):
        sampler = Restart(Restart(Heun(), *inner), *outer)
        denoiser = MixtureDenoiser(three_modes(), schedule)
        sampler(denoiser, 80 * X, Karras()(schedule, 18), noise=recorded_noise(3))
        assert denoiser.calls == 2 * 18 - 1 + 2 * 2 * 2 + 2 * 3 * 1


def test_restart_refuses_times_that_miss_its_interval():
    schedule = EDM()
    with pytest.raises(UserError, match=r"^sampler.sigma_max=0.3 is below 79.8, the visited level nearest"):
        Restart(Heun())(MixtureDenoiser(three_modes(), schedule), 80 * X, [80.0, 79.9, 79.8, 0.0])
