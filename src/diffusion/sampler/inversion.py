"""DDIM inversion, interpolation between latents, and sampling from a noised image."""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from src.conditioning import Condition

from ..denoiser import BaseDenoiser, Conditioned
from ..forward import diffuse
from ..noise_level import NoiseLevel, as_times, linear_combination
from .base import State, check_finite
from .noise import NoiseSource, global_noise


def encode(
    denoiser: BaseDenoiser,
    x0: Tensor,
    times: Tensor | list[float],
    condition: Condition | None = None,
    tolerance: float | None = None,
) -> Iterator[State]:
    """Encodes images into latents by deterministic DDIM in reverse (Song et al. 2021, arXiv:2010.02502, sec. 4.3).

    Yields the images and then the state at each increasing time; the last state holds x_T, which DDIM with eta = 0
    decodes. Each step uses eps at the level where it starts (for clean images, at the first noisy level), an error of
    order 1 in the step size. With a tolerance, each step is solved by fixed-point iteration for the x_t whose DDIM step
    leads back exactly, so that decoding reproduces the images.

    Args:
        denoiser: must not clip x0, since clipping cannot be inverted.
        x0: images in [-1, 1], shape (B, C, H, W).
        times: decreasing, as for sampling; visited in reverse.
        condition: the condition of the images, or None.
        tolerance: an iteration stops if no pixel changes by more than this; None for one evaluation per step.

    Raises:
        ValueError: the times are not decreasing, the tolerance is not positive or not reached in 1,000 iterations.
        UserError: a latent is not finite; checked after the last step.
    """
    times = as_times(times)
    if times.dim() != 1 or len(times) < 2 or not (times.diff() < 0).all():
        raise ValueError(f"times must be at least two decreasing values, got {times.tolist()}")
    if tolerance is not None and tolerance <= 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    denoiser = Conditioned(denoiser, condition)
    levels = denoiser.schedule(times.flip(0)).scalars()
    x, evaluations = x0, 0
    yield State(x)
    for s, t in pairwise(levels):
        with torch.no_grad():
            prediction = denoiser(x, s if s.sigma > 0 else t)
            x_t, evaluations = _raise(x, prediction.eps, s, t), evaluations + 1
            if tolerance is not None and t.alpha > 0:
                x_t, more = _solve(denoiser, x, x_t, s, t, tolerance)
                evaluations += more
        x = x_t
        yield State(x, prediction, evaluations=evaluations)
    check_finite(x, "encoding: the latents")


def _raise(x_s: Tensor, eps: Tensor, s: NoiseLevel, t: NoiseLevel) -> Tensor:
    """The step from level s up to t with a fixed eps."""
    ratio = t.alpha / s.alpha
    return linear_combination(ratio, x_s, t.sigma - ratio * s.sigma, eps)


def _solve(
    denoiser: BaseDenoiser, x_s: Tensor, x_t: Tensor, s: NoiseLevel, t: NoiseLevel, tolerance: float
) -> tuple[Tensor, int]:
    """The x_t whose DDIM step leads to x_s, and the number of evaluations."""
    for iteration in range(1, 1001):
        prediction = denoiser(x_t, t)
        if t.sigma < t.alpha or s.sigma == 0:
            proposal = _raise(x_s, prediction.eps, s, t)
        else:  # the same equation in x0, which converges where the one in eps hardly contracts
            ratio = t.sigma / s.sigma
            proposal = linear_combination(ratio, x_s, t.alpha - ratio * s.alpha, prediction.x0)
        change = (proposal - x_t).abs().max().item()
        x_t = proposal
        if not change >= tolerance:  # NaN ends the iteration too
            return x_t, iteration
    raise ValueError(
        f"tolerance={tolerance:g} is not reached in 1,000 iterations; the last changed {change:.3g}"
    )


def slerp(a: Tensor, b: Tensor, weight: Tensor | float) -> Tensor:
    """Spherical interpolation, sin((1 - w) theta)/sin(theta) a + sin(w theta)/sin(theta) b (Song et al. 2021, eq. 67).

    Args:
        a, b: latents, shape (B, C, H, W).
        weight: w in [0, 1], a float or a tensor of shape (B,); 0 gives a.

    Returns:
        Shape (B, C, H, W). theta is the angle between each pair; parallel latents are interpolated linearly.
    """
    flat_a, flat_b = (x.flatten(1).cpu().double() for x in (a, b))  # not every device has float64
    norms = flat_a.norm(dim=1) * flat_b.norm(dim=1)
    theta = ((flat_a * flat_b).sum(dim=1) / norms).clamp(-1, 1).acos()
    weight = torch.as_tensor(weight, dtype=torch.float64, device="cpu").expand(len(a))
    straight = theta.sin() < 1e-6
    sine = theta.sin().masked_fill(straight, 1.0)
    of_a = torch.where(straight, 1 - weight, ((1 - weight) * theta).sin() / sine)
    of_b = torch.where(straight, weight, (weight * theta).sin() / sine)
    return linear_combination(of_a, a, of_b, b)


def renoise(
    denoiser: BaseDenoiser,
    x0: Tensor,
    times: Tensor | list[float],
    strength: float,
    noise: NoiseSource = global_noise,
) -> tuple[Tensor, Tensor]:
    """Noises images to start sampling from them (SDEdit, Meng et al. 2022, arXiv:2108.01073).

    Args:
        denoiser: the denoiser whose schedule the times belong to.
        x0: images in [-1, 1], shape (B, C, H, W).
        times: decreasing, as for sampling.
        strength: the fraction of the steps that is run, in (0, 1]; larger values change the image more.
        noise: source of the noise.

    Returns:
        The noisy images and the remaining times: sampler(denoiser, *renoise(...)).

    Raises:
        ValueError: the strength is out of range or leaves no step.
    """
    times = as_times(times)
    steps = len(times) - 1
    kept = math.floor(strength * steps + 1e-9)
    if not 0 < strength <= 1 or kept < 1:
        raise ValueError(f"strength must be in [1/steps, 1] = [{1 / steps:.3g}, 1], got {strength}")
    times = times[steps - kept :]
    return diffuse(x0, noise(x0), denoiser.schedule(times[:1]).scalars()[0]), times
