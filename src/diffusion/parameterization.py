"""What the network's output F means: three numbers of the noise level.

    x0_hat = c_skip x_t + c_out F(c_in x_t, label),    eps_hat = (x_t - alpha_t x0_hat) / sigma_t

and F is trained towards (x0 - c_skip x_t) / c_out (Karras et al. 2022, arXiv:2206.00364, eq. 7).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from .noise_level import NoiseLevel, broadcast


@dataclass(frozen=True)
class Prediction:
    """What a denoiser says about x_t.

    Attributes:
        x0: estimate of the clean image, x_t's shape, nominally in [-1, 1].
        eps: estimate of the noise, with x_t = alpha_t x0 + sigma_t eps.
        variance: what a network of learned variance says about the reverse step, x_t's shape; else None.
    """

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None


class Parameterization(ABC):
    """The meaning of the network's output."""

    @abstractmethod
    def coefficients(self, level: NoiseLevel) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """c_in, c_skip, c_out at this level, each of the level's shape."""

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
        """What F should be for the image x0 and the noise eps, both (B, C, H, W)."""

    def predict(self, x_t: Tensor, output: Tensor, level: NoiseLevel) -> Prediction:
        """Reads the network's output at x_t; both (B, C, H, W)."""
        _, c_skip, c_out = self.coefficients(level)
        x0 = broadcast(c_skip, x_t) * x_t + broadcast(c_out, x_t) * output
        return Prediction(x0, eps_from_x0(x_t, x0, level))


def eps_from_x0(x_t: Tensor, x0: Tensor, level: NoiseLevel) -> Tensor:
    """The noise that, with x0, makes up x_t: (x_t - alpha_t x0) / sigma_t."""
    return (x_t - broadcast(level.alpha, x_t) * x0) / broadcast(level.sigma, x_t)


def x0_from_eps(x_t: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """The image that, with eps, makes up x_t: (x_t - sigma_t eps) / alpha_t."""
    return (x_t - broadcast(level.sigma, x_t) * eps) / broadcast(level.alpha, x_t)


class Eps(Parameterization):
    """F is the noise: c_in = 1, c_skip = 1/alpha, c_out = -sigma/alpha (DDPM, Ho et al. 2020, eq. 11)."""

    def coefficients(self, level):
        return 1.0, 1 / level.alpha, -level.sigma / level.alpha

    def target(self, x0, eps, level):
        return eps

    def predict(self, x_t, output, level):
        # the output itself: the way back from x0 would divide its rounding errors by a small sigma
        return Prediction(x0_from_eps(x_t, output, level), output)
