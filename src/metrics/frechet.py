"""The Fréchet distance of two Gaussians by two independent matrix roots, and the effect of each image on it."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from src.errors import UserError

AGREEMENT = 1e-6
"""Largest difference of the two roots, relative to the distance."""
FLOOR = 1e-8
"""Largest difference of the two roots, relative to the traces of which the distance is a small difference."""


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d, divided by n - 1) of features, float64.

    Raises:
        ValueError: the shapes do not fit each other, e.g. of a covariance along the wrong axis.
    """

    mean: Tensor
    covariance: Tensor

    def __post_init__(self):
        (size,) = self.mean.shape
        if self.covariance.shape != (size, size):
            raise ValueError(
                f"a covariance of {size} features has shape {(size, size)}, got {tuple(self.covariance.shape)}"
            )

    def to(self, device: torch.device) -> "Moments":
        """The moments on a device."""
        return Moments(self.mean.to(device), self.covariance.to(device))

    @classmethod
    def of_sums(cls, count: Tensor, total: Tensor, outer: Tensor) -> "Moments":
        """The moments from n, sum f and sum f f^T over n >= 2 feature vectors f."""
        mean = total / count
        return cls(mean, (outer - count * torch.outer(mean, mean)) / (count - 1))


@dataclass(frozen=True)
class Target:
    """A reference with what all comparisons with it share: it is decomposed once.

    Attributes:
        moments: of the reference.
        factor: F (d, r) with F F^T = the covariance, from its eigenvectors.
        cholesky: L (d, rank) with L L^T = the covariance, by Cholesky's decomposition with pivoting; on the CPU.
    """

    moments: Moments
    factor: Tensor
    cholesky: Tensor

    @classmethod
    def of(cls, moments: Moments) -> "Target":
        """Decomposes a reference."""
        values, vectors = torch.linalg.eigh(moments.covariance)
        return cls(moments, vectors * values.clamp(min=0).sqrt(), cholesky(moments.covariance))

    @property
    def rank(self) -> int:
        """The rank of the covariance."""
        return self.cholesky.shape[1]


@dataclass(frozen=True)
class Comparison:
    """The distance of a Gaussian to a target.

    Attributes:
        moments: of the Gaussian.
        target: the target.
        distance: the squared Fréchet distance.
        rank: the rank of the Gaussian's covariance.
        cross: tr (C_a C_b)^(1/2).
        directions: P (d, k) with tr P^T C_a P = cross / 2, by which the cross term changes: its differential is
            tr P^T dC_a P. None if it was not requested.
    """

    moments: Moments
    target: Target
    distance: float
    rank: int
    cross: float
    directions: Tensor | None = field(repr=False, default=None)

    def influences(self, features: Tensor, chunk: int = 8192) -> Tensor:
        """The first-order effect of each image on the distance: the distance is an average of effects plus a constant.

        With x = f - mean_a, the differential of the distance gives

            2 (mean_a - mean_b).x + |x|^2 - tr C_a - 2 (|P^T x|^2 - cross / 2)

        Args:
            features: (n, d), those of which the moments are.
            chunk: feature vectors that are converted to float64 at once.

        Returns:
            float64 (n,), with mean near 0. Their standard deviation / sqrt(n) is the standard error of the distance.
        """
        if self.directions is None:
            raise ValueError("compare(..., directions=True) makes the directions that influences need")
        away = 2 * (self.moments.mean - self.target.moments.mean)
        constant = self.moments.covariance.trace() - self.cross
        parts = []
        for some in features.split(chunk):
            x = some.to(away) - self.moments.mean
            along = (x @ self.directions).square_().sum(1)
            parts.append(x @ away + x.square().sum(1) - 2 * along - constant)
        return torch.cat(parts)


def compare(moments: Moments, target: Target, directions: bool = False) -> Comparison:
    """Squared Fréchet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

        |mean_a - mean_b|^2 + tr C_a + tr C_b - 2 tr (C_a C_b)^(1/2)

    The last term is computed twice: from the eigenvalues of F^T C_a F, with C_b = F F^T from its eigenvectors, and from
    the singular values of L_a^T L_b, with Cholesky factors. Both need no root of a matrix that is not symmetric, whose
    eigenvalues can be complex, and both are exact for singular covariances (fewer images than features).

    Args:
        moments: of the Gaussian.
        target: the other one, decomposed.
        directions: also compute what `Comparison.influences` needs.

    Raises:
        UserError: the two results differ by more than `AGREEMENT`.
    """
    product = target.factor.T @ moments.covariance @ target.factor
    product = (product + product.T) / 2
    own = cholesky(moments.covariance)
    rank = own.shape[1]
    if directions:
        values, vectors = torch.linalg.eigh(product)
    else:
        values, vectors = torch.linalg.eigvalsh(product), None
    # the others are zero, and the root would turn rounding errors of 1e-16 into 1e-8
    kept = min(rank, target.rank)
    roots = values[len(values) - kept :].clamp(min=0).sqrt()
    by_eigenvalues = roots.sum().item()
    cross = torch.linalg.svdvals(own.T @ target.cholesky).sum().item()
    traces = (moments.covariance.trace() + target.moments.covariance.trace()).item()
    between = (moments.mean - target.moments.mean).square().sum().item()
    distance = between + traces - 2 * cross
    _check(distance, between + traces - 2 * by_eigenvalues, traces + between)
    found = None
    if vectors is not None:
        positive = roots > 0
        scaled = vectors[:, len(values) - kept :][:, positive] * (2 * roots[positive]).rsqrt()
        found = target.factor @ scaled
    return Comparison(moments, target, distance, rank, cross, found)


def _check(first: float, second: float, scale: float) -> None:
    if not abs(first - second) <= AGREEMENT * abs(first) + FLOOR * scale:
        raise UserError(
            f"the Fréchet distance is {first:.9g} by singular values and {second:.9g} by eigenvalues, which must"
            f" agree to {AGREEMENT:g}: the linear algebra of this installation is broken, or the features are"
            " degenerate; reinstall torch and scipy, or set OMP_NUM_THREADS=1"
        )


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance of two Gaussians; see `compare`."""
    return compare(a, Target.of(b)).distance


def cholesky(covariance: Tensor) -> Tensor:
    """L (d, rank) with L L^T = covariance, symmetric and positive semidefinite; float64, on the CPU.

    The rank is the number of pivots above d * 2.2e-16 * (largest variance), LAPACK's default.
    """
    from scipy.linalg.lapack import dpstrf

    factor, pivots, rank, _ = dpstrf(covariance.cpu().numpy(), lower=1)
    ordered = np.empty((len(factor), rank))
    ordered[pivots - 1] = np.tril(factor)[:, :rank]
    return torch.from_numpy(ordered)
