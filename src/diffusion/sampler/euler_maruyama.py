"""The reverse SDE, discretised."""

import torch

from ..schedule import Schedule
from .base import Sampler, State


class EulerMaruyama(Sampler):
    """Euler and Maruyama's method on the reverse SDE (Song et al. 2021, arXiv:2011.13456, eq. 6).

        x_s = x_t + (f x_t - g^2 score)(s - t) + g sqrt(t - s) z,    score = -eps/sigma_t
        f = d ln(alpha)/dt,    g^2 = d sigma^2/dt - 2 f sigma^2

    with f and g at the schedule's time t. Steps to clean data and from pure noise take the estimates of x0 and
    eps instead.
    """

    def step(self, denoiser, x_t, t, s, noise, path):
        prediction = denoiser(x_t, t)
        if t.alpha == 0 or s.sigma == 0:
            return State(prediction.mix(s.alpha, s.sigma), prediction)
        time, span = path.times[path.index], path.times[path.index] - path.times[path.index + 1]
        f, g2 = _coefficients(denoiser.schedule, time)
        x_s = torch.mul(x_t, 1 - f * span)
        x_s.add_(prediction.eps, alpha=-g2 * span / t.sigma).add_(noise(x_t), alpha=(g2 * span) ** 0.5)
        return State(x_s, prediction)


def _coefficients(schedule: Schedule, time: float) -> tuple[float, float]:
    """f and g^2 at a time, by differences of the schedule: relative error about 1e-8 where it is smooth."""
    width = 1e-4 * (schedule.t_max - schedule.t_min)
    before, after = max(time - width, schedule.t_min), min(time + width, schedule.t_max)
    low, level, high = schedule([before, time, after]).scalars()
    f = (high.alpha - low.alpha) / (after - before) / level.alpha
    return f, (high.sigma**2 - low.sigma**2) / (after - before) - 2 * f * level.sigma**2
