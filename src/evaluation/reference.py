"""A file cache of the statistics of reference sets."""

import glob
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from src.data.given import Given, GivenImages
from src.data.source import ImageSet
from src.errors import UserError
from src.metrics.features import hash_tensors
from src.metrics.score import FidelityScore, Reference
from src.runs.files import digest_of, write_atomically

log = logging.getLogger(__name__)

CACHE_FORMAT = 1
"""Part of every cache key; increase it if the meaning of the stored statistics changes."""


def share_of(
    images: ImageSet, batch_size: int, rank: int = 0, world_size: int = 1, n: int | None = None
) -> Iterator[tuple[Tensor, Tensor | None, Sequence[int]]]:
    """One rank's share of an image set: images rank, rank + world_size, ..., in batches of b <= batch_size.

    Only of its first n images, if n is given.

    Yields:
        The images, uint8 (b, C, H, W); their labels, int64 (b,), or None for an unlabelled set; and their numbers.
    """
    indices = range(rank, len(images) if n is None else n, world_size)
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        yield images.images(chosen), images.condition(chosen).labels, chosen


class GivenSource:
    """A given set of images or statistics as a reference, in place of a data source; all its splits are the same.

    Args:
        given: the set; None where no score needs one.
    """

    num_classes = 0

    def __init__(self, given: Given | None):
        self.name = given.name if given else "none"
        self.images = given.images if given else None
        self.statistics = given.statistics if given else None

    def split(self, name: str) -> GivenImages:
        """The images.

        Raises:
            UserError: there are only statistics.
        """
        if self.images is None:
            raise UserError(
                f"reference={self.name}: has only mu and sigma, which suffice for Fréchet distances alone; choose"
                " metrics=fid, or a reference of images"
            )
        return self.images

    def fingerprint(self, split: str) -> str:
        """A hash of the images' content."""
        return self.split(split).fingerprint()

    def moments(self, score: FidelityScore) -> tuple[Reference, dict[str, Tensor]]:
        """The reference of a Fréchet distance and its states, from the statistics; their number of images is unknown.

        Raises:
            UserError: the statistics are of another feature space.
        """
        mean, covariance = self.statistics
        size = score.features.num_features
        if len(mean) != size:
            raise UserError(
                f"reference={self.name}: mu has {len(mean)} features, and {score.name} {size}; choose the metric for"
                " which the file was made, e.g. metrics=fid for 2048"
            )
        states = {"mean": mean, "covariance": covariance}
        reference = Reference(self.name, score.reference_split, 0, hash_tensors(states))
        return reference, {"count": torch.tensor(0), **states}


class ReferenceCache:
    """A folder with the states of scores on reference sets, one safetensors file per set and feature space.

    The key of a file includes the hash of the data, the hash of the network's weights, the split and the number of
    images, so that statistics of other data or of another network are never used. The file also stores a SHA-256 of
    its tensors. If a file is damaged or lacks this hash, its statistics are recomputed.

    Args:
        folder: the folder, created on the first write.

    Raises:
        UserError: the folder is given relative to an unknown home folder.
    """

    def __init__(self, folder: str | Path):
        try:
            self.folder = Path(folder).expanduser()
        except RuntimeError:
            raise UserError(
                f"cache={folder}: the home folder is unknown; set the environment variable HOME or a path without ~"
            ) from None
        self._writable = True

    def path(self, score: FidelityScore, reference: Reference) -> Path:
        """The path for the states of `score` on `reference`; the file may not exist."""
        digest = digest_of(_key(score, reference), 16)
        return self.folder / f"{reference.data}-{reference.split}-{score.features.name}-{digest}.safetensors"

    def read(self, score: FidelityScore, reference: Reference) -> dict[str, Tensor] | None:
        """The states of `score` on `reference`, or None if there is no intact file; warns if the file is damaged."""
        path = self.path(score, reference)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                states = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            intact = metadata.get("sha256") == hash_tensors(states)
            fits = json.loads(metadata.get("key", "null")) == _key(score, reference)
        except FileNotFoundError:
            self._report_stale(score, reference)
            return None
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("%s cannot be read (%s): computing it again", path, str(error).splitlines()[0])
            return None
        if intact and fits:
            return states
        log.warning("%s is damaged or from an older version: computing it again", path)
        return None

    def _report_stale(self, score: FidelityScore, reference: Reference) -> None:
        """Says where there are statistics of a set of this name with other images."""
        stem = f"{reference.data}-{reference.split}-{score.features.name}-"
        if score.label is not None:
            return
        for path in self.folder.glob(f"{glob.escape(stem)}*.safetensors"):
            with suppress(SafetensorError, OSError, ValueError):
                with safe_open(path, framework="pt") as file:
                    stored = json.loads((file.metadata() or {}).get("key", "{}"))
                other = {**stored, "count": reference.count, "fingerprint": reference.fingerprint}
                if other == _key(score, reference):
                    log.warning(
                        "reference: the stored statistics of %s (%s) are of other images (%s, now %s): computing them"
                        " again",
                        reference.data,
                        reference.split,
                        stored.get("count"),
                        reference.count,
                    )
                    return

    def write(self, score: FidelityScore, reference: Reference, states: dict[str, Tensor]) -> None:
        """Stores states. If the folder is not writable, this logs one warning and raises no error."""
        if not self._writable:
            return
        path = self.path(score, reference)
        metadata = {"key": json.dumps(_key(score, reference)), "sha256": hash_tensors(states)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save(states, metadata))
        except OSError as error:
            self._writable = False
            log.warning(
                "cache=%s cannot be written (%s): continuing without it; the next run computes the reference again",
                self.folder,
                error.strerror or error,
            )


def _key(score: FidelityScore, reference: Reference) -> dict[str, Any]:
    return {
        "format": CACHE_FORMAT,
        "states": score.reference_names,
        "features": score.features.name,
        "weights": score.features.sha256,
        **asdict(reference),
    }
