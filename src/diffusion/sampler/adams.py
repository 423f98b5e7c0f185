"""Adams-Bashforth methods: a polynomial through the last estimates of eps, extrapolated over the next step.

    x_s/alpha_s = x_t/alpha_t + sum_j eps_j integral of L_j d(sigma/alpha)

where L_j are the Lagrange polynomials of the visited levels in a variable that depends on the method. The weights are
exact integrals on any grid. One evaluation per step; the order increases from 1 at the first step.
"""

import math
from abc import abstractmethod
from functools import cache

import torch
from torch import Tensor

from ..noise_level import NoiseLevel
from .base import Sampler, State, check_order, is_endless, weighted_sum


class AdamsBashforth(Sampler):
    """An Adams-Bashforth method.

    Args:
        order: the number of estimates used by a step, 1 to 4.

    Raises:
        ValueError: the order is out of range.
    """

    def __init__(self, order: int):
        self.order = check_order(order, 4)

    @property
    def memory(self) -> int:
        return self.order - 1

    @abstractmethod
    def weights(self, visited: list[NoiseLevel], s: NoiseLevel) -> list[float]:
        """Integrals of the Lagrange polynomials over sigma/alpha from visited[0] to s, one per visited level."""

    def step(self, denoiser, x_t, t, s, noise, path):
        prediction = denoiser(x_t, t)
        if t.alpha == 0:
            return State(prediction.mix(s.alpha, s.sigma), prediction)
        past = [visit for visit in reversed(path.past) if visit.level.alpha > 0]
        eps = [prediction.eps, *(visit.prediction.eps for visit in past)]
        weights = self.weights([t, *(visit.level for visit in past)], s)
        terms = [(s.alpha * w, e) for w, e in zip(weights, eps, strict=False)]
        return State(weighted_sum((s.alpha / t.alpha, x_t), *terms), prediction)


class LMS(AdamsBashforth):
    """Polynomials in sigma/alpha: k-diffusion's linear multi-step method."""

    def __init__(self, order: int = 4):
        super().__init__(order)

    def weights(self, visited, s):
        nodes = [level.sigma / level.alpha for level in visited]
        at, weight = _gauss_legendre(nodes[0], s.sigma / s.alpha)
        return (_lagrange(nodes, at) @ weight).tolist()


class DEIS(AdamsBashforth):
    """Polynomials in ln(sigma/alpha): exponential Adams-Bashforth (Zhang & Chen 2023, arXiv:2204.13902, eq. 15).

    The paper's tAB uses polynomials in t, rho-AB in sigma/alpha (`LMS`); diffusers uses the logarithm.
    The step to clean data, where the logarithm is infinite, is of first order.
    """

    def __init__(self, order: int = 3):
        super().__init__(order)

    def weights(self, visited, s):
        if is_endless(visited[0], s):
            return [s.sigma / s.alpha - visited[0].sigma / visited[0].alpha]
        nodes = [-level.log_snr for level in visited]
        at, weight = _gauss_legendre(nodes[0], -s.log_snr)
        return (_lagrange(nodes, at) @ (weight * at.exp())).tolist()


def _gauss_legendre(start: float, end: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss-Legendre quadrature from start to end, shape (24,)."""
    nodes, weights = (torch.tensor(values, dtype=torch.float64) for values in _unit_rule())
    return start + nodes * (end - start), weights * (end - start)


@cache
def _unit_rule(points: int = 24) -> tuple[list[float], list[float]]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1] (Golub & Welsch 1969); exact to degree 47."""
    i = torch.arange(1, points, dtype=torch.float64)
    off_diagonal = i / (4 * i**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(off_diagonal.diag(1) + off_diagonal.diag(-1))
    return ((nodes + 1) / 2).tolist(), (vectors[0] ** 2).tolist()


def _lagrange(nodes: list[float], at: Tensor) -> Tensor:
    """The polynomials L_j at the points `at`, shape (len(nodes), len(at))."""
    rows = []
    for j, node in enumerate(nodes):
        factors = [(at - other) / (node - other) for i, other in enumerate(nodes) if i != j]
        rows.append(math.prod(factors, start=torch.ones_like(at)))
    return torch.stack(rows)
