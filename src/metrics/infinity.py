"""The Fréchet distance that infinitely many generated images would have."""

import math
from typing import Any

import torch
from torch import Tensor

from src.metrics.features import FeatureExtractor
from src.metrics.fidelity import FrechetDistance
from src.metrics.frechet import Moments, compare
from src.metrics.score import ORDER, Split
from src.metrics.uncertainty import Interval, by_influences


class FrechetInfinity(FrechetDistance):
    """FID-infinity (Chong & Forsyth 2020, sec. 4, arXiv:1911.07023), here with ordinary random images.

    The distance of N generated images is too large by about c / N, with c that depends on the generator, so that
    generators cannot be compared at one N. It is computed for random subsets of several sizes, and the line through it
    as a function of 1 / N is extended to 1 / N = 0. The reference set is taken as it is. The names are `fid_infinity`
    and `fd_<features>_infinity`.

    Terms of higher order in 1 / N remain, and matter for few images: with 4 features and a perfect generator, 600
    images have the distance 3.8 and are extended to -1.1 (mean of 150 seeds), 3,000 images 0.76 and 0.12.

    Args:
        features: the feature space.
        reference_split: the split of the data used as the reference.
        points: number of sizes; 15 in the paper.
        smallest_share: the smallest size as a share of all images; 0.1 in the paper. It must exceed the number of
            features, below which the line is none.
        seed: seed of the subsets.

    Raises:
        ValueError: points is below 3, or smallest_share is not in (0, 1).
    """

    def __init__(
        self,
        features: FeatureExtractor,
        reference_split: Split = "train",
        points: int = 15,
        smallest_share: float = 0.1,
        seed: int = 2020,
    ):
        if points < 3:
            raise ValueError(f"points must be at least 3, got {points}")
        if not 0 < smallest_share < 1:
            raise ValueError(f"smallest_share must be in (0, 1), got {smallest_share}")
        super().__init__(features, reference_split)
        self.name = f"{self.name}_infinity"
        self.points, self.smallest_share, self.seed = points, smallest_share, seed
        self.smallest = math.ceil((features.num_features + 1) / smallest_share)
        self.because = f"{features.num_features} features, smallest_share={smallest_share:g}"
        self.always_keep = True

    def settings(self) -> dict[str, Any]:
        return {
            "points": self.points,
            "smallest_share": self.smallest_share,
            "seed": self.seed,
            "drawn_from": ORDER,
        }

    def of_class(self, label: int):
        smallest, because = self.smallest, self.because
        score = super().of_class(label)
        score.smallest, score.because = smallest, because
        return score

    def compare(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
        super().compare(generated, reference)  # of all images: warnings, and the effect of each image
        features = self.feature_set(generated)
        n = len(features)
        generator = torch.Generator().manual_seed(self.seed)
        sizes = torch.linspace(self.smallest_share * n, n, self.points, dtype=torch.float64).round().long()
        values = []
        for size in sizes[:-1].tolist():
            some = features[torch.randperm(n, generator=generator)[:size]]
            moments = Moments(some.mean(0), torch.cov(some.T))
            values.append(compare(moments.to(self._target.moments.mean.device), self._target).distance)
        values.append(self._comparison.distance)
        x, y = 1 / sizes.double(), torch.tensor(values, dtype=torch.float64)
        deviations = x - x.mean()
        slope = (deviations * y).sum() / deviations.square().sum()
        intercept = y.mean() - slope * x.mean()
        residual = (y - intercept - slope * x).square().sum() / (self.points - 2)
        self._fit_error = (
            (residual * (1 / self.points + x.mean() ** 2 / deviations.square().sum())).sqrt().item()
        )
        return {self.name: intercept.item()}

    def uncertainty(self, generated, reference, scores) -> dict[str, Interval]:
        effects = self.influences(generated, reference)
        return {self.name: by_influences(scores[self.name], effects, self._fit_error)}
