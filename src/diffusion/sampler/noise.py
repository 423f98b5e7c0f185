"""The sources of a sampler's noise: callables that take a tensor and return noise of its shape.

A sampler calls its source only where a step uses noise.
"""

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from src.randomness import generator

NoiseSource = Callable[[Tensor], Tensor]


def global_noise(x: Tensor) -> Tensor:
    """Standard normal noise like x from torch's global random state, for notebooks."""
    return torch.randn_like(x)


class PerImageNoise:
    """Noise of image i that depends on (seed, i) alone: not on the batch, the number of devices or the order.

    By default it is drawn on the CPU and copied, so that every device gets the same numbers. Drawing on the device
    saves the copy, which can dominate stochastic samplers of large images on a GPU, but the numbers differ from the
    CPU's and may differ between kinds of devices.

    Args:
        seed: the sampling seed.
        indices: the number of each image of the batch.
        purpose: separates independent streams of the same numbers.
        device: where to draw, e.g. "cuda".
    """

    def __init__(
        self,
        seed: int,
        indices: Iterable[int],
        purpose: str = "sample",
        device: torch.device | str = "cpu",
    ):
        self.generators = [generator(seed, purpose, index, device) for index in indices]

    def __call__(self, x: Tensor) -> Tensor:
        """The next noise of each image; x has shape (B, C, H, W) with B = len(indices).

        Drawn in float32 whatever x's dtype, so that a float64 run starts where the float32 run does.
        """
        noise = torch.stack([torch.randn(x.shape[1:], generator=g, device=g.device) for g in self.generators])
        return noise.to(x.device, x.dtype, non_blocking=True)


class ReplayedNoise:
    """Recorded noise, one tensor for each call.

    Samplers here draw only where a step uses noise. Published codes often draw at every step and multiply by 0, e.g. at
    the step to clean data, or outside [s_min, s_max] with EDM's churn: name those draws in `skip`. Recorded noise that
    is left over at the end is ignored.

    Args:
        recording: tensors of the images' shape, in the order in which they were drawn.
        skip: 0-based places in the recording of noise that was drawn and not used.

    Raises:
        ValueError: when called, the recording is exhausted, or the next tensor has another shape.
    """

    def __init__(self, recording: Iterable[Tensor], skip: Collection[int] = ()):
        self._used = (z for place, z in enumerate(recording) if place not in skip)

    def __call__(self, x: Tensor) -> Tensor:
        """The next recorded noise, with x's device and dtype."""
        noise = next(self._used, None)
        if noise is None:
            raise ValueError(
                "recording is exhausted: the sampler draws more often than it holds unskipped noise"
            )
        if noise.shape != x.shape:
            raise ValueError(
                f"recording has noise of shape {tuple(noise.shape)}, the images {tuple(x.shape)}"
            )
        return noise.to(x.device, x.dtype)
