"""What a data source is: numbers that are known at once, and splits of images that load when asked for."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from hashlib import sha256
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from src.conditioning import Condition
from src.errors import UserError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

CACHE = "~/.cache/diffusion-lab"
"""Where downloads and indices go unless `data.root` or `data.cache` says otherwise."""


class ImageSet(ABC):
    """Images of one size, picked by index.

    Attributes:
        labels: int64 (n,), classes in [0, num_classes), or None where the source is unlabelled.
    """

    labels: Tensor | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The images at `indices`, in that order: a fresh uint8 tensor (n, C, H, W)."""

    def condition(self, indices: Tensor | Sequence[int]) -> Condition:
        """What is known about the images at `indices`: by default their labels, where there are any."""
        labels = None if self.labels is None else self.labels[torch.as_tensor(indices, dtype=torch.int64)]
        return Condition(labels=labels)

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash (hex) of the images' content and labels: equal if and only if the data are."""


class InMemoryImages(ImageSet):
    """A set held as one tensor.

    Args:
        pixels: uint8 (n, C, H, W).
        labels: int64 (n,) or None.
    """

    def __init__(self, pixels: Tensor, labels: Tensor | None):
        self.pixels = pixels.contiguous()
        self.labels = labels

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        return self.pixels.index_select(0, torch.as_tensor(indices, dtype=torch.int64))

    def fingerprint(self) -> str:
        digest = sha256(f"{tuple(self.pixels.shape)}".encode())
        digest.update(memoryview(self.pixels.numpy()))
        if self.labels is not None:
            digest.update(memoryview(self.labels.numpy()))
        return digest.hexdigest()


class ImageSource(ABC):
    """A data set, built from numbers alone: nothing is read before `prepare` or `split`.

    Attributes:
        name: what the set is called in logs and cache keys.
        image_size: height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        num_classes: number of classes; 0 means that no labels are given out.
        horizontal_flip: whether training may mirror the images.
    """

    name: ClassVar[str]

    def __init__(self, image_size: int, channels: int, num_classes: int, horizontal_flip: bool):
        self.image_size = image_size
        self.image_shape = (channels, image_size, image_size)
        self.channels = channels
        self.num_classes = num_classes
        self.horizontal_flip = horizontal_flip
        self._sets: dict[Split, ImageSet] = {}
        self._fingerprints: dict[Split, str] = {}

    def check(self) -> None:  # noqa: B027 - a source without files has nothing that could be missing
        """Looks, without decoding anything, whether the data can be had.

        Raises:
            UserError: if a folder or a package is missing; names the option and the cure.
        """

    def prepare(self) -> None:  # noqa: B027 - only some sources download or index
        """Downloads or indexes what is missing on disk. To be called by one process a machine."""

    def split(self, name: Split) -> ImageSet:
        """The images of one split, loaded at the first call.

        Raises:
            ValueError: if there is no split of that name.
            UserError: if the data are missing or are not what the source says that they are.
        """
        if name not in SPLITS:
            raise ValueError(f"split={name!r}: choose one of {', '.join(SPLITS)}")
        if name not in self._sets:
            self._sets[name] = self._checked(name, self._load(name))
        return self._sets[name]

    def fingerprint(self, split: Split) -> str:
        """A hash (hex) of the split's images and labels, for cache keys and for checks at resume."""
        if split not in self._fingerprints:
            self._fingerprints[split] = self.split(split).fingerprint()
        return self._fingerprints[split]

    @abstractmethod
    def _load(self, split: Split) -> ImageSet: ...

    def _checked(self, split: Split, images: ImageSet) -> ImageSet:
        if (images.labels is None) != (self.num_classes == 0):
            raise RuntimeError(
                f"{self.name}: labels and num_classes={self.num_classes} contradict each other"
            )
        if images.labels is not None and len(images):
            low, high = int(images.labels.min()), int(images.labels.max())
            if low < 0 or high >= self.num_classes:
                raise UserError(
                    f"{self.name}: labels of the {split} split run from {low} to {high}, but "
                    f"data.num_classes={self.num_classes}: the label file is damaged or of another data set"
                )
        return images


def require(name: str, given: object, *allowed: object) -> None:
    """Holds a constructor's number against what the data set really is.

    Raises:
        ValueError: if `given` is none of `allowed`.
    """
    if given not in allowed:
        raise ValueError(f"{name}={given}: this data set has {name} {' or '.join(map(str, allowed))}")
