"""Predictor-corrector sampling."""

import torch

from .base import Sampler, check_memoryless


class PredictorCorrector(Sampler):
    """Langevin steps at each level, then a predictor step (Song et al. 2021, arXiv:2011.13456, alg. 4 and 5).

        x <- x + step score + sqrt(2 step) z,    step = 2 a (snr |z|/|score|)^2,    score = -eps/sigma_t

    with a = (alpha_t/alpha_s)^2, which is 1 - beta for VP and 1 for VE. Each step takes `corrections` evaluations plus
    those of the predictor.

    Args:
        predictor: a single-step sampler, e.g. DDPM.
        corrections: Langevin steps at each level, at least 1.
        snr: the signal-to-noise ratio of a Langevin step (0.16 for VP and VE on CIFAR-10).
        batch_norms: average the norms over the batch, as the paper's code does, so that an image depends on the rest
            of its batch. If False, norms are per image.

    Raises:
        ValueError: an argument is out of range, or the predictor is a multi-step method.
    """

    def __init__(
        self, predictor: Sampler, corrections: int = 1, snr: float = 0.16, batch_norms: bool = False
    ):
        if corrections < 1:
            raise ValueError(f"corrections must be at least 1, got {corrections}")
        if snr <= 0:
            raise ValueError(f"snr must be positive, got {snr}")
        self.predictor = check_memoryless(predictor, "predictor")
        self.corrections, self.snr, self.batch_norms = corrections, snr, batch_norms

    def step(self, denoiser, x_t, t, s, noise, path):
        for _ in range(self.corrections):
            eps, z = denoiser(x_t, t).eps, noise(x_t)
            size = 2 * (t.alpha / s.alpha) ** 2 * (self.snr * t.sigma * self._norm(z) / self._norm(eps)) ** 2
            x_t = x_t - size / t.sigma * eps + (2 * size).sqrt() * z
        return self.predictor.step(denoiser, x_t, t, s, noise, path)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of each image, shape (B, 1, 1, 1), or their mean, shape (1, 1, 1, 1)."""
        norms = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
        return norms.mean(dim=0, keepdim=True) if self.batch_norms else norms
