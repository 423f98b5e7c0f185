"""Euler-Maruyama discretisation of the reverse SDE."""

import torch

from .base import Sampler, State


class EulerMaruyama(Sampler):
    """The Euler-Maruyama method on the reverse SDE (Song et al. 2021, arXiv:2011.13456, eq. 6).

        x_s = x_t + (f x_t - g^2 score)(s - t) + g sqrt(t - s) z,    score = -eps/sigma_t

    with f and g^2 of the schedule at t (`Schedule.drift_and_diffusion`). Steps to clean data and from pure noise are
    DDIM steps.
    """

    def step(self, denoiser, x_t, t, s, noise, path):
        prediction = denoiser(x_t, t)
        if t.alpha == 0 or s.sigma == 0:
            return State(prediction.mix(s.alpha, s.sigma), prediction)
        time, span = path.times[path.index], path.times[path.index] - path.times[path.index + 1]
        f, g2 = denoiser.schedule.drift_and_diffusion(time)
        x_s = torch.mul(x_t, 1 - f * span)
        x_s.add_(prediction.eps, alpha=-g2 * span / t.sigma).add_(noise(x_t), alpha=(g2 * span) ** 0.5)
        return State(x_s, prediction)
