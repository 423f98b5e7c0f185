"""Several scores computed from the same images, over all ranks."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from src.data.source import ImageSet, ImageSource
from src.errors import UserError
from src.evaluation.record import Record, protocol_of
from src.evaluation.reference import GivenSource, ReferenceCache, share_of
from src.metrics.fidelity import FrechetDistance
from src.metrics.score import FidelityScore, Reference
from src.metrics.uncertainty import METHOD, Interval
from src.runs import processes

T = TypeVar("T")

REFERENCE_BATCH = 512


class ScoreSet:
    """Scores that are computed together, with one pass of the images through each feature network.

    Usage: `set_references` once; then `reset`, `update` with each rank's generated images, and `compute`. Each method
    must be called on all ranks.

    With `num_classes`, every score is also computed for the images of each class, against the reference images of that
    class, under the name `<score>/class_<number>`. A class without generated images has no scores.

    Args:
        scores: at least one score; the first is monitored. Scores with the same feature space (equal name and equal
            hash of the weights) are changed to share one network.
        num_classes: number of classes that are also scored by themselves; 0 for none.
        intervals: whether `compute` also finds 95 % intervals.

    Attributes:
        scores: the given scores.
        monitored: the first score.
        of_classes: the scores of each class by itself.
        intervals: the intervals of the last `compute`, by name; see `src.metrics.uncertainty`.
        warnings: what the last `compute` found doubtful, one line each.

    Raises:
        ValueError: there are no scores, or two have the same name.
    """

    def __init__(self, scores: Sequence[FidelityScore], num_classes: int = 0, intervals: bool = False):
        names = [score.name for score in scores]
        if not names:
            raise ValueError("metrics must have at least one score")
        if len(set(names)) < len(names):
            raise ValueError(f"metrics must have different names, got {', '.join(names)}")
        self.scores = tuple(scores)
        self.monitored = self.scores[0]
        for first, *others in _by_space(self.scores):
            for score in others:
                score.features = first.features
        self.of_classes = tuple(score.of_class(k) for score in self.scores for k in range(num_classes))
        self._all = (*self.scores, *self.of_classes)
        for score in self._all:
            score.with_intervals = intervals
        self.intervals: dict[str, Interval] = {}
        self.warnings: list[str] = []

    @property
    def names(self) -> str:
        """The names of the scores, e.g. "fid, kid"."""
        return ", ".join(score.name for score in self.scores)

    @property
    def spaces(self) -> list[str]:
        """The feature spaces by name and hash, as in `features_of`."""
        return [_key(same[0].features.name, same[0].features.sha256) for same in _by_space(self.scores)]

    @property
    def needs_reference(self) -> bool:
        """Whether a score still lacks its reference set."""
        return any(score.needs_reference and score.reference is None for score in self.scores)

    def to(self, device: torch.device | str) -> "ScoreSet":
        """Moves networks and states to a device; returns self."""
        for first, *others in _by_space(self._all):
            first.to(device)
            for score in others:
                score.features = None  # has moved
                score.to(device)
                score.features = first.features
        return self

    def use_split(self, split: str) -> None:
        """Takes this split as the reference of all scores that have one; call it before `set_references`."""
        for score in self._all:
            if score.needs_reference:
                score.reference_split = split

    def reset(self) -> None:
        """Drops the generated images and keeps the references."""
        for score in self._all:
            score.reset()

    def update(
        self, images: Tensor, labels: Tensor | None = None, numbers: Sequence[int] | None = None
    ) -> None:
        """Adds generated images.

        Args:
            images: uint8 (B, C, H, W), on the device of the scores.
            labels: the classes on which they were conditioned, int64 (B,), on the CPU; only scores of classes need
                them.
            numbers: places of the images in the whole set, over all ranks; see `FidelityScore.update`.
        """
        _update(self._all, images, labels, numbers)

    def features_of(self, images: Tensor) -> dict[str, Tensor]:
        """The features (B, num_features) of images in each feature space, by its name and hash."""
        return _features(self._all, images)

    def update_features(self, features: Mapping[str, Tensor], labels: Tensor | None = None) -> None:
        """Adds images of which only the features are known; see `features_of` and `update`."""
        _add(self._all, features, labels)

    def influences(self) -> Tensor | None:
        """The first-order effect of each image on the monitored score, after `compute` in one process.

        See `FidelityScore.influences`.
        """
        score = self.monitored
        generated = score.states("the generated set")
        return score.influences(generated, score.reference_states)

    def compute(self, expected: int | None = None) -> dict[str, float]:
        """The scores of all images since `reset`, over all ranks, the monitored one first; equal on all ranks.

        Args:
            expected: the number of images that there must be.

        Raises:
            UserError: see `FidelityScore.compute`; or images are missing.
        """
        found: dict[str, float] = {}
        intervals: dict[str, Interval] = {}
        doubts: list[str] = []
        with warnings.catch_warnings():
            # a class or a rank may have no images
            warnings.filterwarnings("ignore", ".*was called before the ``update`` method.*")
            for score in self._all:
                part = "" if score.label is None else f"/class_{score.label}"
                found |= {f"{name}{part}": value for name, value in score.compute().items()}
                intervals |= {f"{name}{part}": interval for name, interval in score.intervals.items()}
                doubts += [f"{line}{part.replace('/', ' of ')}" for line in score.warnings]
        if expected is not None and self.monitored.num_images != expected:
            raise UserError(
                f"{self.names}: {self.monitored.num_images} of {expected} images were scored; this is a fault of this"
                " program or of a process that was lost: repeat the command"
            )
        self.intervals, self.warnings = _from_rank_zero((intervals, doubts))
        # different hardware may differ in the last bit, but decisions such as "the best so far" must agree on all ranks
        return _from_rank_zero(found)

    def check_counts(
        self, count: int, source: ImageSource | GivenSource, labels: Tensor | None = None
    ) -> None:
        """Checks, without reading images, that the generated and the reference set are large enough for all scores.

        Args:
            count: number of images that will be generated.
            source: the data with the reference sets.
            labels: their classes, int64 (count,); for scores of each class.

        Raises:
            TooFewImages: a set is too small.
            UserError: a score needs images, and the reference has only statistics.
        """
        for score in self._all:
            generated = count if score.label is None else int((labels == score.label).sum())
            if score.label is not None and not generated:
                continue
            score.check_count(generated, "the generated set")
            if score.needs_reference and not _has_moments(score, source):
                split = score.reference_split
                size = _size(source.split(split), score.label)
                score.check_count(size, _named(source, split))

    def set_references(
        self,
        source: ImageSource | GivenSource,
        rank: int = 0,
        world_size: int = 1,
        cache: str | Path | None = None,
    ) -> None:
        """Sets the reference of each score, from the cache or computed in one pass over the images of each split.

        Drops generated images that were added before. Fréchet distances use given statistics, where there are any.

        Args:
            source: the data; `prepare` must have been called.
            rank, world_size: rank of this process and number of processes. Each rank reads its share of the images.
            cache: folder of the cached statistics; None for no cache. Only rank 0 uses it.

        Raises:
            UserError: a reference set is too small, or its features are not finite.
        """
        store = ReferenceCache(cache) if cache is not None and rank == 0 else None
        missing: dict[str, list[tuple[FidelityScore, Reference]]] = {}
        for score in self._all:
            if not score.needs_reference:
                continue
            if _has_moments(score, source):
                score.set_reference(*source.moments(score))
                continue
            reference = _reference_of(score, source)
            if score.label is None:
                score.check_count(reference.count, _named(source, reference.split))
            states = _from_rank_zero(store.read(score, reference) if store else None)
            if states is None:
                missing.setdefault(reference.split, []).append((score, reference))
            else:
                score.set_reference(reference, states)
        for split, scores in missing.items():
            self._compute_references(scores, source.split(split), rank, world_size, store)
        self.reset()

    def reference_images(self, source: ImageSource, cache: str | Path | None = None) -> int:
        """The number of images that `set_references` would read, since their statistics are not cached."""
        store = ReferenceCache(cache) if cache is not None else None
        splits = set()
        for score in self.scores:
            if score.needs_reference:
                reference = _reference_of(score, source)
                if store is None or store.read(score, reference) is None:
                    splits.add(reference.split)
        return sum(len(source.split(split)) for split in splits)

    def _compute_references(
        self,
        scores: Sequence[tuple[FidelityScore, Reference]],
        images: ImageSet,
        rank: int,
        world_size: int,
        store: ReferenceCache | None,
    ) -> None:
        """Reads this rank's share of a split, combines the states over the ranks, and sets and caches them."""
        self.reset()
        for score, _ in scores:
            score.of_reference = True
        with tqdm(
            desc=f"{self.names}: reference",
            total=len(images),
            unit="image",
            delay=2,
            leave=False,
            disable=processes.rank() > 0,
        ) as progress:
            for batch, labels, numbers in share_of(images, REFERENCE_BATCH, rank, world_size):
                _update([score for score, _ in scores], batch.to(self.monitored.device), labels, numbers)
                progress.update(len(batch) * processes.world_size())
        for score, reference in scores:
            score.of_reference = False
            with score.sync_context():
                found = score.states("the reference")
            states = {name: found[name].cpu() for name in score.reference_names}
            score.set_reference(reference, states)
            if store:
                store.write(score, reference, states)

    def record(self, scores: dict[str, float], recipe: Mapping[str, Any], quantisation: str) -> Record:
        """The record of the last `compute`, which returned these scores; for the rest see `protocol`."""
        intervals = {name: list(interval) for name, interval in self.intervals.items()}
        return Record(
            scores,
            self.protocol(recipe, quantisation),
            intervals=intervals or None,
            warnings=self.warnings or None,
        )

    def protocol(self, recipe: Mapping[str, Any], quantisation: str) -> dict[str, Any]:
        """Everything the result of the last `compute` depends on; see `src.evaluation.record.protocol_of`.

        Args:
            recipe: the recipe's record.
            quantisation: a description of how the images were converted to bytes.
        """
        protocol = protocol_of(self.scores, recipe, quantisation)
        if self.monitored.with_intervals:
            protocol["intervals"] = METHOD
        if self.of_classes:
            protocol["per_class"] = {
                score.name: {
                    str(one.label): {
                        "num_images": one.num_images,
                        "reference": one.reference and one.reference.count,
                    }
                    for one in self.of_classes
                    if one.name == score.name and one.num_images
                }
                for score in self.scores
            }
        return protocol


def _by_space(scores: Iterable[FidelityScore]) -> Iterable[list[FidelityScore]]:
    """The scores, grouped by feature space."""
    spaces: dict[tuple[str, str], list[FidelityScore]] = {}
    for score in scores:
        spaces.setdefault((score.features.name, score.features.sha256), []).append(score)
    return spaces.values()


def _update(
    scores: Iterable[FidelityScore], images: Tensor, labels: Tensor | None, numbers: Sequence[int] | None
) -> None:
    """Adds images to scores, those of its class to a score of one class; one pass through each feature network."""
    scores = tuple(scores)
    _add(scores, _features(scores, images), labels, numbers)


def _features(scores: Iterable[FidelityScore], images: Tensor) -> dict[str, Tensor]:
    """The features of images by name and hash of the space; spaces with a base are computed from it."""
    networks = [same[0].features for same in _by_space(scores)]
    found: dict[str, Tensor] = {}
    for network in sorted(networks, key=lambda network: network.base is not None):
        base = network.base and found.get(_key(*network.base))
        found[_key(network.name, network.sha256)] = (
            network(images) if base is None else network.from_base(base)
        )
    return found


def _add(
    scores: Iterable[FidelityScore],
    found: Mapping[str, Tensor],
    labels: Tensor | None,
    numbers: Sequence[int] | None = None,
) -> None:
    for score in scores:
        features = found[_key(score.features.name, score.features.sha256)]
        if score.label is None:
            score.update(None, features, labels, numbers)
            continue
        chosen = (labels == score.label).nonzero().squeeze(1)
        if len(chosen):
            there = chosen.to(features.device, non_blocking=True)
            places = None if numbers is None else [numbers[k] for k in chosen.tolist()]
            score.update(None, features[there], labels[chosen], places)


def _key(name: str, sha256: str) -> str:
    return f"{name} {sha256}"


def _has_moments(score: FidelityScore, source: ImageSource | GivenSource) -> bool:
    given = isinstance(source, GivenSource) and source.statistics is not None
    return given and isinstance(score, FrechetDistance)


def _named(source: ImageSource | GivenSource, split: str) -> str:
    """A reference set for messages."""
    return (
        f"reference={source.name}"
        if isinstance(source, GivenSource)
        else f"the {split} split of {source.name}"
    )


def _size(images: ImageSet, label: int | None) -> int:
    """The number of images, or of those of a class."""
    return len(images) if label is None else int((images.labels == label).sum())


def _reference_of(score: FidelityScore, source: ImageSource | GivenSource) -> Reference:
    split = score.reference_split
    fingerprint = source.fingerprint(split)
    if score.label is not None:
        fingerprint = f"{fingerprint} class {score.label}"
    return Reference(source.name, split, _size(source.split(split), score.label), fingerprint)


def _from_rank_zero(value: T) -> T:
    """Broadcasts rank 0's value to all ranks."""
    if processes.world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
