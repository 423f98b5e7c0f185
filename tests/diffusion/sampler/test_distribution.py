"""Samples of a mixture have its mean, covariance and mode weights within statistical error."""

import pytest
import torch

from src.diffusion.sampler import (
    DDIM,
    DDPM,
    DPM2,
    Dopri5,
    Euler,
    EulerMaruyama,
    Heun,
    MultistepDPMSolver,
    PredictorCorrector,
    Restart,
    SinglestepDPMSolver,
)
from src.diffusion.schedule import EDM, VP
from src.diffusion.spacing import Karras, UniformLogSNR, UniformTime
from src.diffusion.variance import Large
from tests.diffusion.mixture import Mixture, MixtureDenoiser, three_modes
from tests.diffusion.sampler.networks import recorded_noise

N = 4000
# the number of steps makes the discretisation error smaller than the statistical error
CASES = {
    "DDPM, small": (DDPM(), VP(t_min=1e-3), UniformLogSNR(), 300),
    "DDPM, large": (DDPM(), VP(t_min=1e-3), UniformLogSNR(), 600),
    "DDIM, eta 1": (DDIM(1.0), VP(t_min=1e-3), UniformLogSNR(), 300),
    "DDIM, eta 1/2": (DDIM(0.5), VP(t_min=1e-3), UniformLogSNR(), 300),
    "Euler with churn": (Euler(s_churn=40.0), EDM(0.002, 20.0), Karras(), 300),
    "Heun with churn": (Heun(s_churn=20.0), EDM(0.002, 20.0), Karras(), 60),
    "DPM2 with churn": (DPM2(s_churn=20.0), EDM(0.002, 20.0), Karras(), 60),
    "DPM-Solver-2 ancestral": (
        SinglestepDPMSolver(2, plus_plus=False, eta=1.0),
        EDM(0.002, 20.0),
        Karras(),
        150,
    ),
    "DPM++ 2S ancestral": (SinglestepDPMSolver(2, eta=1.0), EDM(0.002, 20.0), Karras(), 150),
    "SDE-DPM-Solver++ 2M": (MultistepDPMSolver(2, eta=1.0), EDM(0.002, 20.0), Karras(), 100),
    "SDE-DPM-Solver++ 3M": (MultistepDPMSolver(3, eta=1.0), EDM(0.002, 20.0), Karras(), 100),
    "Euler-Maruyama": (EulerMaruyama(), VP(t_min=1e-3), UniformTime(), 700),
    "predictor-corrector": (PredictorCorrector(DDPM()), VP(t_min=1e-3), UniformLogSNR(), 60),
    "Restart": (Restart(Heun(), 0.06, 0.3, 8, 2), EDM(0.002, 20.0), Karras(), 60),
    "probability flow": (Dopri5(1e-4), EDM(0.002, 20.0), Karras(), 1),
}


# the size of a Langevin step depends on the norms of an image, which concentrate only for many pixels
PIXELS = {"predictor-corrector": 48}
VARIANCES = {"DDPM, large": Large()}


def _mixture(pixels):
    """The mixture of `three_modes` in the first two pixels; the other pixels have mean 0."""
    plane = three_modes()
    means = torch.zeros(3, 1, 1, pixels, dtype=torch.float64)
    means[..., :2] = plane.means
    return Mixture(means, plane.variances, plane.weights)


def _images(case, mixture, noise):
    sampler, schedule, spacing, steps = CASES[case]
    times = spacing(schedule, steps)
    # start from the exact marginal, which excludes the error at the end of the schedule
    start = schedule(times[:1]).scalars()[0]
    data, _ = mixture.sample(N, torch.Generator().manual_seed(7))
    x = start.alpha * data + start.sigma * recorded_noise(0)(data)
    denoiser = MixtureDenoiser(mixture, schedule, VARIANCES.get(case))
    return sampler(denoiser, x, times, noise=noise)


def assert_distributed(images, mixture):
    # four standard errors, plus 0.01 for the discretisation: 2 % of the standard deviation of the data
    flat, covariance, means = (
        images.flatten(1)[:, :2],
        mixture.covariance[:2, :2],
        mixture.means.flatten(1)[:, :2],
    )
    variance = covariance.diagonal()
    assert ((flat.mean(dim=0) - mixture.mean.flatten()[:2]).abs() < variance.sqrt() * 4 / N**0.5 + 0.01).all()
    covariance_error = (covariance**2 + variance[:, None] * variance).sqrt() * 4 / N**0.5
    assert ((flat.T.cov() - covariance).abs() < covariance_error + 0.01).all()
    # assign each image to the nearest mode; fewer than 1 in 1,000 images of a mode are closer to another mode
    nearest = (flat[:, None] - means).norm(dim=2).argmin(dim=1)
    share = torch.bincount(nearest, minlength=3) / N
    weight_error = (mixture.weights * (1 - mixture.weights) / N).sqrt() * 4
    assert ((share - mixture.weights).abs() < weight_error + 0.01).all()
    # the variance within each mode
    for mode in range(3):
        spread = (flat[nearest == mode] - means[mode]).square().mean().item()
        count = 2 * (nearest == mode).sum().item()
        assert spread == pytest.approx(mixture.variances[mode].item(), rel=4 * (2 / count) ** 0.5 + 0.05)


@pytest.mark.parametrize("case", CASES)
def test_mean_covariance_and_weights(case):
    mixture = _mixture(PIXELS.get(case, 2))
    assert_distributed(_images(case, mixture, recorded_noise()), mixture)


def test_noise_scaled_by_nine_tenths_is_detected():
    mixture, noise = _mixture(2), recorded_noise()
    images = _images("DDPM, small", mixture, lambda x: 0.9 * noise(x))
    with pytest.raises(AssertionError):
        assert_distributed(images, mixture)
