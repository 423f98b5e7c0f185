"""Exponential integrators of the diffusion ODE (Lu et al. 2022, arXiv:2206.00927 and 2211.01095).

For a step h = lambda_s - lambda_t in the log-SNR the linear part is solved exactly,

    x_s = (a_s/a_t) x_t - b_s (expm1(k) m + phi_2(k) m' + phi_3(k) m'' + ...)

where the derivatives of m are in units of the step, and m is one of two estimates:

    of x0 ("++"):  a = sigma, b = alpha, k = -h
    of eps:        a = alpha, b = sigma, k = h
"""

import math
from abc import ABC, abstractmethod

from torch import Tensor

from ..noise_level import NoiseLevel
from ..parameterization import Prediction


class Form(ABC):
    """The integrated estimate and its coefficients."""

    @abstractmethod
    def estimate(self, prediction: Prediction) -> Tensor:
        """m, the estimate."""

    @abstractmethod
    def a(self, level: NoiseLevel) -> float:
        """Coefficient of the linear part."""

    @abstractmethod
    def b(self, level: NoiseLevel) -> float:
        """Coefficient of the estimate."""

    @abstractmethod
    def k(self, h: float) -> float:
        """The exponent of a step of h in the log-SNR."""


class X0Form(Form):
    """Integrates x0, which stays bounded at high noise levels: DPM-Solver++'s choice."""

    def estimate(self, prediction):
        return prediction.x0

    def a(self, level):
        return level.sigma

    def b(self, level):
        return level.alpha

    def k(self, h):
        return -h


class EpsForm(Form):
    """Integrates eps: DPM-Solver's choice."""

    def estimate(self, prediction):
        return prediction.eps

    def a(self, level):
        return level.alpha

    def b(self, level):
        return level.sigma

    def k(self, h):
        return h


def form(plus_plus: bool) -> Form:
    """`X0Form` for DPM-Solver++, `EpsForm` for DPM-Solver."""
    return X0Form() if plus_plus else EpsForm()


def phi_2(k: float) -> float:
    """expm1(k)/k - 1."""
    return math.expm1(k) / k - 1


def phi_3(k: float) -> float:
    """phi_2(k)/k - 1/2."""
    return phi_2(k) / k - 0.5
