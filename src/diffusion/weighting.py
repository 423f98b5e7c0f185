"""Loss weightings, each written once: as a weight on the squared error of x0_hat.

The loss compares the network's output F with its target, and x0_hat - x0 = c_out (F - target), so the
weight there is weight(level) c_out^2, whatever the parameterisation.
"""

from abc import ABC, abstractmethod

from torch import Tensor

from .noise_level import NoiseLevel


class Weighting(ABC):
    """A weight on ||x0_hat - x0||^2."""

    @abstractmethod
    def __call__(self, level: NoiseLevel, c_out: Tensor) -> Tensor:
        """The weights, float64, of the levels' shape (B,); c_out is the parameterisation's."""


class Simple(Weighting):
    """1/c_out^2, a plain mean squared error on the network's target: L_simple (Ho et al. 2020, eq. 14) for eps."""

    def __call__(self, level, c_out):
        return 1 / c_out**2
