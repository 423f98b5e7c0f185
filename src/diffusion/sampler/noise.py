"""Where a sampler's noise comes from: one injectable source, called with the tensor whose shape is wanted.

Any callable will do: recorded noise is replayed with `lambda x: recording.pop(0)`.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from src.randomness import generator

NoiseSource = Callable[[Tensor], Tensor]


def global_noise(x: Tensor) -> Tensor:
    """Standard normal noise like x from torch's global stream: for notebooks."""
    return torch.randn_like(x)


class PerImageNoise:
    """Noise of image i that depends on (seed, i) alone: not on the batch, the number of devices or the order.

    Drawn on the CPU and moved, so that it is also the same on every device.

    Args:
        seed: the sampling seed.
        indices: the number of each image of the batch.
        purpose: numbers of another purpose count other images, whose noise is independent.
    """

    def __init__(self, seed: int, indices: Iterable[int], purpose: str = "sample"):
        self.generators = [generator(seed, purpose, index) for index in indices]

    def __call__(self, x: Tensor) -> Tensor:
        """The next noise of each image; x has shape (B, C, H, W) with B = len(indices).

        float32 numbers whatever x's dtype, so that a float64 run starts where the float32 run does.
        """
        noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in self.generators])
        return noise.to(x.device, x.dtype, non_blocking=True)
