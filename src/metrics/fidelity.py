"""Scores of generated images, most of them distances to a reference set: the formulas."""

import logging
from typing import Any, Self

import torch
from torch import Tensor

from src.metrics.features import ClassifierFeatures, FeatureExtractor
from src.metrics.frechet import Comparison, Moments, Target, compare
from src.metrics.neighbours import PAIRS, distances, radii, recall_without
from src.metrics.score import ORDER, FeatureSetScore, FidelityScore, Reference, Split
from src.metrics.uncertainty import Interval, by_groups, by_influences, of_share

log = logging.getLogger(__name__)

KERNEL_SET = 5000
"""Images of each set to which the kernel distance's intervals compare the generated ones."""
KERNEL_ROWS = 2048
"""Generated images that are compared with them at once."""


class FrechetDistance(FeatureSetScore):
    """Fréchet distance of Gaussians fitted to the features; with InceptionV3 this is FID (Heusel et al. 2017).

    The name is "fid" for InceptionV3 and `fd_<features>` for other spaces, whose values have another scale.
    Sums are float64. The estimate is biased upwards by about 1/n, so compare equal numbers of images. The matrix root
    is computed in two ways, which must agree (`src.metrics.frechet.compare`).

    The reference may also be given as its moments: "mean" and "covariance" instead of sums.

    Args:
        features: the feature space.
        reference_split: the split of the data used as the reference.
    """

    generated_only = frozenset({"vectors", "numbers"})

    def __init__(self, features: FeatureExtractor, reference_split: Split = "train"):
        name = "fid" if features.name == "inception" else f"fd_{features.name}"
        super().__init__(name, features, reference_split, 2, "")
        size = features.num_features
        self.add_state("total", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx="sum")
        self.always_keep = False
        self._target: Target | None = None
        self._comparison: Comparison | None = None

    def of_class(self, label: int) -> Self:
        """See `FidelityScore`; fewer images than features, whose covariance is singular, are refused."""
        score = super().of_class(label)
        score.smallest, score.because = (
            self.features.num_features + 1,
            f"{self.features.num_features} features",
        )
        return score

    def accumulate(self, features: Tensor) -> None:
        if (self.with_intervals or self.always_keep) and not self.of_reference:
            super().accumulate(features)
        features = features.double()
        self.total += features.sum(0)
        self.outer += features.T @ features

    def set_reference(self, reference: Reference, states: dict[str, Tensor]) -> None:
        super().set_reference(reference, states)
        self._target = None

    def compare(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
        made = _moments(generated)
        if self._target is None or self._target.moments.mean.device != made.mean.device:
            self._target = Target.of(_moments(reference))  # once for all scores of a training
        self._comparison = compare(made, self._target, directions=self.with_intervals)
        self._warn(int(generated["count"]), int(reference["count"]))
        return {self.name: self._comparison.distance}

    def _warn(self, generated: int, reference: int) -> None:
        size = self.features.num_features
        ranks = (
            ("generated", generated, self._comparison.rank),
            ("reference", reference, self._comparison.target.rank),
        )
        for whose, count, rank in ranks:
            if rank < size:
                self.warnings.append(
                    f"{self.name}: the covariance of the {whose} images has rank {rank} of {size}"
                    + (f" ({count} images)" if count else "")
                )
        counts = [count for _, count, _ in ranks if count]  # published statistics have none
        if min(counts) <= size:
            log.warning(
                "%s: %d images in a space of %d features make the covariance singular; the score is far too high",
                self.name,
                min(counts),
                size,
            )

    def influences(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> Tensor:
        return self._comparison.influences(self.vectors_of(generated))

    def uncertainty(self, generated, reference, scores) -> dict[str, Interval]:
        return {self.name: by_influences(scores[self.name], self.influences(generated, reference))}


def _moments(states: dict[str, Tensor]) -> Moments:
    if "covariance" in states:
        return Moments(states["mean"], states["covariance"])
    return Moments.of_sums(states["count"], states["total"], states["outer"])


class KernelDistance(FeatureSetScore):
    """Squared maximum mean discrepancy with the kernel (x.y/d + 1)^3; KID (Bińkowski et al. 2018).

    Mean and standard deviation of the unbiased estimate over random subsets, computed by torch-fidelity. Unlike FID,
    its expectation does not depend on the number of images; it may be slightly negative. The name is "kid" for
    InceptionV3 and `kd_<features>` for other spaces.

    Args:
        features: the feature space.
        subset_size: images per subset, drawn from each set without replacement; 1,000 in the paper's KID.
        subsets: number of subsets.
        seed: seed of the draws.
        reference_split: the split of the data used as the reference.

    Raises:
        ValueError: subset_size is below 2, or subsets is below 1.
    """

    def __init__(
        self,
        features: FeatureExtractor,
        subset_size: int,
        subsets: int = 100,
        seed: int = 2020,
        reference_split: Split = "train",
    ):
        if subset_size < 2:
            raise ValueError(f"subset_size must be at least 2, got {subset_size}")
        if subsets < 1:
            raise ValueError(f"subsets must be at least 1, got {subsets}")
        name = "kid" if features.name == "inception" else f"kd_{features.name}"
        super().__init__(name, features, reference_split, subset_size, f"subset_size={subset_size}")
        self.subsets = subsets
        self.subset_size = subset_size
        self.seed = seed

    def settings(self) -> dict[str, Any]:
        return {
            "kernel": "(x.y/d + 1)^3",
            "subsets": self.subsets,
            "subset_size": self.subset_size,
            "seed": self.seed,
            "drawn_from": ORDER,
        }

    def compare(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
        from torch_fidelity.metric_kid import kid_features_to_metric

        result = kid_features_to_metric(
            self.feature_set(generated),
            self.feature_set(reference),
            kid_subsets=self.subsets,
            kid_subset_size=self.subset_size,
            rng_seed=self.seed,
            verbose=False,
        )
        return {
            self.name: result["kernel_inception_distance_mean"],
            f"{self.name}_std": result["kernel_inception_distance_std"],
        }

    def influences(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> Tensor:
        """See `FidelityScore`: 2 (mean of k(x, other generated images) - mean of k(x, reference images)).

        The means are over at most `KERNEL_SET` images of each set.
        """
        made, real = self.vectors_of(generated).double().cpu(), self.feature_set(reference)
        generator = torch.Generator().manual_seed(self.seed)
        others, fixed = (
            torch.randperm(len(one), generator=generator)[:KERNEL_SET].sort().values for one in (made, real)
        )
        size = self.features.num_features

        def sums(points: Tensor) -> Tensor:
            """The sum of the kernel of each generated image with these; few rows at a time are in memory."""
            return torch.cat([((rows @ points.T / size + 1) ** 3).sum(1) for rows in made.split(KERNEL_ROWS)])

        own = torch.zeros(len(made), dtype=torch.bool).index_fill_(0, others, True)
        among = sums(made[others]) - own * (made.square().sum(1) / size + 1) ** 3
        return 2 * (among / (len(others) - own.long()) - sums(real[fixed]) / len(fixed))

    def uncertainty(self, generated, reference, scores) -> dict[str, Interval]:
        value, deviation = scores.values()
        drawn = deviation / self.subsets**0.5  # subsets of the same images differ
        return {self.name: by_influences(value, self.influences(generated, reference), drawn)}


class PrecisionRecall(FeatureSetScore):
    """Improved precision and recall (Kynkäänniemi et al. 2019), computed by torch-fidelity.

    Precision: the fraction of generated images that are nearer to some reference image than that image's k-th
    neighbour in the reference. Recall: the same with the sets exchanged. The names are `precision_<features>` and
    `recall_<features>`; the paper uses VGG-16 features.

    Args:
        features: the feature space.
        neighbours: k.
        reference_split: the split of the data used as the reference.

    Raises:
        ValueError: neighbours is below 1.
    """

    higher_is_better = True

    def __init__(self, features: FeatureExtractor, neighbours: int = 3, reference_split: Split = "train"):
        if neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {neighbours}")
        name = f"precision_{features.name}"
        super().__init__(name, features, reference_split, neighbours + 1, f"neighbours={neighbours}")
        self.neighbours = neighbours

    def settings(self) -> dict[str, Any]:
        return {"neighbours": self.neighbours}

    def compare(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
        from torch_fidelity.metric_prc import prc_features_to_metric

        result = prc_features_to_metric(
            self.feature_set(generated),
            self.feature_set(reference),
            prc_neighborhood=self.neighbours,
            prc_batch_size=PAIRS // max(int(generated["count"]), int(reference["count"])) + 1,
            save_cpu_ram=True,
            verbose=False,
        )
        space = self.features.name
        return {f"precision_{space}": result["precision"], f"recall_{space}": result["recall"]}

    def influences(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> Tensor:
        made, real = (self.vectors_of(states).double().cpu() for states in (generated, reference))
        balls = radii(real, self.neighbours)
        return torch.cat([(block <= balls).any(1) for block in distances(made, real)]).double()

    def uncertainty(self, generated, reference, scores) -> dict[str, Interval]:
        (precision, share), (recall, found) = scores.items()
        made, real = self.feature_set(generated), self.feature_set(reference)
        return {
            precision: of_share(share, len(made)),
            recall: by_groups(found, recall_without(made, real, self.neighbours), len(real)),
        }


class InceptionScore(FeatureSetScore):
    """Inception Score (Salimans et al. 2016), computed by torch-fidelity: exp of the mean KL(p(y|x) || p(y)).

    It uses InceptionV3's logits of the generated images and no reference set.

    Args:
        features: `InceptionFeatures` with layer "logits_unbiased".
        splits: number of subsets; `compute` returns the mean and standard deviation over them.
        seed: seed of the random split.

    Raises:
        ValueError: the features are not these logits, or splits is below 1.
    """

    higher_is_better = True
    needs_reference = False

    def __init__(self, features: FeatureExtractor, splits: int = 10, seed: int = 2020):
        if features.name != "inception_logits_unbiased":
            raise ValueError(
                f"features={features.name!r}: the Inception Score needs InceptionV3's logits; "
                "set features.layer=logits_unbiased"
            )
        if splits < 1:
            raise ValueError(f"splits must be at least 1, got {splits}")
        super().__init__("inception_score", features, "none", splits, f"splits={splits}")
        self.splits = splits
        self.seed = seed

    def settings(self) -> dict[str, Any]:
        return {"splits": self.splits, "seed": self.seed, "drawn_from": ORDER}

    def compare(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
        from torch_fidelity.metric_isc import isc_features_to_metric

        result = isc_features_to_metric(self.feature_set(generated), self.splits, rng_seed=self.seed)
        return {
            self.name: result["inception_score_mean"],
            f"{self.name}_std": result["inception_score_std"],
        }

    def influences(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> Tensor:
        """See `FidelityScore`: the score times KL(p(y|x) || p(y)), which is its differential."""
        logits = self.vectors_of(generated).double()
        log_p = logits.log_softmax(dim=1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(0).log())).sum(1)
        return (divergence.mean().exp() * divergence).cpu()

    def uncertainty(self, generated, reference, scores) -> dict[str, Interval]:
        return {self.name: by_influences(scores[self.name], self.influences(generated, reference))}


class Accuracy(FidelityScore):
    """The share of images whose class, predicted by a classifier, is the class on which they were conditioned.

    It measures how well a network follows its condition, and says nothing about the variety of its images. The name is
    `accuracy_<features>`. It uses no reference set.

    Args:
        features: the features of the classifier.
    """

    higher_is_better = True
    needs_reference = False
    needs_labels = True

    def __init__(self, features: ClassifierFeatures):
        super().__init__(f"accuracy_{features.name}", features, "none")
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")

    def accumulate(self, features: Tensor, labels: Tensor) -> None:
        """Adds features (B, num_features) of images with these labels, int64 (B,)."""
        self.correct += (self.features.logits(features).argmax(dim=1) == labels).sum()

    def compare(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
        return {self.name: int(generated["correct"]) / int(generated["count"])}

    def uncertainty(self, generated, reference, scores) -> dict[str, Interval]:
        return {self.name: of_share(scores[self.name], int(generated["count"]))}
