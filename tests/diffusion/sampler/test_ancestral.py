"""Checks DDPM and DDIM against exact results, each other and diffusers."""

from itertools import pairwise

import pytest
import torch

from src.diffusion.clipping import StaticClipping
from src.diffusion.denoiser import Denoiser
from src.diffusion.parameterization import Eps
from src.diffusion.sampler import DDIM, DDPM, PerImageNoise, ReplayedNoise
from src.diffusion.schedule import Cosine, Linear
from src.diffusion.spacing import Leading, Trailing
from src.diffusion.variance import Large, Small
from tests.diffusion.mixture import MixtureDenoiser, gaussian


def _noise(n, seed=0, shape=(1, 1, 1)):
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Recording:
    """A source of noise that records its draws."""

    def __init__(self, seed=1):
        self.generator, self.drawn = torch.Generator().manual_seed(seed), []

    def __call__(self, x):
        self.drawn.append(torch.randn(x.shape, dtype=x.dtype, generator=self.generator))
        return self.drawn[-1]


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
@pytest.mark.parametrize("sampler", [DDIM(), DDIM(0.5), DDIM(1.0), DDPM()], ids=lambda s: str(vars(s)))
def test_samples_have_the_moments_of_gaussian_data(schedule, sampler):
    # 1,000 steps with the exact denoiser: discretisation shrinks the deviation by 0.3 % at most (measured
    # on the noise-free affine map below); the rest is the statistical error of 10,000 images
    n, mean, std = 10_000, 0.3, 0.5
    denoiser = MixtureDenoiser(gaussian(mean, std), schedule)
    x = sampler(denoiser, _noise(n), Trailing()(schedule, 1000), noise=Recording())
    assert x.mean().item() == pytest.approx(mean, abs=4 * std / n**0.5 + 0.003)
    assert x.std().item() == pytest.approx(std, rel=4 / (2 * n) ** 0.5 + 0.003)


def _standard_deviation(sampler, times, schedule, std):
    """Standard deviation of the images of a sampler on Gaussian data, computed without sampling.

    Every step is affine in x_t and z, so x = 0 and x = 1 with z = 0 or 1 determine its coefficients.
    """
    denoiser = MixtureDenoiser(gaussian(0.0, std), schedule)
    variance = schedule(times[:1]).sigma.item() ** 2
    for pair in pairwise(times):
        points = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
        still = sampler(denoiser, points, torch.stack(pair), noise=torch.zeros_like)
        moved = sampler(denoiser, points, torch.stack(pair), noise=torch.ones_like)
        slope, noise = still[1] - still[0], moved[0] - still[0]
        variance = slope.item() ** 2 * variance + noise.item() ** 2
    return variance**0.5


@pytest.mark.parametrize(("steps", "loss"), [(10, 0.25), (100, 0.028)])
def test_ddim_shrinks_gaussian_data_by_the_known_amount(steps, loss):
    # DDIM for data N(0, v) multiplies x by (alpha_s alpha_t v + sigma_s sigma_t) / (alpha_t^2 v + sigma_t^2) in
    # each step; the expected value is the product of these factors from the table
    schedule, v = Linear(), 0.25
    times = Leading()(schedule, steps)
    level = schedule(times)
    a, s = level.alpha, level.sigma
    slope = ((a[1:] * a[:-1] * v + s[1:] * s[:-1]) / (a[:-1] ** 2 * v + s[:-1] ** 2)).prod()
    expected = (slope * s[0]).item()
    assert _standard_deviation(DDIM(), times, schedule, 0.5) == pytest.approx(expected, rel=1e-10)
    assert 1 - expected / 0.5 == pytest.approx(loss, abs=0.005)


def test_eta_one_is_ddpm_with_the_small_variance_step_by_step():
    schedule = Cosine()
    denoiser = MixtureDenoiser(gaussian(0.3, 0.5), schedule)
    times = Trailing()(schedule, 37)
    ancestral, implicit = Recording(), Recording()
    pairs = zip(
        DDPM().trajectory(denoiser, _noise(16), times, noise=ancestral),
        DDIM(1.0).trajectory(denoiser, _noise(16), times, noise=implicit),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.x, theirs.x, rtol=1e-10, atol=1e-10)
    assert len(ancestral.drawn) == len(implicit.drawn) == 36  # no noise in the step to clean data


def test_no_noise_is_drawn_without_eta():
    schedule = Linear()
    denoiser = MixtureDenoiser(gaussian(0.3, 0.5), schedule)
    recording = Recording()
    DDIM()(denoiser, _noise(2), Trailing()(schedule, 10), noise=recording)
    assert recording.drawn == []


@pytest.mark.parametrize("sampler", [DDPM(), DDIM(0.7)])
def test_recorded_noise_is_replayed(sampler):
    schedule = Linear()
    denoiser = MixtureDenoiser(gaussian(0.3, 0.5), schedule)
    times, recording = Trailing()(schedule, 12), Recording()
    first = sampler(denoiser, _noise(3), times, noise=recording)
    assert torch.equal(first, sampler(denoiser, _noise(3), times, noise=ReplayedNoise(recording.drawn)))


@pytest.mark.parametrize("sampler", [DDPM(), DDIM(0.7)])
def test_image_depends_only_on_its_index(sampler):
    schedule = Linear()
    denoiser = MixtureDenoiser(gaussian(0.3, 0.5, (1, 2, 2)), schedule)
    times = Trailing()(schedule, 12)

    def images(indices):
        noise = PerImageNoise(5, indices)
        x_T = noise(torch.empty(len(indices), 1, 2, 2, dtype=torch.float64))
        return sampler(denoiser, x_T, times, noise=noise)

    together = images([0, 1, 2, 3])
    assert torch.equal(together[2:], images([2, 3]))
    assert torch.equal(together[[3, 0]], images([3, 0]))
    assert not torch.equal(together[0], together[1])


class Network(torch.nn.Module):
    """A smooth function of x and label: a wrong time changes the output."""

    def forward(self, x, label, condition=None):
        return torch.tanh(x * (0.5 + label.view(-1, 1, 1, 1) / 1000)) + 0.1 * x.flip(-1)


def _diffusers_images(scheduler, steps, x, noise, **options):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = Network()(x, torch.full((len(x),), float(t), dtype=x.dtype))
        x = scheduler.step(output, t, x, **options(t, x) if callable(options) else options).prev_sample
    return x


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("variance", "theirs"), [(Small(), "fixed_small"), (Large(), "fixed_large")])
def test_ddpm_agrees_with_diffusers(variance, theirs, clip, monkeypatch):
    from diffusers import DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm

    steps = 50
    noise = [_noise(4, 10 + i, (1, 4, 4)).float() for i in range(steps)]
    replay = iter(noise)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: next(replay))
    x_T = _noise(4, 3, (1, 4, 4)).float()
    scheduler = DDPMScheduler(1000, variance_type=theirs, clip_sample=clip, timestep_spacing="leading")
    expected = _diffusers_images(scheduler, steps, x_T, noise)

    schedule = Linear()
    denoiser = Denoiser(Network(), schedule, Eps(), variance)
    denoiser = StaticClipping(denoiser) if clip else denoiser
    replay_ours = iter(noise)
    ours = DDPM()(denoiser, x_T, Leading()(schedule, steps), noise=lambda x: next(replay_ours))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_agrees_with_diffusers(eta, clip, monkeypatch):
    from diffusers import DDIMScheduler
    from diffusers.schedulers import scheduling_ddim

    steps = 50
    noise = [_noise(4, 10 + i, (1, 4, 4)).float() for i in range(steps)]
    replay = iter(noise)
    monkeypatch.setattr(scheduling_ddim, "randn_tensor", lambda shape, **_: next(replay))
    x_T = _noise(4, 3, (1, 4, 4)).float()
    scheduler = DDIMScheduler(1000, clip_sample=clip, set_alpha_to_one=True, timestep_spacing="leading")
    # diffusers recomputes eps from the clipped x0 only with this option
    expected = _diffusers_images(scheduler, steps, x_T, noise, eta=eta, use_clipped_model_output=clip)

    schedule = Linear()
    denoiser = Denoiser(Network(), schedule, Eps())
    denoiser = StaticClipping(denoiser) if clip else denoiser
    replay_ours = iter(noise)
    ours = DDIM(eta)(denoiser, x_T, Leading()(schedule, steps), noise=lambda x: next(replay_ours))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
