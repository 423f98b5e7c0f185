"""The noise level: alpha, sigma and the network's label at a time t.

x_t = alpha_t x0 + sigma_t eps,    eps ~ N(0, I)

SNR_t = alpha_t^2 / sigma_t^2,     log_snr = lambda_t = ln(alpha_t / sigma_t) = ln(SNR_t) / 2
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseLevel:
    """alpha and sigma of one time, of a batch of times, or of a whole grid of times.

    Schedules return float64 CPU tensors with the shape of the times. `scalars()` converts a grid into a list of levels
    of Python floats, so that samplers compute their coefficients without tensor operations.

    Attributes:
        alpha: factor of the image, in [0, 1].
        sigma: standard deviation of the noise, >= 0.
        label: the time passed to the network (t - 1 for discrete schedules, as in published checkpoints).
    """

    alpha: Tensor | float
    sigma: Tensor | float
    label: Tensor | float

    @property
    def snr(self) -> Tensor | float:
        """Signal-to-noise ratio alpha^2 / sigma^2; infinite where sigma is 0."""
        if isinstance(self.sigma, float) and self.sigma == 0:
            return math.inf
        return (self.alpha / self.sigma) ** 2

    @property
    def log_snr(self) -> Tensor | float:
        """lambda = ln(alpha / sigma): +inf for clean data, -inf for pure noise."""
        if isinstance(self.alpha, float):
            return _log(self.alpha) - _log(self.sigma)
        return self.alpha.log() - self.sigma.log()

    def scalars(self) -> list["NoiseLevel"]:
        """The levels of a grid of N times as a list of N levels of Python floats."""
        rows = zip(self.alpha.tolist(), self.sigma.tolist(), self.label.tolist(), strict=True)
        return [NoiseLevel(alpha, sigma, float(label)) for alpha, sigma, label in rows]


def broadcast(coefficient: Tensor | float, x: Tensor) -> Tensor | float:
    """Reshapes a level's coefficient so that it broadcasts against the batch x.

    Args:
        coefficient: a Python float (the same for all images), a tensor of shape (B,) with one value per image, or a
            tensor of x's shape, e.g. a learned variance.
        x: shape (B, ...).

    Returns:
        Floats and tensors of x's shape unchanged; otherwise a tensor of shape (B, 1, ..., 1), x's dtype and device.
    """
    if isinstance(coefficient, float) or coefficient.dim() == x.dim():
        return coefficient
    return coefficient.view(-1, *[1] * (x.dim() - 1)).to(x.device, x.dtype, non_blocking=True)


def linear_combination(a: Tensor | float, x: Tensor, b: Tensor | float, y: Tensor) -> Tensor:
    """a x + b y as a new tensor; a and b are floats or tensors of shape (B,)."""
    if isinstance(a, float) and isinstance(b, float):
        return torch.mul(x, a).add_(y, alpha=b)
    return broadcast(a, x) * x + broadcast(b, y) * y


def conditional_variance(t: NoiseLevel, s: NoiseLevel) -> Tensor | float:
    """Variance of q(x_t | x_s) for s < t: sigma_{t|s}^2 = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2.

    For variance-preserving schedules this is beta_{t|s} = 1 - alphabar_t / alphabar_s.
    """
    return t.sigma**2 - (t.alpha / s.alpha) ** 2 * s.sigma**2


def clamp(x: Tensor | float, low: float, high: float) -> Tensor | float:
    """x clamped to [low, high], for floats and tensors."""
    return min(max(x, low), high) if isinstance(x, float) else x.clamp(low, high)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def as_times(times: Tensor | Sequence[float] | float) -> Tensor:
    """Times as a float64 CPU tensor; schedules are evaluated on the CPU."""
    return torch.as_tensor(times, dtype=torch.float64, device="cpu")
