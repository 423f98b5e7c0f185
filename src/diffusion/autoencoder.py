"""Autoencoders of images, whose latents a diffusion model is trained on."""

from torch import Tensor, nn

from .denoiser import BaseDenoiser, Denoiser
from .parameterization import Parameterization
from .schedule import Schedule
from .variance import Small


class Autoencoder(Denoiser):
    """q(z | x) and its decoder, in place of a denoiser, so that it trains as one. It has no noise levels.

    Args:
        network: maps images (B, C, H, W) and noise of the latents to the reconstruction, and to mean and log-variance
            of q(z | x), each (B, *latent_shape); without noise, it decodes the mean.
        schedule, parameterization: not used.
    """

    makes_images = False

    def __init__(self, network: nn.Module, schedule: Schedule, parameterization: Parameterization):
        BaseDenoiser.__init__(self)  # without the checks of a denoiser's output
        self.network, self.schedule, self.parameterization = network, schedule, parameterization
        self.variance = Small()

    def reconstruct(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The reconstruction of images in [-1, 1], and mean and log-variance of their latents; see `network`."""
        return self.network(images, noise)

    def evaluate(self, x_t, level, condition=None, to=None):
        return self.reconstruct(x_t)[0]

    def forward(self, x_t, level, condition=None, to=None):
        raise ValueError("an autoencoder reconstructs images, and predicts none")
