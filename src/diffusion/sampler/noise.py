"""Noise sources of samplers: callables that take a tensor and return noise of its shape.

A sampler calls its source only if a step uses noise.
"""

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from src.randomness import generator

NoiseSource = Callable[[Tensor], Tensor]


def global_noise(x: Tensor) -> Tensor:
    """Standard normal noise with x's shape from torch's global random state, for notebooks."""
    return torch.randn_like(x)


class PerImageNoise:
    """Noise that depends only on (seed, i) for image i, not on the batch, the number of devices or the order.

    By default it is drawn on the CPU and copied, so that every device gets the same numbers. Drawing on the device
    saves the copy, which can dominate stochastic sampling of large images on a GPU, but the numbers differ from the
    CPU's and may differ between kinds of devices.

    Args:
        seed: the sampling seed.
        indices: the index of each image of the batch.
        purpose: distinguishes independent streams with the same seed and index.
        device: device on which the noise is drawn, e.g. "cuda", by one generator for each image.
    """

    def __init__(
        self,
        seed: int,
        indices: Iterable[int],
        purpose: str = "sample",
        device: torch.device | str = "cpu",
    ):
        self.device = torch.device(device)
        self.generators = [generator(seed, purpose, index, device) for index in indices]

    def __call__(self, x: Tensor) -> Tensor:
        """The next noise of each image; x has shape (B, C, H, W) with B = len(indices).

        Always drawn in float32, so that a float64 run starts from the same noise as a float32 run.
        """
        noise = torch.stack(
            [torch.randn(x.shape[1:], generator=g, device=self.device) for g in self.generators]
        )
        return noise.to(x.device, x.dtype, non_blocking=True)


class ReplayedNoise:
    """Recorded noise, one tensor per call.

    The samplers draw noise only if a step uses it. Published code often draws at every step and multiplies by 0, e.g.
    at the step to clean data, or outside [s_min, s_max] with EDM's churn; list those draws in `skip`. Unused noise at
    the end of the recording is ignored.

    Args:
        recording: tensors of the images' shape, in the order in which they were drawn.
        skip: 0-based positions of recorded noise that was drawn but not used.

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
                "recording is exhausted: the sampler draws more noise than was recorded (without skip)"
            )
        if noise.shape != x.shape:
            raise ValueError(
                f"recording has noise of shape {tuple(noise.shape)}, the images {tuple(x.shape)}"
            )
        return noise.to(x.device, x.dtype)
