"""Posterior sampling against the exact posterior: of one Gaussian in closed form, of a mixture by samples."""

from itertools import pairwise

import pytest
import torch

from src.diffusion.measurement import Blur, Downsample, Mask, Measurement
from src.diffusion.restoration import DDNM, DPS, PiGDM, RePaint, Replacement, jump_of, with_gradient
from src.diffusion.sampler import DDIM, DDPM, Heun, MultistepDPMSolver, PerImageNoise
from src.diffusion.schedule import EDM, VP, Cosine, RectifiedFlow
from src.diffusion.spacing import Karras, Trailing
from src.errors import UserError
from tests.diffusion.mixture import Mixture, MixtureDenoiser, Posterior, three_modes
from tests.diffusion.test_measurement import KNOWN, SHAPE, matrix_of, random

OPERATORS = [Mask(KNOWN), Downsample(2), Blur(0.8)]
SCHEDULES = [Cosine(), VP(), EDM(), RectifiedFlow()]
METHODS = [Replacement, RePaint, DPS, PiGDM, DDNM]


def named(part):
    return getattr(part, "__name__", type(part).__name__)


def level_of(schedule):
    return schedule([0.4 * schedule.t_max if schedule.t_max <= 1000 else 400.0]).scalars()[0]


def one_gaussian(variance=0.3):
    one = torch.ones(1, dtype=torch.float64)
    return Mixture(random(1, *SHAPE, seed=5), one * variance, one)


class OneStep(DDIM):
    """A solver that returns the estimate of x0."""

    def step(self, denoiser, x_t, t, s, noise, path):
        prediction = denoiser(x_t, t)
        return super().step(denoiser, x_t, t, s, noise, path)._replace(x=prediction.x0)


# of one Gaussian


@pytest.mark.parametrize("operator", OPERATORS, ids=named)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_dps_takes_the_gradient_of_the_residual_norm(schedule, operator):
    # x0_hat = m + g (x_t - alpha m) with g = alpha v / (alpha^2 v + sigma^2), so d|r|/dx_t = -g A^T r/|r|
    mixture, level, x_t = one_gaussian(), level_of(schedule), random(3, *SHAPE)
    denoiser = MixtureDenoiser(mixture, schedule)
    y = operator(random(3, *SHAPE, seed=7))
    method = DPS(DDIM(), Measurement(operator, y), scale=0.7)
    _, gradient = with_gradient(denoiser, x_t, level, method._cotangent)
    gain = level.alpha * 0.3 / (level.alpha**2 * 0.3 + level.sigma**2)
    x0 = mixture.means + gain * (x_t - level.alpha * mixture.means)
    A = matrix_of(operator)
    residual = y.flatten(1) - x0.flatten(1) @ A.T
    expected = -gain * residual @ A / residual.norm(dim=1, keepdim=True)
    torch.testing.assert_close(gradient.flatten(1), expected, rtol=1e-10, atol=1e-10)
    # and the step subtracts it
    times = [schedule.time_of_log_snr([level.log_snr]).item(), 0.0]
    plain = DDIM()(denoiser, x_t, times)
    torch.testing.assert_close(method(denoiser, x_t, times), plain - 0.7 * expected.view_as(plain))


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("operator", OPERATORS, ids=named)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_pigdm_is_the_exact_posterior_mean_of_a_gaussian(schedule, operator, noise):
    # E[x0 | x_t, y] from the joint covariance of (x_t, y) given x0 ~ N(m, v I)
    v, level, x_t = 0.3, level_of(schedule), random(2, *SHAPE)
    mixture = one_gaussian(v)
    A = matrix_of(operator)
    if isinstance(operator, Blur):
        noise = noise or 0.05  # the noiseless problem is badly conditioned
    y = operator(random(2, *SHAPE, seed=7))
    rows = torch.cat([level.alpha * torch.eye(A.shape[1], dtype=torch.float64), A])
    shift = torch.tensor([level.sigma**2] * A.shape[1] + [noise**2] * len(A), dtype=torch.float64)
    S = v * rows @ rows.T + shift.diag()
    mean = mixture.means.flatten(1)
    seen = torch.cat([x_t.flatten(1), y.flatten(1)], dim=1) - mean @ rows.T
    expected = mean + seen @ torch.linalg.pinv(S, hermitian=True) @ rows * v
    method = PiGDM(OneStep(), Measurement(operator, y, noise), data_std=v**0.5)
    times = [schedule.time_of_log_snr([level.log_snr]).item(), 0.0]
    found = method(MixtureDenoiser(mixture, schedule), x_t, times)
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("operator", OPERATORS[:2], ids=named)
def test_ddnm_replaces_the_measured_part_of_x0(operator):
    A, y = matrix_of(operator), operator(random(2, *SHAPE, seed=7))
    x_t, mixture, schedule = random(2, *SHAPE), one_gaussian(), Cosine()
    denoiser = MixtureDenoiser(mixture, schedule)
    x0 = mixture.posterior_mean(x_t, schedule([400.0]).scalars()[0]).flatten(1)
    inverse = torch.linalg.pinv(A)
    expected = y.flatten(1) @ inverse.T + x0 - x0 @ (inverse @ A).T
    found = DDNM(OneStep(), Measurement(operator, y))(denoiser, x_t, [400.0, 0.0])
    torch.testing.assert_close(found.flatten(1), expected)


def test_pigdm_stays_unguided_without_signal():
    schedule, mixture, x_t = RectifiedFlow(), one_gaussian(), random(2, *SHAPE)
    denoiser = MixtureDenoiser(mixture, schedule)
    method = PiGDM(OneStep(), Measurement(Downsample(2), Downsample(2)(x_t)))
    assert torch.equal(method(denoiser, x_t, [1.0, 0.0]), denoiser(x_t, schedule([1.0]).scalars()[0]).x0)


# of a mixture in the plane, whose first number is known


def sampled(method, steps=50, n=1500, solver=None, **numbers):
    """Samples of p(x0 | first number = -0.25) by a method, and exact ones: their second numbers."""
    mixture, schedule = three_modes(), Cosine()
    first = torch.tensor([-0.25], dtype=torch.float64)
    posterior = Posterior(mixture, torch.tensor([[1.0, 0.0]], dtype=torch.float64), first)
    y = torch.zeros(n, 1, 1, 2, dtype=torch.float64)
    y[..., 0] = first
    measurement = Measurement(Mask(torch.tensor([True, False]).view(1, 1, 1, 2)), y)
    source = torch.Generator().manual_seed(1)

    def noise(x):
        return torch.randn(x.shape, dtype=x.dtype, generator=source)

    x = method(solver or DDPM(), measurement, **numbers)(
        MixtureDenoiser(mixture, schedule), noise(y), Trailing()(schedule, steps), None, noise
    )
    return x[:, 0, 0, 1], posterior.sample(n, source)[:, 0, 0, 1]


def distance(a, b):
    """Wasserstein distance of order 1 of two samples of the same size."""
    return (a.sort().values - b.sort().values).abs().mean().item()


def test_samples_of_the_exact_posterior_have_its_moments():
    A, y = torch.tensor([[1.0, 0.5]], dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)
    posterior = Posterior(three_modes(), A, y, noise=0.3)
    # against a sum over a fine grid
    line = torch.linspace(-3, 3, 601, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1).view(-1, 1, 1, 2)
    log_joint = three_modes().log_density(grid) - (y - grid.flatten(1) @ A.T).square().sum(dim=1) / (2 * 0.09)
    weights = log_joint.softmax(dim=0)[:, None]
    mean = (weights * grid.flatten(1)).sum(dim=0)
    torch.testing.assert_close(posterior.mean.flatten(), mean, rtol=1e-6, atol=1e-6)
    samples = posterior.sample(20_000, torch.Generator().manual_seed(0)).flatten(1)
    torch.testing.assert_close(samples.mean(dim=0), mean, rtol=0, atol=0.02)
    spread = (weights * (grid.flatten(1) - mean).square()).sum(dim=0)
    torch.testing.assert_close(samples.var(dim=0), spread, rtol=0.05, atol=0)


def test_resampling_brings_repaint_nearer_to_the_posterior():
    # docs/editing.md has these distances for more samples
    plain = distance(*sampled(Replacement))
    some = distance(*sampled(RePaint, jump_length=1, n_resample=4))
    many = distance(*sampled(RePaint, jump_length=1, n_resample=20))
    assert plain > 0.38
    assert some < plain - 0.02
    assert many < some - 0.08
    assert many < 0.27


@pytest.mark.parametrize(
    ("method", "numbers", "bounds"),
    [(DPS, {"scale": 0.3}, (0.0, 0.22)), (DPS, {"scale": 0.0}, (0.36, 0.6)), (PiGDM, {}, (0.25, 0.4))],
    ids=["dps", "unguided", "pigdm"],
)
def test_distance_of_guidance_from_the_posterior(method, numbers, bounds):
    low, high = bounds
    assert low <= distance(*sampled(method, **numbers)) <= high


# of every method


def images_of(method, measurement, n, steps=6, solver=None, start=0):
    schedule = Cosine()
    noise = PerImageNoise(0, range(start, start + n))
    x_T = noise(torch.empty(n, *SHAPE, dtype=torch.float64))
    numbers = {"jump_length": 2, "n_resample": 3} if method is RePaint else {}
    sampler = method(solver or DDPM(), measurement, **numbers)
    return sampler(MixtureDenoiser(one_gaussian(), schedule), x_T, Trailing()(schedule, steps), None, noise)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_an_image_does_not_depend_on_its_batch(method):
    y = Mask(KNOWN)(random(3, *SHAPE, seed=7))
    together = images_of(method, Measurement(Mask(KNOWN), y), 3)
    alone = images_of(method, Measurement(Mask(KNOWN), y[2:]), 1, start=2)
    torch.testing.assert_close(alone, together[2:])


@pytest.mark.parametrize("solver", [DDIM(), DDPM(), Heun()], ids=named)
@pytest.mark.parametrize("method", [Replacement, RePaint, DDNM], ids=named)
def test_known_pixels_are_exactly_the_given_ones(method, solver):
    y = Mask(KNOWN)(random(2, *SHAPE, seed=7))
    images = images_of(method, Measurement(Mask(KNOWN), y), 2, solver=solver)
    known = KNOWN.expand_as(y)
    torch.testing.assert_close(images[known], y[known], rtol=0, atol=0 if method is not DDNM else 1e-12)
    assert (images[~known] != 0).all()


def test_masks_may_differ_from_image_to_image():
    known = torch.stack([KNOWN[0], ~KNOWN[0]])
    y = Mask(known)(random(2, *SHAPE, seed=7))
    images = images_of(Replacement, Measurement(Mask(known), y), 2)
    assert torch.equal(images * known, y)


def jumping_times(steps, length, resample):
    """The visited levels, from `steps` (noise) to 0 (clean), as appendix B of the paper describes the jumps."""
    visited, left = [steps], {1 + j: resample - 1 for j in range(0, steps - length, length)}
    while visited[-1] > 0:
        visited.append(visited[-1] - 1)
        if left.get(visited[-1], 0):
            left[visited[-1]] -= 1
            visited.append(visited[-1] + length)
    return visited


@pytest.mark.parametrize(("length", "resample"), [(1, 1), (1, 4), (3, 3), (5, 2), (11, 2)])
def test_repaint_visits_the_levels_of_the_paper(length, resample):
    class Visiting(DDPM):
        def step(self, denoiser, x_t, t, s, noise, path):
            visits.append((path.steps - path.index, path.remaining - 1))
            assert (t, s) == (path.levels[path.index], path.levels[path.index + 1])
            return super().step(denoiser, x_t, t, s, noise, path)

    visits, schedule = [], Cosine()
    y = torch.zeros(1, *SHAPE, dtype=torch.float64)
    method = RePaint(Visiting(), Measurement(Mask(KNOWN), y), length, resample)
    method(MixtureDenoiser(one_gaussian(), schedule), y, Trailing()(schedule, 12))
    times = jumping_times(12, length, resample)
    assert visits == [(a, b) for a, b in pairwise(times) if b < a]


def test_one_sample_of_each_step_is_replacement():
    y = Mask(KNOWN)(random(2, *SHAPE, seed=7))
    measurement, schedule = Measurement(Mask(KNOWN), y), Cosine()
    denoiser, times = MixtureDenoiser(one_gaussian(), schedule), Trailing()(schedule, 8)
    found = [
        sampler(denoiser, y, times, None, PerImageNoise(0, range(2)))
        for sampler in (Replacement(DDPM(), measurement), RePaint(DDPM(), measurement, 2, 1))
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("method", [DDNM, PiGDM], ids=named)
def test_changed_predictions_suit_multi_step_samplers(method):
    y = Downsample(2)(random(2, *SHAPE, seed=7).clamp(-1, 1))
    images = images_of(method, Measurement(Downsample(2), y), 2, steps=20, solver=MultistepDPMSolver())
    torch.testing.assert_close(Downsample(2)(images), y, rtol=0, atol=0.1)


@pytest.mark.parametrize("method", [Replacement, RePaint, DPS], ids=named)
def test_changed_images_refuse_multi_step_samplers(method):
    with pytest.raises(ValueError, match=r"^sampler must be a single-step method"):
        method(MultistepDPMSolver(), None)


def test_a_jump_needs_more_steps():
    with pytest.raises(UserError, match=r"^restoration\.jump_length=10: .* sampler\.steps=6"):
        RePaint(DDPM(), Measurement(Mask(KNOWN), random(1, *SHAPE)), 10)(
            MixtureDenoiser(one_gaussian(), Cosine()), random(1, *SHAPE), Trailing()(Cosine(), 6)
        )


def test_the_default_jump_suits_the_number_of_steps():
    assert [jump_of(None, steps) for steps in (2, 3, 10, 11, 21, 1000)] == [1, 1, 5, 5, 10, 10]
    with pytest.raises(UserError, match=r"^sampler\.steps=1: .*restoration=replacement$"):
        jump_of(None, 1)


@pytest.mark.parametrize(
    ("method", "numbers", "message"),
    [
        (RePaint, {"jump_length": 0}, "jump_length must be at least 1"),
        (RePaint, {"n_resample": 0}, "n_resample must be at least 1"),
        (DPS, {"scale": -1.0}, "scale must be at least 0"),
        (PiGDM, {"data_std": 0.0}, "data_std must be positive"),
    ],
)
def test_numbers_are_checked(method, numbers, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        method(DDIM(), None, **numbers)


def test_a_network_s_gradient_leaves_no_graph():
    denoiser = MixtureDenoiser(one_gaussian(), EDM())
    x_T, times = 80 * random(1, *SHAPE), Karras()(EDM(), 3)
    y = Downsample(2)(random(1, *SHAPE, seed=7))
    for state in DPS(Heun(), Measurement(Downsample(2), y)).trajectory(denoiser, x_T, times):
        assert not state.x.requires_grad
        assert state.prediction is None or not state.prediction.x0.requires_grad
