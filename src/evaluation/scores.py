"""Several scores computed from the same images, over all ranks."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from src.data.source import ImageSource
from src.evaluation.record import protocol_of
from src.evaluation.reference import ReferenceCache, share_of
from src.metrics.fidelity import FidelityScore, Reference
from src.runs import processes

T = TypeVar("T")

REFERENCE_BATCH = 512


class ScoreSet:
    """Scores that are computed together, with one pass of the images through each feature network.

    Usage: `set_references` once; then `reset`, `update` with each rank's generated images, and `compute`. Each method
    must be called on all ranks.

    Args:
        scores: at least one score; the first is monitored. Scores with the same feature space (equal name and equal
            hash of the weights) are changed to share one network.

    Attributes:
        scores: the given scores.
        monitored: the first score.

    Raises:
        ValueError: there are no scores, or two have the same name.
    """

    def __init__(self, scores: Sequence[FidelityScore]):
        names = [score.name for score in scores]
        if not names:
            raise ValueError("metrics must have at least one score")
        if len(set(names)) < len(names):
            raise ValueError(f"metrics must have different names, got {', '.join(names)}")
        self.scores = tuple(scores)
        self.monitored = self.scores[0]
        self._spaces: dict[tuple[str, str], list[FidelityScore]] = {}
        for score in self.scores:
            space = self._spaces.setdefault((score.features.name, score.features.sha256), [score])
            if score is not space[0]:
                score.features = space[0].features
                space.append(score)

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
        for score in self.scores:
            score.to(device)
        return self

    def reset(self) -> None:
        """Drops the generated images and keeps the references."""
        for score in self.scores:
            score.reset()

    def update(self, images: Tensor) -> None:
        """Adds generated images, uint8 (B, C, H, W), on the device of the scores."""
        for scores in self._spaces.values():
            features = scores[0].features(images)
            for score in scores:
                score.update(images, features)

    def compute(self) -> dict[str, float]:
        """The scores of all images since `reset`, over all ranks, the monitored one first; equal on all ranks.

        Raises:
            UserError: see `FidelityScore.compute`.
        """
        found: dict[str, float] = {}
        for score in self.scores:
            found |= score.compute()
        # different hardware may differ in the last bit, but decisions such as "the best so far" must agree on all ranks
        return _from_rank_zero(found)

    def check_counts(self, count: int, source: ImageSource) -> None:
        """Checks, without reading images, that the generated and the reference set are large enough for all scores.

        Args:
            count: number of images that will be generated.
            source: the data with the reference sets.

        Raises:
            UserError: a set is too small.
        """
        for score in self.scores:
            score.check_count(count, "the generated set")
            if score.needs_reference:
                split = score.reference_split
                score.check_count(len(source.split(split)), f"the {split} split of {source.name}")

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
        needing = [score for score in self.scores if score.needs_reference]
        splits = dict.fromkeys(score.reference_split for score in needing)
        references = {
            split: Reference(source.name, split, len(source.split(split)), source.fingerprint(split))
            for split in splits
        }
        store = ReferenceCache(cache) if cache is not None and rank == 0 else None
        missing = []
        for score in needing:
            reference = references[score.reference_split]
            score.check_count(reference.count, f"the {reference.split} split of {source.name}")
            states = _from_rank_zero(store.read(score, reference) if store else None)
            if states is None:
                missing.append(score)
            else:
                score.set_reference(reference, states)
        for split in splits:
            chosen = [score for score in missing if score.reference_split == split]
            if chosen:
                batches = share_of(source.split(split), REFERENCE_BATCH, rank, world_size)
                ScoreSet(chosen)._compute_reference(references[split], batches, store)
        self.reset()

    def _compute_reference(
        self, reference: Reference, batches: Iterable[Tensor], store: ReferenceCache | None
    ) -> None:
        """Reads this rank's batches, combines the states over the ranks, and stores them in scores and cache."""
        self.reset()
        with tqdm(
            desc=f"{self.names}: reference",
            total=reference.count,
            unit="image",
            delay=2,
            leave=False,
            disable=processes.rank() > 0,
        ) as progress:
            for batch in batches:
                self.update(batch.to(self.monitored.device))
                progress.update(len(batch) * processes.world_size())
        for score in self.scores:
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
        return protocol_of(self.scores, recipe, quantisation)


def _from_rank_zero(value: T) -> T:
    """Broadcasts rank 0's value to all ranks."""
    if processes.world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
