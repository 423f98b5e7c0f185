"""Features that are the pixels of the images, so that the moments of the features are known."""

import torch
from torch import Tensor

from src.conditioning import Condition
from src.metrics.features import FeatureExtractor
from src.metrics.fidelity import FrechetDistance
from src.metrics.score import Reference
from tests.metrics.test_features import random_images


class PixelFeatures(FeatureExtractor):
    """The pixels, times a scale; counts its calls."""

    def __init__(self, pixels: int, scale: float = 1.0, sha256: str = "pixels"):
        super().__init__("pixels", pixels, sha256, "the pixels themselves")
        self.scale = scale
        self.calls = 0

    def extract(self, images: Tensor) -> Tensor:
        self.calls += 1
        return images.flatten(1) * self.scale


class Images:
    """An image set."""

    def __init__(self, pixels: Tensor, labels: Tensor | None = None):
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices) -> Tensor:
        return self.pixels[torch.as_tensor(indices)]

    def condition(self, indices) -> Condition:
        return Condition(None if self.labels is None else self.labels[torch.as_tensor(indices)])


class Source:
    """A data source with the given splits."""

    name = "noise"

    def __init__(self, content: str = "abc", **splits: Tensor):
        self.content = content
        self.sets = {name: Images(pixels) for name, pixels in splits.items()}

    def split(self, name: str) -> Images:
        return self.sets[name]

    def fingerprint(self, split: str) -> str:
        return f"{self.content}-{split}"


REAL = random_images(50, (1, 2, 3), seed=1)
FAKE = random_images(40, (1, 2, 3), seed=2) // 2


def reference_of(images: Tensor, fingerprint: str = "abc") -> Reference:
    return Reference("noise", "train", len(images), fingerprint)


def score_of(kind=FrechetDistance, pixels: int = 6, **settings):
    return kind(PixelFeatures(pixels), **settings)


def give_reference(score, *batches: Tensor) -> None:
    """Sets the reference of one score in one process."""
    score.reset()
    for batch in batches:
        score.update(batch)
    score.set_reference(reference_of(torch.cat(batches)), score.states("the reference"))
    score.reset()
