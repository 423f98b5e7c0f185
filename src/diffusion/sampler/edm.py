"""Euler, Heun and midpoint steps with the churn of EDM (Karras et al. 2022, arXiv:2206.00364, algorithm 2).

The probability-flow ODE is written without derivatives of the schedule: dx = x0 d alpha + eps d sigma. In unscaled
coordinates x/alpha this is d(x/alpha) = eps d(sigma/alpha).
"""

import math
from abc import abstractmethod
from dataclasses import replace

from ..noise_level import NoiseLevel, conditional_variance
from ..schedule import Schedule
from .base import Sampler, State, is_endless, level_between, weighted_sum


class Churned(Sampler):
    """A deterministic step after churn: noise is added to raise the level.

        sigma_hat = (1 + min(s_churn/S, sqrt(2) - 1)) sigma   in unscaled coordinates, for sigma in [s_min, s_max]

    where S is the number of steps (Karras et al. 2022, algorithm 2).

    Args:
        s_churn: amount of noise added, at least 0; 0 is deterministic.
        s_min, s_max: the range of sigma/alpha in which noise is added.
        s_noise: standard deviation of the added noise.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = math.inf, s_noise: float = 1.0
    ):
        if s_churn < 0:
            raise ValueError(f"s_churn must be at least 0, got {s_churn}")
        if not 0 <= s_min <= s_max:
            raise ValueError(f"s_min must be in [0, s_max], got {s_min} and {s_max}")
        if s_noise < 0:
            raise ValueError(f"s_noise must be at least 0, got {s_noise}")
        self.s_churn, self.s_min, self.s_max, self.s_noise = s_churn, s_min, s_max, s_noise

    def step(self, denoiser, x_t, t, s, noise, path):
        gamma = min(self.s_churn / path.steps, math.sqrt(2) - 1)
        if gamma > 0 and t.alpha > 0 and self.s_min <= t.sigma / t.alpha <= self.s_max:
            raised = _raised(denoiser.schedule, t, 1 + gamma)
            std = self.s_noise * conditional_variance(raised, t) ** 0.5
            x_t, t = weighted_sum((raised.alpha / t.alpha, x_t), (std, noise(x_t))), raised
        return self.deterministic_step(denoiser, x_t, t, s, path)

    @abstractmethod
    def deterministic_step(self, denoiser, x_t, t, s, path) -> State:
        """From x_t to x_s without noise; the arguments are those of `step`."""


class Euler(Churned):
    """The Euler step in unscaled coordinates: order 1. Without churn it equals DDIM."""

    def deterministic_step(self, denoiser, x_t, t, s, path):
        prediction = denoiser(x_t, t)
        return State(prediction.mix(s.alpha, s.sigma), prediction)


class Heun(Churned):
    """Heun's trapezoidal step, EDM's sampler: order 2, two evaluations per step, one at the step to clean data.

        x_s = x_t + (x0_t + x0_s)/2 (alpha_s - alpha_t) + (eps_t + eps_s)/2 (sigma_s - sigma_t)

    in unscaled coordinates (x, alpha and sigma divided by alpha), where the x0 term vanishes. On straight schedules
    (flows) the schedule's own coordinates are used, which gives Heun's method in t as published for flows. So do
    trajectories from pure noise (alpha = 0), where unscaled coordinates are undefined.
    """

    def deterministic_step(self, denoiser, x_t, t, s, path):
        prediction = denoiser(x_t, t)
        euler = prediction.mix(s.alpha, s.sigma)
        if s.sigma == 0:
            return State(euler, prediction)
        corrected = denoiser(euler, s)
        scaled = denoiser.schedule.straight or path.levels[0].alpha == 0
        t_scale, s_scale = (1.0, 1.0) if scaled else (t.alpha, s.alpha)
        of_x0 = (s.alpha - t.alpha * s_scale / t_scale) / 2
        of_eps = (s.sigma - t.sigma * s_scale / t_scale) / 2
        x_s = (
            prediction.mix(of_x0, of_eps)
            .add_(corrected.mix(of_x0, of_eps))
            .add_(x_t, alpha=s_scale / t_scale)
        )
        return State(x_s, prediction)


class DPM2(Churned):
    """The midpoint step in ln(sigma/alpha): order 2, two evaluations per step, one from pure noise or to clean data.

    k-diffusion's DPM2, i.e. DPM-Solver-2 (Lu et al. 2022, arXiv:2206.00927, algorithm 1) with churn.
    """

    def deterministic_step(self, denoiser, x_t, t, s, path):
        prediction = denoiser(x_t, t)
        if is_endless(t, s):
            return State(prediction.mix(s.alpha, s.sigma), prediction)
        middle = level_between(denoiser.schedule, t, s, 0.5, path)
        eps = denoiser(prediction.mix(middle.alpha, middle.sigma), middle).eps
        ratio = s.alpha / t.alpha
        return State(weighted_sum((ratio, x_t), (s.sigma - ratio * t.sigma, eps)), prediction)


def _raised(schedule: Schedule, t: NoiseLevel, factor: float) -> NoiseLevel:
    """The level at `factor` times sigma/alpha; beyond t_max, the level of t_max with a larger sigma."""
    wanted = factor * t.sigma / t.alpha
    (noisiest,) = schedule([schedule.t_max]).scalars()
    if wanted * noisiest.alpha > noisiest.sigma * (1 + 1e-6):
        return replace(noisiest, sigma=wanted * noisiest.alpha)
    return schedule(schedule.time_of_log_snr([-math.log(wanted)])).scalars()[0]
