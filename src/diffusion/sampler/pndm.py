"""Pseudo numerical methods."""

from torch import Tensor

from ..noise_level import NoiseLevel
from .base import Sampler, State, weighted_sum


class PLMS(Sampler):
    """Pseudo linear multi-step: PNDM (Liu et al. 2022, arXiv:2202.09778, eq. 11 to 13).

    Adams-Bashforth of order 4 on eps with the coefficients of equal steps, whatever the spacing, and DDIM's step from
    level to level. The first three steps, before four estimates are available, are

    - with `runge_kutta`, pseudo Runge-Kutta steps of four evaluations each (the paper's F-PNDM): S + 9 in total;
    - otherwise an improved Euler step, then orders 2 and 3 (Stable Diffusion's PLMS): S + 1 in total.

    Args:
        runge_kutta: start with Runge-Kutta steps.
    """

    memory = 3

    def __init__(self, runge_kutta: bool = False):
        self.runge_kutta = runge_kutta

    def step(self, denoiser, x_t, t, s, noise, path):
        prediction = denoiser(x_t, t)
        if t.alpha == 0 or (s.sigma == 0 and not path.past):
            return State(prediction.mix(s.alpha, s.sigma), prediction)
        eps = [prediction.eps, *(visit.prediction.eps for visit in reversed(path.past))]
        if self.runge_kutta and path.index < 3 and s.sigma > 0:
            average = self._runge_kutta(denoiser, x_t, t, s, eps[0], path)
        elif len(eps) == 1:
            average = weighted_sum((1 / 2, eps[0]), (1 / 2, denoiser(_transfer(x_t, eps[0], t, s), s).eps))
        else:
            average = weighted_sum(*zip(COEFFICIENTS[len(eps)], eps, strict=True))
        return State(_transfer(x_t, average, t, s), prediction)

    def _runge_kutta(self, denoiser, x_t, t, s, eps1, path) -> Tensor:
        schedule = denoiser.schedule
        time = (path.times[path.index] + path.times[path.index + 1]) / 2
        middle = schedule([time]).scalars()[0]
        eps2 = denoiser(_transfer(x_t, eps1, t, middle), middle).eps
        eps3 = denoiser(_transfer(x_t, eps2, t, middle), middle).eps
        eps4 = denoiser(_transfer(x_t, eps3, t, s), s).eps
        return weighted_sum((1 / 6, eps1), (1 / 3, eps2), (1 / 3, eps3), (1 / 6, eps4))


# Adams-Bashforth for equal steps, the newest estimate first
COEFFICIENTS = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def _transfer(x_t: Tensor, eps: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """From level t to s with a constant eps (eq. 11): DDIM's step."""
    ratio = s.alpha / t.alpha
    return weighted_sum((ratio, x_t), (s.sigma - ratio * t.sigma, eps))
