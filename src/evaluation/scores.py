"""Several scores computed from the same images, over all ranks."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from src.data.source import ImageSet, ImageSource
from src.evaluation.record import protocol_of
from src.evaluation.reference import ReferenceCache, share_of
from src.metrics.score import FidelityScore, Reference
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

    Attributes:
        scores: the given scores.
        monitored: the first score.
        of_classes: the scores of each class by itself.

    Raises:
        ValueError: there are no scores, or two have the same name.
    """

    def __init__(self, scores: Sequence[FidelityScore], num_classes: int = 0):
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

    @property
    def names(self) -> str:
        """The names of the scores, e.g. "fid, kid"."""
        return ", ".join(score.name for score in self.scores)

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

    def reset(self) -> None:
        """Drops the generated images and keeps the references."""
        for score in self._all:
            score.reset()

    def update(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Adds generated images.

        Args:
            images: uint8 (B, C, H, W), on the device of the scores.
            labels: the classes on which they were conditioned, int64 (B,), on the CPU; only scores of classes need
                them.
        """
        _update(self._all, images, labels)

    def compute(self) -> dict[str, float]:
        """The scores of all images since `reset`, over all ranks, the monitored one first; equal on all ranks.

        Raises:
            UserError: see `FidelityScore.compute`.
        """
        found: dict[str, float] = {}
        with warnings.catch_warnings():
            # a class or a rank may have no images
            warnings.filterwarnings("ignore", ".*was called before the ``update`` method.*")
            for score in self._all:
                part = "" if score.label is None else f"/class_{score.label}"
                found |= {f"{name}{part}": value for name, value in score.compute().items()}
        # different hardware may differ in the last bit, but decisions such as "the best so far" must agree on all ranks
        return _from_rank_zero(found)

    def check_counts(self, count: int, source: ImageSource, labels: Tensor | None = None) -> None:
        """Checks, without reading images, that the generated and the reference set are large enough for all scores.

        Args:
            count: number of images that will be generated.
            source: the data with the reference sets.
            labels: their classes, int64 (count,); for scores of each class.

        Raises:
            UserError: a set is too small.
        """
        for score in self._all:
            generated = count if score.label is None else int((labels == score.label).sum())
            if score.label is not None and not generated:
                continue
            score.check_count(generated, "the generated set")
            if score.needs_reference:
                split = score.reference_split
                size = _size(source.split(split), score.label)
                score.check_count(size, f"the {split} split of {source.name}")

    def set_references(
        self, source: ImageSource, rank: int = 0, world_size: int = 1, cache: str | Path | None = None
    ) -> None:
        """Sets the reference of each score, from the cache or computed in one pass over the images of each split.

        Drops generated images that were added before.

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
            reference = _reference_of(score, source)
            if score.label is None:
                score.check_count(reference.count, f"the {reference.split} split of {source.name}")
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
        with tqdm(
            desc=f"{self.names}: reference",
            total=len(images),
            unit="image",
            delay=2,
            leave=False,
            disable=processes.rank() > 0,
        ) as progress:
            for batch, labels in share_of(images, REFERENCE_BATCH, rank, world_size):
                _update([score for score, _ in scores], batch.to(self.monitored.device), labels)
                progress.update(len(batch) * processes.world_size())
        for score, reference in scores:
            with score.sync_context():
                states = {name: tensor.cpu() for name, tensor in score.states("the reference").items()}
            score.set_reference(reference, states)
            if store:
                store.write(score, reference, states)

    def protocol(self, recipe: Mapping[str, Any], quantisation: str) -> dict[str, Any]:
        """Everything the result of the last `compute` depends on; see `src.evaluation.record.protocol_of`.

        Args:
            recipe: the recipe's record.
            quantisation: a description of how the images were converted to bytes.
        """
        protocol = protocol_of(self.scores, recipe, quantisation)
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


def _update(scores: Iterable[FidelityScore], images: Tensor, labels: Tensor | None) -> None:
    """Adds images to scores, those of its class to a score of one class; one pass through each feature network."""
    for same in _by_space(scores):
        features = same[0].features(images)
        for score in same:
            if score.label is None:
                score.update(images, features, labels)
                continue
            chosen = (labels == score.label).nonzero().squeeze(1)
            if len(chosen):
                there = chosen.to(images.device, non_blocking=True)
                score.update(images[there], features[there], labels[chosen])


def _size(images: ImageSet, label: int | None) -> int:
    """The number of images, or of those of a class."""
    return len(images) if label is None else int((images.labels == label).sum())


def _reference_of(score: FidelityScore, source: ImageSource) -> Reference:
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
