"""Features of generated images, kept in memory and on disk, so that the same images are never sampled twice."""

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from src.data.codec import Codec
from src.evaluation.scores import ScoreSet
from src.generation.loaded import LoadedRun
from src.metrics.features import hash_tensors
from src.runs.files import digest_of, file_sha256, write_atomically

log = logging.getLogger(__name__)

FOLDER = "features"
LABELS = "labels"


@dataclass(frozen=True)
class Features:
    """Features of the first images of a sampling run.

    Attributes:
        tensors: (n, num_features) by codec and feature space; and the classes, int64 (n,), where there are any. Each
            has its own n.
        evaluations: network evaluations per image.
        sampled: how many images were sampled for this request; the others were known.
    """

    tensors: dict[str, Tensor]
    evaluations: int
    sampled: int = 0

    def of(self, codec: Codec, n: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """The features of the first n images by space, for `ScoreSet.update_features`, and their classes."""
        stem = f"{codec.describe()} | "
        found = {name.removeprefix(stem): t[:n] for name, t in self.tensors.items() if name.startswith(stem)}
        labels = self.tensors.get(LABELS)
        return found, None if labels is None else labels[:n]


class _Several(Codec):
    """Decodes with several codecs: B images become len(codecs) * B, those of the first codec first."""

    def __init__(self, codecs: Sequence[Codec]):
        self.codecs = codecs
        self.shape, self.image_shape = codecs[0].shape, codecs[0].image_shape
        self.bounded = codecs[0].bounded

    def encode(self, images):
        return self.codecs[0].encode(images)

    def decode(self, x):
        return torch.cat([codec.decode(x) for codec in self.codecs])

    def describe(self):
        return self.codecs[0].describe()


class FeatureBank:
    """Features by checkpoint, weights, recipe and, if conditions come from it, the data's validation split.

    Image i depends only on these and i, so that more images add to them.

    Args:
        folder: where they are kept; None for memory only.

    Attributes:
        sampled: images that were sampled so far.
        spent: network evaluations of these images.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.sampled = 0
        self.spent = 0
        self._known: dict[str, Features] = {}
        self._hashes: dict[Path, str] = {}

    def get(
        self,
        loaded: LoadedRun,
        scores: ScoreSet,
        n: int,
        batch_size: int,
        codecs: Sequence[Codec] = (),
    ) -> Features:
        """The features of images 0 to n - 1 of a run's recipe, sampling those that are not known.

        Args:
            loaded: the run with its recipe.
            scores: the scores, with the feature spaces.
            n: number of images.
            batch_size: images made at once.
            codecs: further conversions to bytes, whose features are found in the same pass.
        """
        identity = self._identity(loaded)
        key = digest_of(identity, 16)
        codecs = list({codec.describe(): codec for codec in (loaded.recipe.codec, *codecs)}.values())
        wanted = {f"{codec.describe()} | {space}" for codec in codecs for space in scores.spaces}
        known = self._known.get(key) or self._read(key, identity)
        tensors = {} if known is None else dict(known.tensors)
        have = min(len(tensors.get(name, ())) for name in wanted)
        if have < n:
            made = self._sample(loaded, scores, range(have, n), batch_size, codecs)
            for name, new in made.tensors.items():
                old = tensors.get(name, new[:0])
                if len(old) < n:  # other spaces may be known for more images
                    tensors[name] = torch.cat([old[:have], new])
            evaluations = max(made.evaluations, known.evaluations if known else 0)
            known = Features(tensors, evaluations, made.sampled)
            self._write(key, identity, known)
        else:
            known = replace(known, sampled=0)
        self._known[key] = known
        return known

    def _identity(self, loaded: LoadedRun) -> dict[str, Any]:
        path = loaded.found.checkpoint
        if path not in self._hashes:
            self._hashes[path] = file_sha256(path)
        identity = {"checkpoint": self._hashes[path], **loaded.record(evaluations=0)}
        conditioning = loaded.recipe.conditioning
        if conditioning is not None and conditioning.reads_validation:
            # the data may have moved (data.root), or changed in their place
            loaded.source.prepare()
            identity["validation"] = loaded.source.fingerprint("validation")
        return identity

    def _sample(
        self, loaded: LoadedRun, scores: ScoreSet, numbers: range, batch_size: int, codecs: Sequence[Codec]
    ) -> Features:
        recipe = replace(loaded.recipe, codec=_Several(codecs))
        parts: dict[str, list[Tensor]] = {}
        labels: list[Tensor] = []
        evaluations = 0
        with tqdm(desc="sampling", total=len(numbers), unit="image", delay=2, leave=False) as progress:
            for made in recipe.images(loaded.denoiser, numbers, batch_size):
                for codec, images in zip(codecs, made.images.chunk(len(codecs)), strict=True):
                    for space, features in scores.features_of(images).items():
                        parts.setdefault(f"{codec.describe()} | {space}", []).append(features.cpu())
                if made.labels is not None:
                    labels.append(made.labels)
                evaluations = max(evaluations, made.evaluations)
                progress.update(len(made.images) // len(codecs))
        tensors = {name: torch.cat(each) for name, each in parts.items()}
        if labels:
            tensors[LABELS] = torch.cat(labels)
        self.sampled += len(numbers)
        self.spent += len(numbers) * evaluations
        return Features(tensors, evaluations, len(numbers))

    def _path(self, key: str) -> Path:
        return self.folder / FOLDER / f"{key}.safetensors"

    def _read(self, key: str, identity: dict[str, Any]) -> Features | None:
        if self.folder is None:
            return None
        try:
            with safe_open(self._path(key), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            if (
                metadata.get("sha256") == hash_tensors(tensors)
                and json.loads(metadata["identity"]) == identity
            ):
                return Features(tensors, int(metadata["evaluations"]))
            log.warning("%s is damaged: sampling its images again", self._path(key))
        except FileNotFoundError:
            pass
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            log.warning("%s cannot be read (%s): sampling its images again", self._path(key), error)
        return None

    def _write(self, key: str, identity: dict[str, Any], features: Features) -> None:
        if self.folder is None:
            return
        metadata = {
            "identity": json.dumps(identity),
            "evaluations": str(features.evaluations),
            "sha256": hash_tensors(features.tensors),
        }
        with suppress(OSError):  # the features stay in memory
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save(features.tensors, metadata))
