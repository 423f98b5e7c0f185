"""The Fréchet distance of two Gaussians, and their moments."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d, divided by n - 1) of features, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of_sums(cls, count: Tensor, total: Tensor, outer: Tensor) -> "Moments":
        """The moments from n, sum f and sum f f^T over n >= 2 feature vectors f."""
        mean = total / count
        return cls(mean, (outer - count * torch.outer(mean, mean)) / (count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

        |mean_a - mean_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a^(1/2) C_b C_a^(1/2))^(1/2))

    The symmetric form needs only eigenvalues of symmetric matrices, so singular covariances (fewer images than
    features) need no special case.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ b.covariance @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return distance.item()
