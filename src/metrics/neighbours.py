"""Scores by balls around images: density and coverage, and the nearest neighbours on which they are based."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from src.metrics.features import FeatureExtractor
from src.metrics.score import FeatureSetScore, Split
from src.metrics.uncertainty import GROUPS, Interval, by_groups, by_influences, groups_of

PAIRS = 10**8
"""Distances that are held in memory at once; 8 bytes each."""
INSIDE = 1 - 1e-9
"""The balls are open; a distance in the other direction may differ in the last digits."""
SEARCHED = 16
"""Neighbours that are kept for each that is needed, so that some remain without a group of images."""


def distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Euclidean distances of a (n, d) to b (m, d), in blocks of rows of a."""
    for some in a.split(PAIRS // max(len(b), 1) + 1):
        yield torch.cdist(some, b)


def radii(points: Tensor, neighbours: int) -> Tensor:
    """The distance of each point (n, d) to its k-th neighbour among the others, shape (n,)."""
    return torch.cat([block.kthvalue(neighbours + 1).values for block in distances(points, points)])


def radii_without(points: Tensor, neighbours: int, groups: Tensor) -> Tensor:
    """As `radii`, without each group of points: shape (GROUPS, n). Those of the points of the group mean nothing."""
    parts = []
    for block in distances(points, points):
        near = block.topk(min(SEARCHED * (neighbours + 1), len(points)), largest=False)
        of = groups[near.indices]
        rows = []
        for group in range(GROUPS):
            place = (of != group).cumsum(1).gt(neighbours).int().argmax(1, keepdim=True)
            rows.append(near.values.gather(1, place).squeeze(1))
        parts.append(torch.stack(rows))
    return torch.cat(parts, dim=1)


def recall_without(generated: Tensor, reference: Tensor, neighbours: int) -> list[float]:
    """The recall of Kynkäänniemi et al. without each of `GROUPS` groups of generated images."""
    groups = groups_of(len(generated))
    balls = radii_without(generated, neighbours, groups)
    balls[groups == torch.arange(GROUPS)[:, None]] = -1
    found = torch.zeros(GROUPS, dtype=torch.int64)
    for block in distances(reference, generated):
        found += torch.stack([(block <= ball).any(dim=1).sum() for ball in balls])
    return (found / len(reference)).tolist()


class DensityCoverage(FeatureSetScore):
    """Density and coverage (Naeem et al. 2020, eq. 3 and 4, arXiv:2002.09797).

    With a ball around each reference image that reaches to its k-th neighbour among the reference images: density is
    the mean number of balls that hold a generated image, divided by k; 1 for the reference set itself, and not bounded.
    Coverage is the share of balls that hold a generated image. The names are `density_<features>` and
    `coverage_<features>`.

    Args:
        features: the feature space.
        neighbours: k.
        reference_split: the split of the data used as the reference.

    Raises:
        ValueError: neighbours is below 1.
    """

    higher_is_better = True

    def __init__(self, features: FeatureExtractor, neighbours: int = 5, reference_split: Split = "train"):
        if neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {neighbours}")
        name = f"density_{features.name}"
        super().__init__(name, features, reference_split, neighbours + 1, f"neighbours={neighbours}")
        self.neighbours = neighbours

    def settings(self) -> dict[str, Any]:
        return {"neighbours": self.neighbours}

    def compare(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
        made, real = self.feature_set(generated), self.feature_set(reference)
        balls = radii(real, self.neighbours) * INSIDE
        self._held = torch.cat([(block < balls).sum(1) for block in distances(made, real)]).double()
        self._held /= self.neighbours
        groups = groups_of(len(made))
        hits = torch.stack(
            [
                torch.cat([block.min(1).values for block in distances(real, made[groups == group])]) < balls
                if (groups == group).any()
                else torch.zeros(len(real), dtype=torch.bool)
                for group in range(GROUPS)
            ],
            dim=1,
        )
        self._hits = hits.int()
        space = self.features.name
        return {
            f"density_{space}": self._held.mean().item(),
            f"coverage_{space}": hits.any(1).double().mean().item(),
        }

    def influences(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> Tensor:
        made, real = self.vectors_of(generated).double().cpu(), self.feature_set(reference)
        balls = radii(real, self.neighbours) * INSIDE
        return torch.cat([(block < balls).sum(1) for block in distances(made, real)]) / self.neighbours

    def uncertainty(self, generated, reference, scores) -> dict[str, Interval]:
        density, coverage = scores
        count = self._hits.sum(1)
        without = [((count - self._hits[:, g]) > 0).double().mean().item() for g in range(GROUPS)]
        return {
            density: by_influences(scores[density], self._held),
            coverage: by_groups(scores[coverage], without, len(count)),
        }
