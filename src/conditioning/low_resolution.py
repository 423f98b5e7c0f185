"""Super-resolution: the network is conditioned on a low-resolution version of the image."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from src.randomness import draws_at, generator

from .condition import Condition
from .conditioning import Conditioning


class LowResolution(Conditioning):
    """The image at a lower resolution, enlarged again, as further input channels (SR3, Saharia et al. 2021,
    arXiv:2104.07636, section 2.1).

    Low resolution is the mean of each block of factor x factor pixels; it is enlarged by bicubic interpolation.
    Image i of a sampling run has the low resolution of example i.

    Args:
        factor: between the two resolutions, at least 2; divides height and width.
        noise: largest standard deviation of Gaussian noise that training adds to the low resolution (Ho et al. 2021,
            arXiv:2106.15282, section 4.2), with images in [-1, 1]; each image has a uniformly drawn part of it. Unlike
            in the paper, the network does not read how much. Sampling and validation add none.
        dropout: see `Conditioning`; the network then reads zeros.
        examples: maps the indices of a sampling run to encoded images, shape (B, C, H, W), on the CPU.

    Raises:
        ValueError: an argument is out of range.
    """

    kinds = frozenset({"image"})
    reads_validation = True

    def __init__(
        self,
        factor: int = 2,
        noise: float = 0.0,
        dropout: float = 0.0,
        examples: Callable[[Sequence[int]], Tensor] | None = None,
    ):
        super().__init__(dropout)
        if factor < 2:
            raise ValueError(f"factor must be at least 2, got {factor}")
        if noise < 0:
            raise ValueError(f"noise must be at least 0, got {noise}")
        self.factor, self.noise, self.examples = factor, noise, examples

    def check(self, shape):
        _, height, width = shape
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"factor={self.factor} must divide the height and width of the images, {height} x {width}"
            )

    def low(self, x0: Tensor) -> Tensor:
        """The low resolution of images, shape (B, C, H / factor, W / factor)."""
        return F.avg_pool2d(x0, self.factor)

    def of_low(self, low: Tensor) -> Condition:
        """The condition of low-resolution images, shape (B, C, H / factor, W / factor)."""
        return Condition(image=F.interpolate(low, scale_factor=self.factor, mode="bicubic"))

    def of_data(self, condition, x0):
        return self.of_low(self.low(x0))

    def of_training(self, condition, x0, positions, seed, batch_size):
        """Noise is drawn as dropout is, keyed by (seed, "low-resolution noise", batch number)."""
        if self.noise:
            shape = (batch_size, *self.low(x0).shape[1:])

            def drawn(number: int) -> Tensor:
                draw = generator(seed, "low-resolution noise", number)
                share = torch.rand(batch_size, 1, 1, 1, generator=draw)
                return self.noise * share * torch.randn(shape, generator=draw)

            noise = draws_at(positions, batch_size, drawn).to(x0, non_blocking=True)
            # of equal value in each block, so that it is the noise of the block's mean
            x0 = x0 + F.interpolate(noise, scale_factor=self.factor, mode="nearest")
        return super().of_training(condition, x0, positions, seed, batch_size)

    def of_samples(self, indices, seed):
        if self.examples is None:
            raise ValueError("examples are needed to sample: give a function from indices to encoded images")
        return self.of_data(Condition(), self.examples(indices))

    def describe_samples(self):
        return f"image i has the low resolution (1/{self.factor}) of validation image i, and again from the first"
