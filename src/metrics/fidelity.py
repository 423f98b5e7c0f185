"""Scores of generated images, most of them distances to a reference set: the formulas."""

import logging
from typing import Any, Literal, Self

import torch
from torch import Tensor

from src.metrics.features import ClassifierFeatures, FeatureExtractor
from src.metrics.frechet import Moments, frechet_distance
from src.metrics.score import FidelityScore

log = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]


class FrechetDistance(FidelityScore):
    """Fréchet distance of Gaussians fitted to the features; with InceptionV3 this is FID (Heusel et al. 2017).

    The name is "fid" for InceptionV3 and `fd_<features>` for other spaces, whose values have another scale.
    Sums are float64. The estimate is biased upwards by about 1/n, so compare equal numbers of images.

    Args:
        features: the feature space.
        reference_split: the split of the data used as the reference.
    """

    def __init__(self, features: FeatureExtractor, reference_split: Split = "train"):
        name = "fid" if features.name == "inception" else f"fd_{features.name}"
        super().__init__(name, features, reference_split)
        size = features.num_features
        self.add_state("total", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx="sum")

    def of_class(self, label: int) -> Self:
        """See `FidelityScore`; fewer images than features, whose covariance is singular, are refused."""
        score = super().of_class(label)
        score.smallest, score.because = (
            self.features.num_features + 1,
            f"{self.features.num_features} features",
        )
        return score

    def accumulate(self, features: Tensor) -> None:
        features = features.double()
        self.total += features.sum(0)
        self.outer += features.T @ features

    def compare(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
        fewest = min(int(generated["count"]), int(reference["count"]))
        if fewest <= self.features.num_features:
            log.warning(
                "%s: %d images in a space of %d features make the covariance singular; the score is far too high",
                self.name,
                fewest,
                self.features.num_features,
            )
        return {self.name: frechet_distance(Moments.of_sums(**generated), Moments.of_sums(**reference))}


class FeatureSetScore(FidelityScore):
    """A score that needs all feature vectors, not only sums; it stores num_images x num_features floats.

    The sets are sorted before they are compared, so that random draws from them do not depend on the order of
    the images or on which rank made them.

    Args:
        name, features, reference_split, smallest, because: see `FidelityScore`.
    """

    def __init__(
        self, name: str, features: FeatureExtractor, reference_split: str, smallest: int, because: str
    ):
        super().__init__(name, features, reference_split, smallest, because)
        # flat, because torchmetrics gathers one-dimensional empty tensors from ranks without images
        self.add_state("vectors", [], dist_reduce_fx="cat")

    def accumulate(self, features: Tensor) -> None:
        self.vectors.append(features.flatten())

    def feature_set(self, states: dict[str, Tensor]) -> Tensor:
        """The features (n, num_features), float64 on the CPU, in lexicographic order."""
        vectors = states["vectors"].reshape(-1, self.features.num_features).double().cpu()
        distinct, counts = vectors.unique(dim=0, return_counts=True)
        return distinct.repeat_interleave(counts, dim=0)


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


# Distances that are held in memory at once; 8 bytes or less each.
PAIRS = 10**8


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
        return {"splits": self.splits, "seed": self.seed}

    def compare(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
        from torch_fidelity.metric_isc import isc_features_to_metric

        result = isc_features_to_metric(self.feature_set(generated), self.splits, rng_seed=self.seed)
        return {
            self.name: result["inception_score_mean"],
            f"{self.name}_std": result["inception_score_std"],
        }


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
