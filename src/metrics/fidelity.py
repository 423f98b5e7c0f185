"""Distances between generated images and a reference set: the formulas, as torchmetrics `Metric`s.

A score keeps sums or features of the generated images per process; `compute` combines them over the ranks. The states
of the reference set are already combined over the ranks when `set_reference` receives them, and each rank holds a copy.
`src.evaluation.scores` computes them and `src.evaluation.reference` caches them.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from src.errors import UserError
from src.metrics.features import FeatureExtractor
from src.metrics.frechet import Moments, frechet_distance

log = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Reference:
    """A description of the set that generated images are compared with.

    Attributes:
        data: name of the data set.
        split: name of the split.
        count: number of images, over all ranks.
        fingerprint: hash of the split's content.
    """

    data: str
    split: str
    count: int
    fingerprint: str


class FidelityScore(Metric):
    """A quality score of a set of generated images, usually its distance to a reference set.

    Usage: `set_reference` once, then `update` with each rank's generated images, and `compute`. `reset` drops
    the generated images and keeps the reference. `src.evaluation.scores.ScoreSet` does this for several scores and
    computes the references.

    Subclasses add states with `add_state`, fill them from features in `accumulate`, and compare the states of the
    generated images with those of the reference in `compare`. Over the ranks, states with the reduction "sum" are
    added and those with "cat" are concatenated.

    Args:
        name: key of the monitored number in the result of `compute`; contains the name of the feature space.
        features: the feature space.
        reference_split: the split of the data used as the reference; the papers use the training set.
        smallest: minimum number of images of the generated set and of the reference.
        because: the option that sets `smallest`, with its value, for messages.

    Attributes:
        num_images: number of generated images in the last `compute`, over all ranks.
        reference: the reference set in use; None before `set_reference`.
        needs_reference: False for a score of the generated images only.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = False
    needs_reference = True

    def __init__(
        self,
        name: str,
        features: FeatureExtractor,
        reference_split: str,
        smallest: int = 2,
        because: str = "",
    ):
        super().__init__()
        self.name = name
        self.features = features
        self.reference_split = reference_split
        self.smallest = max(smallest, 2)
        self.because = because
        self.reference: Reference | None = None
        self.num_images = 0
        self._reference_states: dict[str, Tensor] = {}
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    @property
    def state_names(self) -> list[str]:
        """The names of the states, sorted."""
        return sorted(self._defaults)

    def settings(self) -> dict[str, Any]:
        """The settings of the score, for the protocol."""
        return {}

    def accumulate(self, features: Tensor) -> None:
        """Adds features (B, num_features), float32, to the states."""
        raise NotImplementedError

    def compare(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
        """The score, from the states of both sets over all ranks."""
        raise NotImplementedError

    def update(self, images: Tensor, features: Tensor | None = None) -> None:
        """Adds images.

        Args:
            images: uint8 (B, C, H, W), on the score's device.
            features: features of these images (B, num_features), if already computed.
        """
        self.accumulate(self.features(images) if features is None else features)
        self.count += len(images)

    def compute(self) -> dict[str, float]:
        """The scores of all images since `reset`, over all ranks; the same on each rank.

        Raises:
            UserError: there are too few images or no reference, or the features or a score are not finite.
        """
        if self.needs_reference and self.reference is None:
            raise UserError(f"{self.name}: no reference set; call set_reference before compute")
        generated = self.states("the generated set")
        self.check_count(int(generated["count"]), "the generated set")
        reference = {name: tensor.to(self.device) for name, tensor in self._reference_states.items()}
        self.num_images = int(generated["count"])
        scores = self.compare(generated, reference)
        for name, value in scores.items():
            if not math.isfinite(value):
                raise UserError(f"{name} is {value} over {self.num_images} images")
        return scores

    def check_count(self, count: int, whose: str) -> None:
        """Checks the size of a set of images.

        Args:
            count: number of images.
            whose: name of the set for messages, e.g. "the generated set".

        Raises:
            UserError: the set is too small.
        """
        if count < self.smallest:
            because = f" ({self.because})" if self.because else ""
            raise UserError(
                f"{self.name} needs at least {self.smallest} images{because}, but {whose} has {count}"
            )

    def set_reference(self, reference: Reference, states: dict[str, Tensor]) -> None:
        """Sets the reference.

        Args:
            reference: the description of the set.
            states: the states of the score after `update` with all images of the set, over all ranks.

        Raises:
            ValueError: the split is not `reference_split`, or the states are not of `reference.count` images.
        """
        if reference.split != self.reference_split:
            raise ValueError(
                f"reference is the split {reference.split!r}, {self.name} uses {self.reference_split!r}"
            )
        if int(states["count"]) != reference.count:
            raise ValueError(
                f"reference has {reference.count} images, but {self.name} saw {int(states['count'])}: each rank"
                " must read its share of the set"
            )
        self.reference = reference
        self._reference_states = states

    def states(self, whose: str) -> dict[str, Tensor]:
        """Copies of the states by name: over all ranks in `sync_context` and `compute`, otherwise of this rank.

        Args:
            whose: name of the set for messages, e.g. "the generated set".

        Raises:
            UserError: the features are not finite.
        """
        states = {}
        for name in self._defaults:
            value = getattr(self, name)
            if isinstance(value, list):
                states[name] = torch.cat(value) if value else torch.zeros(0, device=self.device)
            else:
                states[name] = value.clone()
            if not states[name].isfinite().all():
                raise UserError(f"{self.name}: features {self.features.name!r} of {whose} are not finite")
        return states


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
