"""The distance between the network's output and its target, pixel by pixel."""

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor


class Distance(ABC):
    """A pointwise distance. The loss weights are those of the squared error for every distance."""

    @abstractmethod
    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The distance at each pixel, of the arguments' shape."""


class Squared(Distance):
    """(F - target)^2, whose optimum is the conditional mean, as all samplers assume."""

    def __call__(self, output, target):
        return (output - target).square()


class Absolute(Distance):
    """|F - target|, L1: its optimum is the conditional median."""

    def __call__(self, output, target):
        return (output - target).abs()


class Huber(Distance):
    """d^2/2 for |d| < delta, else delta (|d| - delta/2): squared near 0, absolute far away (Huber 1964).

    Args:
        delta: the threshold, in units of the target.

    Raises:
        ValueError: delta is not positive.
    """

    def __init__(self, delta: float = 1.0):
        if delta <= 0:
            raise ValueError(f"delta must be positive, got {delta}")
        self.delta = delta

    def __call__(self, output, target):
        return F.huber_loss(output, target, reduction="none", delta=self.delta)
