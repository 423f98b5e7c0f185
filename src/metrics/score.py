"""The base of scores of generated images, as torchmetrics `Metric`s.

A score keeps sums or features of the generated images per process; `compute` combines them over the ranks. The states
of the reference set are already combined over the ranks when `set_reference` receives them, and each rank holds a copy.
`src.evaluation.scores` computes them and `src.evaluation.reference` caches them.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torchmetrics import Metric

from src.errors import TooFewImages, UserError
from src.metrics.features import FeatureExtractor
from src.metrics.uncertainty import Interval

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Reference:
    """A description of the set that generated images are compared with.

    Attributes:
        data: name of the data set.
        split: name of the split.
        count: number of images, over all ranks.
        fingerprint: hash of the split's content; of the images of one class, followed by the class.
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
        needs_labels: True for a score of the classes on which the images were conditioned; `accumulate` then gets
            `labels`, int64 (B,), too.
        generated_only: names of states that the reference does not need.
        with_intervals: whether `compute` also finds intervals; set it before `update`.
        of_reference: whether the images that are added are those of the reference.
        intervals: the 95 % intervals of the last `compute` by name; of scores that have one.
        warnings: what the last `compute` found doubtful, one line each.
        label: the class of the images, for a score of one class; see `of_class`.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = False
    needs_reference = True
    needs_labels = False
    generated_only: frozenset[str] = frozenset()

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
        self.label: int | None = None
        self.reference: Reference | None = None
        self.num_images = 0
        self.with_intervals = False
        self.of_reference = False
        self.intervals: dict[str, Interval] = {}
        self.warnings: list[str] = []
        self._reference_states: dict[str, Tensor] = {}
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    @property
    def state_names(self) -> list[str]:
        """The names of the states, sorted."""
        return sorted(self._defaults)

    @property
    def reference_states(self) -> dict[str, Tensor]:
        """The states of the reference by name, on the score's device."""
        return {name: tensor.to(self.device) for name, tensor in self._reference_states.items()}

    @property
    def reference_names(self) -> list[str]:
        """The names of the states of the reference, sorted."""
        return [name for name in self.state_names if name not in self.generated_only]

    def settings(self) -> dict[str, Any]:
        """The settings of the score, for the protocol."""
        return {}

    def of_class(self, label: int) -> Self:
        """A copy with the same feature network, for the images of one class; call it before `set_reference`.

        `compute` of a copy without images returns no scores.
        """
        score = copy.deepcopy(self, {id(self.features): self.features})
        score.label = label
        return score

    def accumulate(self, features: Tensor) -> None:
        """Adds features (B, num_features), float32, to the states."""
        raise NotImplementedError

    def compare(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
        """The score, from the states of both sets over all ranks."""
        raise NotImplementedError

    def influences(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> Tensor | None:
        """The first-order effect of each generated image on the first score that `compare` has just found.

        Returns:
            float64 (n,), up to a constant, in the order in which the images were added; None where there is none. Two
            sets made from the same noise can be compared image by image.
        """
        return None

    def uncertainty(
        self, generated: dict[str, Tensor], reference: dict[str, Tensor], scores: dict[str, float]
    ) -> dict[str, Interval]:
        """The 95 % intervals of the scores that `compare` has just found, by name; see `src.metrics.uncertainty`."""
        return {}

    def update(
        self,
        images: Tensor | None,
        features: Tensor | None = None,
        labels: Tensor | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Adds images.

        Args:
            images: uint8 (B, C, H, W), on the score's device; None with features.
            features: features of these images (B, num_features), if already computed.
            labels: classes on which the images were conditioned, int64 (B,), on any device; for scores that need them.
            numbers: places of the B images in the whole set, over all ranks; for scores that draw from it. By default
                they follow the images that were added before.
        """
        features = self.features(images) if features is None else features
        if self.needs_labels:
            self.accumulate(features, labels.to(features.device, non_blocking=True))
        else:
            self.accumulate(features)
        self.count += len(features)

    def compute(self) -> dict[str, float]:
        """The scores of all images since `reset`, over all ranks; the same on each rank.

        Raises:
            UserError: there are too few images or no reference, or the features or a score are not finite.
        """
        if self.needs_reference and self.reference is None:
            raise UserError(f"{self.name}: no reference set; call set_reference before compute")
        generated = self.states("the generated set")
        if self.label is not None and not int(generated["count"]):
            self.num_images, self.warnings, self.intervals = 0, [], {}
            return {}
        self.check_count(int(generated["count"]), "the generated set")
        reference = self.reference_states
        self.num_images = int(generated["count"])
        self.warnings, self.intervals = [], {}
        scores = self.compare(generated, reference)
        for name, value in scores.items():
            if not math.isfinite(value):
                raise UserError(f"{name}{self._of_class} is {value} over {self.num_images} images")
        self.intervals = self.uncertainty(generated, reference, scores) if self.with_intervals else {}
        return scores

    def check_count(self, count: int, whose: str) -> None:
        """Checks the size of a set of images.

        Args:
            count: number of images.
            whose: name of the set for messages, e.g. "the generated set".

        Raises:
            TooFewImages: the set is too small.
        """
        if count < self.smallest:
            because = f" ({self.because})" if self.because else ""
            raise TooFewImages(
                f"{self.name}{self._of_class} needs at least {self.smallest} images{because}, but {whose} has {count}"
            )

    @property
    def _of_class(self) -> str:
        return "" if self.label is None else f" of class {self.label}"

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
                raise UserError(
                    f"{self.name}: features {self.features.name!r} of {whose} are not finite; check"
                    " metrics.features.weights, or choose other metrics"
                )
        return states


ORDER = "the images in their order"
"""What random subsets are drawn from, in the settings of scores; earlier versions sorted the features."""


class FeatureSetScore(FidelityScore):
    """A score that needs all feature vectors, not only sums; it stores num_images x num_features floats.

    The sets are brought into the order of the images' numbers before they are compared, so that random draws from them
    are those of torch-fidelity and do not depend on which rank made which images.

    Args:
        name, features, reference_split, smallest, because: see `FidelityScore`.
    """

    def __init__(
        self, name: str, features: FeatureExtractor, reference_split: str, smallest: int, because: str
    ):
        super().__init__(name, features, reference_split, smallest, because)
        # flat, because torchmetrics gathers one-dimensional empty tensors from ranks without images
        self.add_state("vectors", [], dist_reduce_fx="cat")
        # of the type of torchmetrics' empty tensors; exact up to 2^24 images
        self.add_state("numbers", [], dist_reduce_fx="cat")

    def update(self, images, features=None, labels=None, numbers=None):
        """See `FidelityScore`."""
        before = len(self.vectors)
        super().update(images, features, labels, numbers)
        if len(self.vectors) > before:
            added = len(self.vectors[-1]) // self.features.num_features
            first = sum(len(each) for each in self.numbers)
            places = range(first, first + added) if numbers is None else numbers
            self.numbers.append(torch.tensor(places, dtype=torch.float32).to(self.device, non_blocking=True))

    def accumulate(self, features: Tensor) -> None:
        self.vectors.append(features.flatten())

    def vectors_of(self, states: dict[str, Tensor]) -> Tensor:
        """The features (n, num_features), float32, as they were added."""
        return states["vectors"].reshape(-1, self.features.num_features)

    def feature_set(self, states: dict[str, Tensor]) -> Tensor:
        """The features (n, num_features), float64 on the CPU, in the order of the images' numbers."""
        return self.vectors_of(states).double().cpu()[states["numbers"].cpu().argsort(stable=True)]
