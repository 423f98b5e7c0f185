"""Distances between generated images and a reference set.

A score is a torchmetrics `Metric`: its sums over the generated images are kept per process and added over
the ranks in `compute`. The reference is no such state: each rank reads its share of it once
(`set_reference`), the sums are added, and all ranks hold the result: it is never counted once per rank.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics import Metric
from tqdm import tqdm

from src.errors import UserError
from src.metrics.features import FeatureExtractor

log = logging.getLogger(__name__)

CACHE_FORMAT = 1
"""Part of every cache key; to be raised when the stored statistics change their meaning."""


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d, divided by n - 1) of features, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of_sums(cls, count: Tensor, total: Tensor, outer: Tensor) -> "Moments":
        """From n, sum f and sum f f^T over n >= 2 feature vectors f."""
        mean = total / count
        return cls(mean, (outer - count * torch.outer(mean, mean)) / (count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

        |mean_a - mean_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a^(1/2) C_b C_a^(1/2))^(1/2))

    The symmetric form needs eigenvalues of symmetric matrices only, so singular covariances (fewer images
    than features) are no special case.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ b.covariance @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return distance.item()


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with.

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


def shares(images: Any, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Tensor]:
    """This rank's share of an image set, in uint8 batches: images rank, rank + world_size, ...

    Args:
        images: has a length and `images(indices) -> uint8 (n, C, H, W)`.
        batch_size: largest batch.
    """
    indices = torch.arange(len(images))[rank::world_size]
    for start in range(0, len(indices), batch_size):
        yield images.images(indices[start : start + batch_size])


class FidelityScore(Metric):
    """A number that says how good a set of generated images is, mostly by its distance to a reference set.

    Use: `set_reference` once, then `update` with each rank's generated images and `compute`; `reset` forgets
    the generated images and keeps the reference. `compute` returns the same dict of floats on all ranks.

    Subclasses add states with `add_state`, fill them from features in `accumulate`, and compare two sets of
    states, the generated images' and the reference's, in `compare`. States whose reduction is "sum" are added
    over the ranks, those with "cat" are concatenated.

    Args:
        features: the feature space.
        reference_split: which split of the data is the reference; the papers use the whole training set.

    Attributes:
        name: key of the number to monitor in what `compute` returns. It says the feature space.
        num_images: number of generated images in the last `compute`, over all ranks.
        reference: what `set_reference` was given, or None.
        needs_reference: False for a score of the generated images alone.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = False
    needs_reference = True

    def __init__(self, name: str, features: FeatureExtractor, reference_split: str):
        super().__init__()
        self.name = name
        self.features = features
        self.reference_split = reference_split
        self.reference: Reference | None = None
        self.num_images = 0
        self._reference_states: dict[str, Tensor] = {}
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def settings(self) -> dict[str, Any]:
        """Numbers that the score depends on besides images and features, for the protocol."""
        return {}

    def accumulate(self, features: Tensor) -> None:
        """Take features (B, num_features) into the states."""
        raise NotImplementedError

    def compare(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
        """The score of two sets of states, both over all ranks."""
        raise NotImplementedError

    def update(self, images: Tensor) -> None:
        """Take in generated images, uint8 (B, C, H, W), on the score's device."""
        self.accumulate(self.features(images))
        self.count += len(images)

    def compute(self) -> dict[str, float]:
        """The score of all images since `reset`, over all ranks.

        Raises:
            UserError: fewer than two images, no reference, or features that are not finite.
        """
        if self.needs_reference and self.reference is None:
            raise UserError(f"{self.name}: no reference set; call set_reference before compute")
        generated = self._states(f"{self.name}: generated images")
        reference = {name: tensor.to(self.device) for name, tensor in self._reference_states.items()}
        self.num_images = int(generated["count"])
        scores = self.compare(generated, reference)
        for name, value in scores.items():
            if not torch.tensor(value).isfinite():
                raise UserError(f"{name} is {value} over {self.num_images} images: no score was kept")
        return scores

    def set_reference(
        self, batches: Iterable[Tensor], reference: Reference, cache_dir: str | Path | None = None
    ) -> None:
        """Learn the reference set, or read what was learned before. All ranks call it.

        Generated images taken in before are dropped.

        The cache is keyed by the hash of the data, the hash of the weights, split and count: another set, or
        another network, is never taken for this one.

        Args:
            batches: this rank's share of the reference images, uint8 (B, C, H, W); see `shares`. Read only
                when the cache does not have them.
            reference: says what `batches` are.
            cache_dir: folder of the cached statistics; None keeps nothing.

        Raises:
            ValueError: the wrong split, or the ranks' shares together are not `reference.count` images.
        """
        if reference.split != self.reference_split:
            raise ValueError(
                f"{self.name} compares with the split {self.reference_split!r}, not {reference.split!r}"
            )
        key = {
            "format": CACHE_FORMAT,
            "states": sorted(self._defaults),
            "features": self.features.name,
            "weights": self.features.sha256,
            **asdict(reference),
        }
        path = None
        if cache_dir is not None:
            digest = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
            name = f"{reference.data}-{reference.split}-{self.features.name}-{digest[:16]}.safetensors"
            path = Path(cache_dir).expanduser() / name

        states = _from_rank_zero(_read_cache(path, key) if path and _rank() == 0 else None)
        if states is None:
            self.reset()
            for batch in tqdm(batches, desc=f"{self.name}: reference", delay=2, disable=_rank() > 0):
                self.update(batch.to(self.device))
            with self.sync_context(should_sync=_world_size() > 1):
                states = {name: t.cpu() for name, t in self._states(f"{self.name}: reference").items()}
            self.reset()
            if int(states["count"]) != reference.count:
                raise ValueError(
                    f"{self.name}: the reference was said to have {reference.count} images, but "
                    f"{int(states['count'])} came from {_world_size()} ranks: does each give its share only?"
                )
            if path and _rank() == 0:
                _write_cache(path, key, states)
        self._reference_states = states
        self.reference = reference

    def _states(self, whose: str) -> dict[str, Tensor]:
        if int(self.count) < 2:
            raise UserError(f"{whose}: a score needs at least 2 images, not {int(self.count)}")
        states = {}
        for name in self._defaults:
            value = getattr(self, name)
            states[name] = torch.cat(value) if isinstance(value, list) else value.clone()
            if not states[name].isfinite().all():
                raise UserError(f"{whose}: features of {self.features.name!r} are not finite")
        return states


class FrechetDistance(FidelityScore):
    """Fréchet distance of the features' Gaussians: FID (Heusel et al. 2017) if they are InceptionV3's.

    Its name is "fid" for InceptionV3 and `fd_<features>` for any other space, which has another scale.
    Sums are float64. The estimate is biased upwards by about 1/n: compare equal numbers of images.

    Args:
        features: the feature space.
        reference_split: which split of the data is the reference.
    """

    def __init__(self, features: FeatureExtractor, reference_split: str = "train"):
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
                "%s: %d images in a space of %d features leave the covariance singular; the score is far too high",
                self.name,
                fewest,
                self.features.num_features,
            )
        return {self.name: frechet_distance(Moments.of_sums(**generated), Moments.of_sums(**reference))}


class FeatureSetScore(FidelityScore):
    """A score that needs every feature vector, not only sums: it holds num_images x num_features floats.

    The sets are put in an order of their own before they are compared, so that what is drawn from them does
    not depend on how the images were dealt out to the ranks.
    """

    def __init__(self, name: str, features: FeatureExtractor, reference_split: str):
        super().__init__(name, features, reference_split)
        # flat, because ranks without images contribute a tensor of one dimension
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

    Mean and standard deviation of the unbiased estimate over random subsets, by torch-fidelity. Unlike FID's,
    the expectation does not depend on the number of images; it may be slightly negative. Its name is "kid"
    for InceptionV3 and `kd_<features>` for any other space.

    Args:
        features: the feature space.
        subsets: number of subsets.
        subset_size: images in a subset, drawn from either set without replacement.
        seed: seed of the draws.
        reference_split: which split of the data is the reference.
    """

    def __init__(
        self,
        features: FeatureExtractor,
        subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 2020,
        reference_split: str = "train",
    ):
        name = "kid" if features.name == "inception" else f"kd_{features.name}"
        super().__init__(name, features, reference_split)
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

        smaller = min(int(generated["count"]), int(reference["count"]))
        if smaller < self.subset_size:
            raise UserError(
                f"metrics.subset_size={self.subset_size}: {self.name} has only {smaller} images to draw from"
            )
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
    """Improved precision and recall (Kynkäänniemi et al. 2019), by torch-fidelity.

    Precision: the share of generated images that lie nearer to some reference image than its k-th neighbour
    in the reference. Recall: the same with the sets exchanged. Named `precision_<features>` and
    `recall_<features>`: the paper's numbers are of VGG-16's features.

    Args:
        features: the feature space.
        neighbours: k.
        reference_split: which split of the data is the reference.
    """

    higher_is_better = True

    def __init__(self, features: FeatureExtractor, neighbours: int = 3, reference_split: str = "train"):
        super().__init__(f"precision_{features.name}", features, reference_split)
        self.neighbours = neighbours

    def settings(self) -> dict[str, Any]:
        return {"neighbours": self.neighbours}

    def compare(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
        from torch_fidelity.metric_prc import prc_features_to_metric

        smaller = min(int(generated["count"]), int(reference["count"]))
        if smaller <= self.neighbours:
            raise UserError(
                f"metrics.neighbours={self.neighbours}: {self.name} has only {smaller} images in a set"
            )
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
    """Inception Score (Salimans et al. 2016), by torch-fidelity: exp of the mean KL(p(y|x) || p(y)).

    It looks at generated images only, through InceptionV3's logits.

    Args:
        features: `InceptionFeatures` with layer "logits_unbiased".
        splits: parts in which the images are scored; mean and standard deviation over them are returned.
        seed: seed of the shuffling into parts.
    """

    higher_is_better = True
    needs_reference = False

    def __init__(self, features: FeatureExtractor, splits: int = 10, seed: int = 2020):
        if features.name != "inception_logits_unbiased":
            raise ValueError(
                f"features={features.name!r}: the Inception Score is of InceptionV3's logits; "
                "set metrics.features.layer=logits_unbiased"
            )
        super().__init__("inception_score", features, reference_split="none")
        self.splits = splits
        self.seed = seed

    def settings(self) -> dict[str, Any]:
        return {"splits": self.splits, "seed": self.seed}

    def compare(self, generated: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
        from torch_fidelity.metric_isc import isc_features_to_metric

        if int(generated["count"]) < self.splits:
            raise UserError(f"metrics.splits={self.splits}: only {int(generated['count'])} images to split")
        result = isc_features_to_metric(self.feature_set(generated), self.splits, rng_seed=self.seed)
        return {
            self.name: result["inception_score_mean"],
            f"{self.name}_std": result["inception_score_std"],
        }


def _rank() -> int:
    return torch.distributed.get_rank() if _world_size() > 1 else 0


def _world_size() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _from_rank_zero(value: Any) -> Any:
    """Rank 0's value, on all ranks: folders may differ between machines, the decision must not."""
    if _world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _read_cache(path: Path, key: dict[str, Any]) -> dict[str, Tensor] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {}).get("key", "null"))
            if stored == key:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        log.warning("%s is not readable (%s): computed anew", path, error)
    return None


def _write_cache(path: Path, key: dict[str, Any], states: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(states, temporary, {"key": json.dumps(key)})
    os.replace(temporary, path)
