"""Sampling from the forward process q(x_t | x0) = N(alpha_t x0, sigma_t^2 I) (Ho et al. 2020, eq. 4)."""

from torch import Tensor

from .noise_level import NoiseLevel, broadcast


def diffuse(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps.

    Args:
        x0: images in [-1, 1], shape (B, C, H, W).
        eps: standard normal noise of x0's shape.
        level: one level for all images, or levels of shape (B,).
    """
    return broadcast(level.alpha, x0) * x0 + broadcast(level.sigma, x0) * eps
