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


class Posterior:
    """p(x0 | y) of a mixture for y = A x0 + n, n ~ N(0, noise^2 I): again a mixture.

        S_k = v_k A A^T + noise^2 I,    K_k = v_k A^T S_k^-1
        p(k | y) ~ w_k N(y; A m_k, S_k),    mean_k = m_k + K_k (y - A m_k)

    Args:
        mixture: the distribution of x0, of D numbers.
        matrix: A, shape (M, D).
        y: shape (M,).
        noise: standard deviation of n; 0 needs independent rows of A.
    """

    def __init__(self, mixture: Mixture, matrix: Tensor, y: Tensor, noise: float = 0.0):
        self.mixture, self.matrix, self.y, self.noise = mixture, matrix, y, noise
        means = mixture.means.flatten(1)
        gram, one = matrix @ matrix.T, torch.eye(len(y), dtype=torch.float64)
        inner = [v * gram + noise**2 * one for v in mixture.variances]
        self.gains = [v * matrix.T @ S.inverse() for v, S in zip(mixture.variances, inner, strict=True)]
        evidence = [
            torch.distributions.MultivariateNormal(matrix @ m, S).log_prob(y)
            for m, S in zip(means, inner, strict=True)
        ]
        self.weights = (mixture.weights.log() + torch.stack(evidence)).softmax(dim=0)
        self.means = torch.stack(
            [m + K @ (y - matrix @ m) for m, K in zip(means, self.gains, strict=True)]
        ).view_as(mixture.means)

    @property
    def mean(self) -> Tensor:
        """E[x0 | y], shape (C, H, W)."""
        return (self.weights[:, None, None, None] * self.means).sum(dim=0)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n images, shape (n, C, H, W): samples of the components, each corrected by its own measurement."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        mixture = self.mixture
        z = torch.randn(n, *mixture.means.shape[1:], dtype=torch.float64, generator=generator)
        x = mixture.means[component] + mixture.variances[component].sqrt().view(-1, 1, 1, 1) * z
        n_y = self.noise * torch.randn(n, len(self.y), dtype=torch.float64, generator=generator)
        misfit = self.y - x.flatten(1) @ self.matrix.T - n_y
        gains = torch.stack(self.gains)[component]
        return x + torch.einsum("ndm,nm->nd", gains, misfit).view_as(x)


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
