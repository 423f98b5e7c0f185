"""The variance of the reverse step p(x_s | x_t), s < t.

    small:  sigma_{t|s}^2 sigma_s^2 / sigma_t^2   (beta-tilde: exact where x0 is known)
    large:  sigma_{t|s}^2                         (beta: exact where x0 ~ N(0, I))

with sigma_{t|s}^2 = sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2 (Ho et al. 2020, sec. 3.2). Both follow from the
two levels alone, for any sub-sequence of times.
"""

from abc import ABC, abstractmethod

from torch import Tensor

from .noise_level import NoiseLevel, conditional_variance
from .parameterization import Prediction


class Variance(ABC):
    """How the variance of the reverse step is chosen."""

    @abstractmethod
    def __call__(self, t: NoiseLevel, s: NoiseLevel, prediction: Prediction) -> Tensor | float:
        """The variance of p(x_s | x_t): of the levels' shape, or an image's if it is learned."""


class Small(Variance):
    """beta-tilde, the posterior's variance; 0 at the step to clean data."""

    def __call__(self, t, s, prediction):
        return conditional_variance(t, s) * s.sigma**2 / t.sigma**2


class Large(Variance):
    """beta. On a sub-sequence this is the sigma-hat of DDIM (Song et al. 2021, sec. 5)."""

    def __call__(self, t, s, prediction):
        return conditional_variance(t, s)
