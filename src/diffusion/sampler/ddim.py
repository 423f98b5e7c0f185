"""Denoising diffusion implicit models."""

from .base import Sampler, State, ancestral_split


class DDIM(Sampler):
    """Denoising diffusion implicit models (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16).

        x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z,    std = eta sigma_{t|s} sigma_s / sigma_t

    where x0 and eps are the denoiser's estimates at x_t. eta = 0 is deterministic and of order 1 in the log-SNR step.
    eta = 1 is ancestral DDPM sampling with the small variance; in unscaled coordinates it is k-diffusion's Euler
    ancestral sampler.

    Args:
        eta: amount of noise, in [0, 1]; 0 is deterministic.

    Raises:
        ValueError: eta is out of range.
    """

    def __init__(self, eta: float = 0.0):
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        self.eta = eta

    def step(self, denoiser, x_t, t, s, noise, path):
        prediction = denoiser(x_t, t)
        down, std = ancestral_split(t, s, self.eta)
        x_s = prediction.mix(down.alpha, down.sigma)
        if std > 0:
            x_s = x_s.add_(noise(x_t), alpha=std)
        return State(x_s, prediction)
