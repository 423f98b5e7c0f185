"""Mixtures of isotropic Gaussians, whose diffused density is known exactly, and their exact denoiser.

For p(x0) = sum_k w_k N(m_k, v_k I) the noisy image x_t = alpha x0 + sigma eps has

    p(x_t) = sum_k w_k N(alpha m_k, (alpha^2 v_k + sigma^2) I)
    E[x0 | x_t] = sum_k p(k | x_t) (m_k + alpha v_k / (alpha^2 v_k + sigma^2) (x_t - alpha m_k))

and a perfectly trained network gives E[x0 | x_t]. `MixtureDenoiser` computes it.
"""

import math

import torch
from torch import Tensor

from src.diffusion.denoiser import BaseDenoiser
from src.diffusion.noise_level import NoiseLevel
from src.diffusion.parameterization import Prediction
from src.diffusion.schedule import Schedule
from src.diffusion.variance import Small, Variance


class Mixture:
    """A mixture of isotropic Gaussians over images.

    Args:
        means: m_k, shape (K, C, H, W), float64.
        variances: v_k, shape (K,).
        weights: w_k, shape (K,), summing to 1.
    """

    def __init__(self, means: Tensor, variances: Tensor, weights: Tensor):
        self.means, self.variances, self.weights = means, variances, weights

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n images, shape (n, C, H, W), and the component of each, shape (n,)."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, *self.means.shape[1:], dtype=torch.float64, generator=generator)
        return self.means[component] + self._images(self.variances[component].sqrt()) * noise, component

    def log_density(self, x_t: Tensor, level: NoiseLevel | None = None) -> Tensor:
        """ln p(x_t) in nats, shape (B,). Without a level, the density of clean images."""
        level = level or NoiseLevel(1.0, 0.0, 0.0)
        return self._log_joint(x_t, *self._scales(x_t, level)).logsumexp(dim=1)

    def posterior_mean(self, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """E[x0 | x_t], shape (B, C, H, W)."""
        alpha, sigma2 = self._scales(x_t, level)
        belongs = self._log_joint(x_t, alpha, sigma2).softmax(dim=1)
        gain = alpha * self.variances / (alpha**2 * self.variances + sigma2)  # (B, K)
        alpha, gain, belongs = (v[:, :, None, None, None] for v in (alpha, gain, belongs))
        means = self.means + gain * (x_t[:, None] - alpha * self.means)
        return (belongs * means).sum(dim=1)

    @property
    def mean(self) -> Tensor:
        """Mean of clean images, shape (C, H, W)."""
        return (self._images(self.weights) * self.means).sum(dim=0)

    @property
    def covariance(self) -> Tensor:
        """Covariance of flattened clean images, shape (D, D)."""
        centred = (self.means - self.mean).flatten(1)
        within = (self.weights * self.variances).sum() * torch.eye(centred.shape[1], dtype=torch.float64)
        return (self.weights[:, None] * centred).T @ centred + within

    def _scales(self, x_t: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """alpha and sigma^2, shape (B, 1) or (1, 1)."""
        alpha, sigma = (torch.as_tensor(v, dtype=x_t.dtype).view(-1, 1) for v in (level.alpha, level.sigma))
        return alpha, sigma**2

    def _log_joint(self, x_t: Tensor, alpha: Tensor, sigma2: Tensor) -> Tensor:
        """ln w_k N(x_t; alpha m_k, (alpha^2 v_k + sigma^2) I), shape (B, K)."""
        variance = alpha**2 * self.variances + sigma2
        distance = (x_t[:, None] - alpha[:, :, None, None, None] * self.means).flatten(2).square().sum(dim=2)
        dimensions = x_t[0].numel()
        return (
            self.weights.log() - distance / (2 * variance) - dimensions / 2 * (2 * math.pi * variance).log()
        )

    def _images(self, v: Tensor) -> Tensor:
        return v[:, None, None, None]


class MixtureDenoiser(BaseDenoiser):
    """The exact denoiser of a mixture; counts its calls.

    Args:
        mixture: the distribution of the data.
        schedule: the noise schedule, which samplers use for further levels.
        variance: of the reverse step.
    """

    def __init__(self, mixture: Mixture, schedule: Schedule, variance: Variance | None = None):
        super().__init__()
        self.mixture, self.schedule, self.variance = mixture, schedule, variance or Small()
        self.calls = 0

    def forward(self, x_t, level, condition=None, to=None):
        self.calls += 1
        return Prediction(x_t, level, self.mixture.posterior_mean(x_t, level))


def gaussian(mean: float, std: float, shape: tuple[int, int, int] = (1, 1, 1)) -> Mixture:
    """One Gaussian, N(mean, std^2 I)."""
    one = torch.ones(1, dtype=torch.float64)
    return Mixture(torch.full((1, *shape), mean, dtype=torch.float64), one * std**2, one)


def three_modes() -> Mixture:
    """Three Gaussians in the plane, image shape (1, 1, 2), with different means, variances and weights."""
    return Mixture(
        torch.tensor([[0.8, 0.3], [-0.6, 0.5], [-0.1, -0.8]], dtype=torch.float64).view(3, 1, 1, 2),
        torch.tensor([0.02, 0.05, 0.01], dtype=torch.float64),
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    )
