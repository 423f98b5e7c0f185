"""Loss weightings, all defined as weights on the squared error of x0_hat.

The loss compares the network's output F with its target. Since x0_hat - x0 = c_out (F - target), the weight on that
error is weight(level) c_out^2 for every parameterisation.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from .noise_level import NoiseLevel, clamp


class Weighting(ABC):
    """A weight on ||x0_hat - x0||^2."""

    @abstractmethod
    def __call__(self, level: NoiseLevel, c_out: Tensor) -> Tensor:
        """The weights, float64, shape (B,), the levels' shape; c_out is the parameterisation's coefficient."""

    def balance(self, losses: Tensor, level: NoiseLevel) -> Tensor:
        """Rebalances the weighted losses of each image, shape (B,), in training; by default unchanged."""
        return losses


class Simple(Weighting):
    """1/c_out^2: unweighted error of the network's output; for eps L_simple (Ho et al. 2020, eq. 14)."""

    def __call__(self, level, c_out):
        return 1 / c_out**2


class SNR(Weighting):
    """SNR = alpha^2/sigma^2: unweighted error of eps for every parameterisation (Salimans & Ho 2022, sec. 4)."""

    def __call__(self, level, c_out):
        return level.snr


class Velocity(Weighting):
    """1/max(sigma, minimum)^2: unweighted error of the flow's velocity, for every parameterisation.

    On the straight line alpha + sigma = 1, an error of x0 is sigma times one of the velocity (x_t - x0)/sigma. With
    parameterization=x0 this is JiT's loss (Li & He 2025, arXiv:2511.13720, sec. 4), which bounds the weight.

    Args:
        minimum: the smallest sigma in the weight, in (0, 1]; 0.05 in the authors' code.

    Raises:
        ValueError: minimum is out of range.
    """

    def __init__(self, minimum: float = 0.05):
        if not 0 < minimum <= 1:
            raise ValueError(f"minimum must be in (0, 1], got {minimum}")
        self.minimum = minimum

    def __call__(self, level, c_out):
        return 1 / level.sigma.clamp(min=self.minimum) ** 2


class MinSNR(Weighting):
    """min(SNR, gamma) (Hang et al. 2023, arXiv:2303.09556, eq. 8).

    Args:
        gamma: the bound; 5 in the paper.

    Raises:
        ValueError: gamma is not positive.
    """

    def __init__(self, gamma: float = 5.0):
        if gamma <= 0:
            raise ValueError(f"gamma must be positive, got {gamma}")
        self.gamma = gamma

    def __call__(self, level, c_out):
        return level.snr.clamp(max=self.gamma)


class P2(Weighting):
    """SNR/(k + SNR)^gamma (Choi et al. 2022, arXiv:2204.00227, eq. 8): less weight on small noise levels.

    Args:
        k: 1 in the paper.
        gamma: 0.5 or 1 in the paper; 0 is the `SNR` weighting.

    Raises:
        ValueError: k is not positive, or gamma is negative.
    """

    def __init__(self, k: float = 1.0, gamma: float = 1.0):
        if k <= 0:
            raise ValueError(f"k must be positive, got {k}")
        if gamma < 0:
            raise ValueError(f"gamma must be at least 0, got {gamma}")
        self.k, self.gamma = k, gamma

    def __call__(self, level, c_out):
        return level.snr / (self.k + level.snr) ** self.gamma


class EDM(Weighting):
    """(sigma^2 + sigma_data^2)/(sigma sigma_data)^2 (Karras et al. 2022, arXiv:2206.00364, table 1).

    On schedules with another alpha, sigma/alpha replaces sigma. The weight is 1/c_out^2 of EDM's preconditioning: it
    weights the errors of EDM's targets equally, for every parameterisation.

    Args:
        sigma_data: standard deviation of the data.

    Raises:
        ValueError: sigma_data is not positive.
    """

    def __init__(self, sigma_data: float = 0.5):
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.sigma_data = sigma_data

    def __call__(self, level, c_out):
        return (level.sigma**2 + (level.alpha * self.sigma_data) ** 2) / (level.sigma * self.sigma_data) ** 2


class LearnedUncertainty(Weighting, nn.Module):
    """loss / exp(u) + u, with u(noise level) learned together with the network: EDM2's balancing of noise levels.

    Karras et al. 2024 (arXiv:2312.02696, eq. 14 to 16 and 21). At the optimum exp(u) is the expected loss, so that
    loss / exp(u) is 1 on average at every noise level. u is linear in random Fourier features of ln(sigma/alpha)/4,
    starts at 0, and is used in training mode only, so that validation losses stay comparable. |ln(sigma/alpha)| is
    clamped to 20, so that it is finite for pure noise.

    Args:
        weighting: the weighting of the losses to balance; EDM's in the paper.
        features: number of Fourier features.

    Raises:
        ValueError: features is below 1.
    """

    def __init__(self, weighting: Weighting, features: int = 128):
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}")
        self.weighting = weighting
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))
        self.uncertainty = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.uncertainty.weight)

    def __call__(self, level, c_out):
        return self.weighting(level, c_out)

    def balance(self, losses, level):
        if not self.training:
            return losses
        noise = (-clamp(level.log_snr, -20.0, 20.0) / 4).to(losses.device, losses.dtype, non_blocking=True)
        angles = noise[:, None] * self.frequencies.to(losses.dtype) + self.phases.to(losses.dtype)
        u = 2**0.5 * torch.cos(angles) @ self.uncertainty.weight[0].to(losses.dtype)
        return losses / u.exp() + u
