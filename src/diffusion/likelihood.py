"""Likelihood in bits per dimension (a dimension is one channel of one pixel).

Two methods. The variational bound of a chain t_S > ... > t_1 > 0 (Ho et al. 2020, eq. 5):

    -ln p(x0) <= L_T + sum_{i > 1} KL(q(x_s | x_t, x0) || p(x_s | x_t)) - ln p(x0 | x_{t_1})

The probability-flow ODE (Song et al. 2021, arXiv:2011.13456, sec. 4.3): the density is integrated along the flow.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from src.conditioning import Condition

from .denoiser import BaseDenoiser
from .forward import diffuse
from .noise_level import NoiseLevel, as_times, broadcast, conditional_variance
from .ode import NotFinite, integrate
from .parameterization import Prediction
from .sampler.noise import NoiseSource, global_noise
from .schedule import DiscreteSchedule, Schedule
from .variance import Small, Variance

# Half the distance between two byte values: images are byte/127.5 - 1.
HALF_BIN = 1 / 255

ROOT = math.sqrt(2)


class Chain:
    """The steps of a reverse process and the terms of its variational bound.

    Args:
        schedule: a discrete schedule.
        times: increasing times t_1 < ... < t_S of its table; None for all, 1 ... T.

    Raises:
        ValueError: the schedule is not discrete, or the times are not at least two increasing values.
    """

    def __init__(self, schedule: Schedule, times: Tensor | list[float] | None = None):
        if not isinstance(schedule, DiscreteSchedule):
            raise ValueError(
                f"schedule must be discrete for the variational bound, {type(schedule).__name__} has no steps: choose"
                " e.g. schedule=cosine"
            )
        if times is None and schedule.T < 2:
            raise ValueError(
                f"schedule.T={schedule.T} must be at least 2 for the variational bound: raise it, or choose"
                " loss=denoising"
            )
        rows = torch.arange(1, schedule.T + 1, dtype=torch.float64) if times is None else as_times(times)
        if len(rows) < 2 or not (rows.diff() > 0).all():
            raise ValueError(f"times must be at least two increasing values, got {rows.tolist()}")
        self.schedule = schedule
        self.times = torch.cat([torch.zeros(1, dtype=torch.float64), rows])

    def __len__(self) -> int:
        """The number of steps, S."""
        return len(self.times) - 1

    def level(self, step: Tensor) -> NoiseLevel:
        """The levels at which the given steps start; steps has shape (B,), values 0 ... S, and 0 is clean data."""
        return self.schedule(self.times[step])

    def term(self, step: Tensor, x0: Tensor, prediction: Prediction, variance: Variance) -> Tensor:
        """The terms of the bound at the given steps: the decoder term at step 1, otherwise a KL divergence.

        Only the kinds of terms that occur are computed. There is no device synchronisation.

        Args:
            step: step numbers, one per image, shape (B,), int64, on the CPU, in 1 ... S.
            x0: the images, in [-1, 1], shape (B, C, H, W).
            prediction: the denoiser's prediction at the levels of the steps.
            variance: the variance of p(x_s | x_t).

        Returns:
            Bits per dimension, shape (B,), x0's dtype.
        """
        first = step == 1
        if first.all():
            return _bits(self._decoder_term(step, x0, prediction, variance))
        if not first.any():
            return _bits(self._kl_term(step, x0, prediction, variance))
        # Both terms are computed for all images, with finite placeholders for the images of the other term:
        # torch.where multiplies the gradient of the unused branch by 0, which gives NaN if that gradient is infinite.
        first = broadcast(first, x0).bool()
        surprise = self._decoder_term(step, x0, prediction, variance, ~first)
        return _bits(torch.where(first, surprise, self._kl_term(step, x0, prediction, variance, first)))

    def _decoder_term(
        self,
        step: Tensor,
        x0: Tensor,
        prediction: Prediction,
        variance: Variance,
        unused: Tensor | None = None,
    ) -> Tensor:
        """-ln p(x0 | x_t) in nats, x0's shape; finite placeholders for unused images."""
        second = step.clamp(min=2)
        beta_tilde = Small()(self.level(second), self.level(second - 1), prediction)
        mean = prediction.x0
        decoder = broadcast(variance.decoder(self.level(step), beta_tilde, prediction), x0)
        if unused is not None:
            mean, decoder = torch.where(unused, x0, mean), torch.where(unused, 1.0, decoder)
        return -discretised_log_likelihood(x0, mean, decoder**0.5)

    def _kl_term(
        self,
        step: Tensor,
        x0: Tensor,
        prediction: Prediction,
        variance: Variance,
        unused: Tensor | None = None,
    ) -> Tensor:
        """KL(q(x_s | x_t, x0) || p(x_s | x_t)) in nats, x0's shape; finite placeholders for unused images."""
        step = step.clamp(min=2)  # the posterior variance of step 1 is 0
        t, s = self.level(step), self.level(step - 1)
        true_variance = broadcast(Small()(t, s, prediction), x0)
        learned = broadcast(variance(t, s, prediction), x0)
        if unused is not None:
            learned = torch.where(unused, true_variance, learned)
        # the difference of the posterior means, computed directly to avoid cancellation
        gain = broadcast(s.alpha * conditional_variance(t, s) / t.sigma**2, x0)
        ratio = true_variance / learned
        return (ratio - 1 - ratio.log() + (gain * (x0 - prediction.x0)).square() / learned) / 2

    def prior(self, x0: Tensor) -> Tensor:
        """L_T = KL(q(x_T | x0) || N(0, I)) in bits per dimension, shape (B,)."""
        alphabar = broadcast(self.level(torch.full((len(x0),), len(self))).alpha ** 2, x0)
        # the variance is 1 - alphabar; this form avoids the cancellation in 1 - alphabar - 1
        return _bits((alphabar * x0.square() - alphabar - torch.log1p(-alphabar)) / 2)


def discretised_log_likelihood(x0: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-probability of each byte's bin under N(mean, std^2), with open outer bins (Ho et al. 2020, eq. 13).

    Uses the exact normal distribution function, which published code approximates by a tanh.

    Args:
        x0: bytes/127.5 - 1.
        mean: x0's shape.
        std: broadcasts against x0.

    Returns:
        Nats, x0's shape.
    """
    upper = ((x0 + HALF_BIN - mean) / std).masked_fill(x0 > 0.999, math.inf)
    lower = ((x0 - HALF_BIN - mean) / std).masked_fill(x0 < -0.999, -math.inf)
    # mirrored into the left tail, where the difference of two distribution functions does not cancel
    mirrored = upper + lower > 0
    low, high = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
    # bins that contain the mean: the mass on either side of the mean
    around = high > 0
    sides = sum(torch.erf(torch.where(around, edge, 1.0) / ROOT) for edge in (-low, high))
    # other bins: 2 Phi(-z) = erfcx(z/sqrt(2)) exp(-z^2/2); log_ndtr's gradient is inaccurate in float32
    near, width = torch.where(around, 0.0, -high), 2 * HALF_BIN / std.to(x0.dtype)
    open_end = low.isneginf()
    far = torch.where(open_end, near + 1, -low)
    log_near = torch.special.erfcx(near / ROOT).log()
    # ln Phi(-far)/Phi(-near)
    log_ratio = torch.special.erfcx(far / ROOT).log() - log_near - width * (near + far) / 2
    share = torch.where(open_end, 0.0, (-torch.expm1(log_ratio.clamp(max=-1e-30))).log())
    return torch.where(around, sides.log(), log_near - near.square() / 2 + share) - math.log(2)


def bound_terms(
    denoiser: BaseDenoiser,
    chain: Chain,
    x0: Tensor,
    condition: Condition | None = None,
    noise: NoiseSource = global_noise,
) -> Iterator[Tensor]:
    """Yields the terms of steps 1, 2, ..., S, each (B,), in bits per dimension; one network evaluation per term.

    Args:
        denoiser: in eval mode; it may clip x0, as for published bounds.
        chain: the steps.
        x0: images, bytes/127.5 - 1, shape (B, C, H, W).
        condition: the condition of the images, or None.
        noise: source of x_t's noise.
    """
    for number in range(1, len(chain) + 1):
        step = torch.full((len(x0),), number)
        level = chain.level(step)
        with torch.no_grad():
            prediction = denoiser(diffuse(x0, noise(x0), level), level, condition)
            yield chain.term(step, x0, prediction, denoiser.variance)


@dataclass(frozen=True)
class FlowLikelihood:
    """The likelihood of each image by the probability-flow ODE.

    Attributes:
        bits: -log2 p per dimension, shape (B,); for bytes an upper bound in expectation (uniform dequantisation).
        latent: the state at t_max, shape (B, C, H, W).
        evaluations: number of network evaluations.
    """

    bits: Tensor
    latent: Tensor
    evaluations: int


def flow_log_density(
    denoiser: BaseDenoiser,
    x: Tensor,
    condition: Condition | None = None,
    noise: NoiseSource = global_noise,
    tolerance: float = 1e-5,
) -> tuple[Tensor, Tensor, int]:
    """ln p(x) by the probability-flow ODE, with x taken as the state at t_min.

    The coordinates z = x_t / r, r^2 = alpha^2 + sigma^2, and the angle phi = atan(sigma/alpha) are bounded on every
    schedule. In them the flow is

        dz/dphi = cos(phi) eps_hat - sin(phi) x0_hat,    d ln p(z)/dphi = -div(dz/dphi)

    The divergence is estimated by one Rademacher probe per image, fixed along the flow (Skilling 1989,
    Hutchinson 1989). The density at t_max is N(0, sigma^2 I), the initial distribution of the samplers.

    Args:
        denoiser: in eval mode, without clipping, which is not differentiable everywhere.
        x: shape (B, C, H, W).
        condition: the condition of the images, or None.
        noise: source of the probe; only its sign is used.
        tolerance: relative and absolute tolerance of each integration step.

    Returns:
        ln p in nats, shape (B,); the state at t_max, shape (B, C, H, W); the number of evaluations.

    Raises:
        ValueError: the tolerance is not reached, or the flow is not finite; the message gives the time.
    """
    schedule = denoiser.schedule
    first, last = schedule(as_times([schedule.t_min, schedule.t_max])).scalars()
    dimensions = x[0].numel()
    probe = torch.where(noise(x) < 0, -1.0, 1.0).to(x.dtype)

    def time_at(phi: float) -> Tensor:
        log_snr = -math.log(math.tan(phi)) if phi < math.pi / 2 else -math.inf
        return schedule.nearest_time([log_snr])  # phi may round past the ends

    def velocity(phi: float, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        level = schedule(time_at(phi)).scalars()[0]
        r = math.hypot(level.alpha, level.sigma)
        with torch.enable_grad():
            z = state[0].detach().requires_grad_()
            prediction = denoiser(r * z, level, condition)
            dz = prediction.mix(-level.sigma / r, level.alpha / r)
            (product,) = torch.autograd.grad(dz, z, probe)
        return dz.detach(), -(product * probe).flatten(1).sum(dim=1)

    r_first, r_last = (math.hypot(level.alpha, level.sigma) for level in (first, last))
    start = (x / r_first, x.new_zeros(len(x)))
    angles = (math.atan2(level.sigma, level.alpha) for level in (first, last))
    try:
        (z, gained), evaluations = integrate(velocity, start, *angles, tolerance)
    except NotFinite as error:
        raise ValueError(
            f"the flow is not finite (NaN or infinite) from t = {time_at(error.x).item():g} on: the network's weights"
            " have diverged"
        ) from None
    std = last.sigma / r_last
    prior = -(z / std).square().flatten(1).sum(dim=1) / 2 - dimensions * math.log(
        std * math.sqrt(2 * math.pi)
    )
    return prior - gained - dimensions * math.log(r_first), r_last * z, evaluations


def flow_likelihood(
    denoiser: BaseDenoiser,
    x0: Tensor,
    condition: Condition | None = None,
    noise: NoiseSource = global_noise,
    tolerance: float = 1e-5,
) -> FlowLikelihood:
    """Bits per dimension of byte images, dequantised uniformly over their bins.

    Args:
        denoiser: in eval mode, without clipping.
        x0: bytes/127.5 - 1, shape (B, C, H, W).
        condition: the condition of the images, or None.
        noise: source of the dequantisation and of the probe.
        tolerance: relative and absolute tolerance of each integration step.
    """
    dequantised = x0 + HALF_BIN * torch.erf(noise(x0) / math.sqrt(2))  # uniform in +- half a bin
    log_p, latent, evaluations = flow_log_density(denoiser, dequantised, condition, noise, tolerance)
    bits = -log_p / (x0[0].numel() * math.log(2)) - math.log2(2 * HALF_BIN)
    return FlowLikelihood(bits, latent, evaluations)


def _bits(nats: Tensor) -> Tensor:
    """Converts nats per pixel to bits per dimension of each image, shape (B,)."""
    return nats.flatten(1).mean(dim=1) / math.log(2)
