"""Pointwise distances between the network's output and its target."""

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor


class Distance(ABC):
    """A pointwise distance. Loss weights are those of the squared error, whatever the distance."""

    @abstractmethod
    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The distance at each pixel, with the arguments' shape."""


class Squared(Distance):
    """(F - target)^2. Its minimiser is the conditional mean, which all samplers assume."""

    def __call__(self, output, target):
        return (output - target).square()


class Absolute(Distance):
    """|F - target|, L1. Its minimiser is the conditional median."""

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
