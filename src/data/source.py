"""What a data source is: a shape that is known at once, and splits of images that load on first use."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from src.conditioning import Condition, TextEncoder, TextTable
from src.errors import UserError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

CACHE = "~/.cache/diffusion-lab"
"""Where downloads and indices go unless `data.root` or `data.cache` is set."""


class ImageSet(ABC):
    """Images of one shape, picked by index.

    Attributes:
        labels: int64 (n,), classes in [0, num_classes), or None where the source is unlabelled.
        captions: one text for each of the n images, "" where an image has none; or None where the source has no
            captions.
        text: the encoded captions, where the source has a text encoder.
    """

    labels: Tensor | None
    captions: Sequence[str] | None = None
    text: TextTable | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The images at `indices`, in that order: a fresh uint8 tensor (b, C, H, W)."""

    def mirrored(self, indices: Tensor | Sequence[int], images: Tensor) -> Tensor:
        """The mirrored images at `indices`, given `images(indices)`."""
        return images.flip(-1)

    def condition(self, indices: Tensor | Sequence[int]) -> Condition:
        """What the images at `indices` are conditioned on: their labels and encoded captions, where there are any."""
        condition = Condition() if self.text is None else self.text.condition(indices)
        if self.labels is not None:
            condition.labels = self.labels[torch.as_tensor(indices, dtype=torch.int64)]
        return condition

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash (hexadecimal) of the images' content, labels and captions, equal exactly for equal data."""

    def annotations(self) -> bytes:
        """Labels and captions as bytes, for fingerprints; empty where there are none."""
        labels = b"" if self.labels is None else self.labels.numpy().tobytes()
        return labels + (b"" if self.captions is None else json.dumps(list(self.captions)).encode())


class InMemoryImages(ImageSet):
    """A set held as one tensor.

    Args:
        pixels: uint8 (n, C, H, W).
        labels: int64 (n,) or None.
        captions: n texts or None.
    """

    def __init__(self, pixels: Tensor, labels: Tensor | None, captions: Sequence[str] | None = None):
        self.pixels = pixels.contiguous()
        self.labels = labels
        self.captions = captions

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        return self.pixels.index_select(0, torch.as_tensor(indices, dtype=torch.int64))

    def fingerprint(self) -> str:
        digest = sha256(f"{tuple(self.pixels.shape)}".encode())
        digest.update(memoryview(self.pixels.numpy()))
        digest.update(self.annotations())
        return digest.hexdigest()


class ImageSource(ABC):
    """A data set. Its constructor reads nothing; `prepare` and `split` do.

    Args:
        image_size: height and width in pixels, as one integer or as [height, width].
        channels: 1 (grey), 3 (RGB) or any other number of bands.
        num_classes: number of classes; 0 means unlabelled.
        horizontal_flip: whether training may mirror the images.

    Attributes:
        name: what the set is called in logs and cache keys.
        captioned: whether the images have captions.
        text_encoder: encodes the captions of each split when it is loaded; None for no text conditioning.
        image_shape: (C, H, W) of every image.

    Raises:
        ValueError: a size, `channels` or `num_classes` is out of range.
    """

    name: ClassVar[str]
    captioned: bool = False
    text_encoder: TextEncoder | None = None

    def __init__(
        self, image_size: int | Sequence[int], channels: int, num_classes: int, horizontal_flip: bool
    ):
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(
                f"image_size must be a number of pixels or [height, width], each at least 1, got {image_size}"
            )
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        if num_classes < 0:
            raise ValueError(f"num_classes must be the number of classes, or 0 for none, got {num_classes}")
        self.image_size = image_size
        self.image_shape: tuple[int, int, int] = (channels, *sides)
        self.channels = channels
        self.num_classes = num_classes
        self.horizontal_flip = horizontal_flip
        self._sets: dict[Split, ImageSet] = {}
        self._fingerprints: dict[Split, str] = {}

    @property
    def class_names(self) -> list[str]:
        """The names of the classes in the order of their labels; empty for an unlabelled set."""
        return [str(label) for label in range(self.num_classes)]

    def check(self) -> None:  # noqa: B027 - a source without files has nothing that could be missing
        """Checks, without decoding anything, that the data are available.

        Raises:
            UserError: if a folder or a package is missing; names the option and the fix.
        """

    def prepare(self) -> None:  # noqa: B027 - only some sources download or index
        """Downloads or indexes what is missing on disk. Call it in one process per machine."""

    def split(self, name: Split) -> ImageSet:
        """The images of one split, loaded at the first call.

        Raises:
            ValueError: if there is no split of that name.
            UserError: if the data are missing or are not those of this source.
        """
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
        if name not in self._sets:
            images = self._checked(name, self._load(name))
            if self.text_encoder is not None and images.captions is not None:
                images.text = self.text_encoder(images.captions)
            self._sets[name] = images
        return self._sets[name]

    def fingerprint(self, split: Split) -> str:
        """A hash (hexadecimal) of the split's images, labels and captions, for cache keys and for checks at resume."""
        if split not in self._fingerprints:
            self._fingerprints[split] = self.split(split).fingerprint()
        return self._fingerprints[split]

    @abstractmethod
    def _load(self, split: Split) -> ImageSet: ...

    def _checked(self, split: Split, images: ImageSet) -> ImageSet:
        if (images.labels is None) != (self.num_classes == 0):
            raise RuntimeError(f"{self.name}: labels contradict num_classes={self.num_classes}")
        if (images.captions is None) == self.captioned or (
            self.captioned and len(images.captions) != len(images)
        ):
            raise RuntimeError(f"{self.name}: captions contradict captioned={self.captioned}")
        if images.labels is not None and len(images):
            low, high = int(images.labels.min()), int(images.labels.max())
            if low < 0 or high >= self.num_classes:
                raise UserError(
                    f"{self.name}: labels of the {split} split run from {low} to {high}, but "
                    f"data.num_classes={self.num_classes}: the label file is damaged or of another data set"
                )
        return images


def require(name: str, given: object, *allowed: object) -> None:
    """Checks a constructor's argument against the numbers that the data set has.

    Raises:
        ValueError: if `given` is none of `allowed`.
    """
    if given not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(str, allowed))} for this data set, got {given}")


def user_path(path: str | Path, option: str) -> Path:
    """The path with ~ replaced by the home folder.

    Args:
        option: what to set where there is no home folder.

    Raises:
        UserError: the path begins with ~, and that user has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path} needs a home folder, and this user has none: set {option} to an absolute path, or set HOME"
        ) from None
