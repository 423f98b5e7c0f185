"""Ancestral sampling."""

from .base import Sampler, State


class DDPM(Sampler):
    """Ancestral sampling of p(x_s | x_t) (Ho et al. 2020, alg. 2), on any sub-sequence of times.

        x_s = posterior_mean(x0, x_t) + std z,    std^2 = the denoiser's variance (small, large or learned)

    where x0 is the denoiser's estimate at x_t. The step to clean data adds no noise. With the large variance this is
    the sigma-hat row of the DDIM paper.
    """

    def step(self, denoiser, x_t, t, s, noise, path):
        reverse = denoiser.reverse(x_t, t, s)
        x_s = reverse.mean
        if s.sigma > 0:
            x_s = x_s + reverse.variance**0.5 * noise(x_t)
        return State(x_s, reverse.prediction)
