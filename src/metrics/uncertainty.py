"""95 % intervals of scores over redraws of the generated images, at the same number of images.

The reference set is taken as fixed. A score that is smooth in the distribution of the images has a first-order effect
of each image (its influence); the standard deviation of the effects gives the interval (infinitesimal jackknife,
Jaeckel 1972; Efron 1982, ch. 6). Others are computed again without each of `GROUPS` groups of images.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Interval = tuple[float, float]

GROUPS = 20
Z = 1.959964
"""97.5 % quantile of the normal distribution."""
T = 2.093024
"""97.5 % quantile of Student's t with GROUPS - 1 degrees of freedom."""

METHOD = (
    "95 % over redraws of the generated images, reference fixed: first-order effect of each image, Wilson's interval of"
    f" a share, or jackknife over {GROUPS} groups"
)


def by_influences(value: float, influences: Tensor, further: float = 0.0) -> Interval:
    """The interval of a score from the first-order effects of its images.

    Args:
        value: the score.
        influences: (n,), n >= 2.
        further: standard error from another source, independent of the images.
    """
    half = Z * math.hypot(influences.std().item() / math.sqrt(len(influences)), further)
    return value - half, value + half


def by_groups(share: float, without: Sequence[float], n: int) -> Interval:
    """The interval of a share from its values without each of `GROUPS` groups of images (delete-a-group jackknife).

    Limited to [0, 1]. If no group matters, e.g. for a share of 1, it is Wilson's interval.

    Args:
        share: the score.
        without: its values without each group.
        n: number of images of which it is the share.
    """
    values = torch.tensor(list(without), dtype=torch.float64)
    error = ((len(values) - 1) / len(values) * (values - values.mean()).square().sum()).sqrt().item()
    if error == 0:
        return of_share(share, n)
    return max(0.0, share - T * error), min(1.0, share + T * error)


def of_share(share: float, n: int) -> Interval:
    """Wilson's interval of a share of n independent images; not empty at 0 and 1."""
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def groups_of(n: int) -> Tensor:
    """The group of each of n images, int64 (n,): a fixed random partition into groups of equal size, up to one."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order % GROUPS
