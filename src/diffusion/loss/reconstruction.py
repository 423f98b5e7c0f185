"""The loss of an autoencoder."""

import torch
from torch import Tensor

from ..autoencoder import Autoencoder
from ..denoiser import Denoiser
from ..distance import Distance, Squared
from .base import Loss

FAITHFUL = 1e-10
"""The smallest mean squared error that is distinguished, 100 dB."""


class ReconstructionLoss(Loss):
    """The error of the reconstruction with a small KL term (Rombach et al. 2022, arXiv:2112.10752, sec. 3.1, app. G).

        mean_pixels distance(D(z), x) + kl_weight KL(q(z | x) || N(0, I)) / (C H W),    z = mean + std noise

    The paper adds a perceptual and an adversarial term, which this loss lacks: details that the latents do not hold are
    blurred.

    Args:
        denoiser: the autoencoder that is trained.
        distance: between reconstruction and image (default: `Squared`).
        kl_weight: weight of the KL in nats against the error summed over pixels, as in the paper; 0 or more.

    Raises:
        ValueError: `denoiser` is no autoencoder, or the weight is negative.
    """

    measures = ("mse", "psnr", "kl")

    def __init__(self, denoiser: Denoiser, distance: Distance | None = None, kl_weight: float = 1e-6):
        super().__init__(denoiser)
        if not isinstance(denoiser, Autoencoder):
            raise ValueError("denoiser must be an Autoencoder")
        if kl_weight < 0:
            raise ValueError(f"kl_weight must be at least 0, got {kl_weight}")
        self.distance = distance or Squared()
        self.kl_weight = kl_weight

    def draw(self, n, generator):
        return torch.zeros(n, dtype=torch.float64)  # an autoencoder has no times

    def quantile(self, draws):
        return torch.zeros(len(draws), dtype=torch.float64)

    def forward(self, x0, draws, eps, condition=None):
        shape = self.denoiser.network.latent_shape
        noise = eps.flatten(1)[:, : shape.numel()].unflatten(
            1, shape
        )  # as many of the normal values as it needs
        reconstruction, mean, log_variance = self.denoiser.reconstruct(x0, noise)
        error = self.distance(reconstruction.to(x0.dtype), x0).flatten(1).mean(dim=1)
        return error + self.kl_weight * kl_divergence(mean, log_variance).to(x0.dtype) / x0[0].numel()

    def measure(self, x0, draws, eps, condition=None):
        """Of the reconstruction from the mean: `mse` and `psnr` in dB of pixels in [0, 1], and `kl` in nats."""
        reconstruction, mean, log_variance = self.denoiser.reconstruct(x0)
        mse = (reconstruction.clamp(-1, 1).float() - x0.float()).square().flatten(1).mean(dim=1) / 4
        return {"mse": mse, "psnr": psnr(mse), "kl": kl_divergence(mean, log_variance)}


def psnr(mse: Tensor) -> Tensor:
    """The peak signal-to-noise ratio in dB, at most 100, of the mean squared error of pixels in [0, 1]."""
    return -10 * mse.clamp(min=FAITHFUL).log10()


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, I)) of each image in nats, float32, shape (B,) (Kingma & Welling 2014, app. B)."""
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(dim=1)
