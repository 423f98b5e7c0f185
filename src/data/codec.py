"""Between images as bytes and what the network sees: the only place that rescales pixels."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from src.data.source import ImageSet, ImageSource, Split


class Codec(ABC):
    """Encodes images of bytes for the network, and decodes what it generates.

    Attributes:
        image_shape: (C, H, W) of the images.
        shape: (C, H, W) of what the network sees.
        bounded: whether encoded images are in [-1, 1], to which clipping limits estimates of them.
    """

    bounded = True
    image_shape: tuple[int, int, int]
    shape: tuple[int, int, int]

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """uint8 images, shape (B, *image_shape) -> float32, shape (B, *shape), on the same device."""

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """Floating point, shape (B, *shape) -> uint8 images, shape (B, *image_shape)."""

    @abstractmethod
    def describe(self) -> str:
        """A description of how generated values become bytes, for records."""

    def pinned(self) -> dict[str, Any]:
        """Options that identify the codec, which a training stores with its choice."""
        return {}

    def encoded(self, source: ImageSource, split: Split) -> ImageSet:
        """A split for training: its images, or what `encode` makes of them if that is kept."""
        return source.split(split)

    def to(self, device: torch.device | str) -> "Codec":
        """Moves a codec that has weights to a device; returns itself."""
        return self


class Pixels(Codec):
    """x = byte / 127.5 - 1, in [-1, 1]; back by clip(round((x + 1) * 127.5), 0, 255), exact for all 256 bytes.

    Args:
        image_shape: (C, H, W) of the images.
    """

    def __init__(self, image_shape: tuple[int, int, int]):
        self.image_shape = self.shape = tuple(image_shape)

    def encode(self, images):
        if images.dtype != torch.uint8:
            raise TypeError(f"a codec encodes uint8 images, not {images.dtype}")
        return images.to(torch.float32).div_(127.5).sub_(1.0)

    def decode(self, x):
        if not x.is_floating_point():
            raise TypeError(f"a codec decodes floating point images in [-1, 1], not {x.dtype}")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)

    def describe(self):
        return "clip(round((x + 1) * 127.5), 0, 255) to uint8"


class TruncatedPixels(Pixels):
    """As `Pixels`, but generated values are truncated to bytes, not rounded, as in codes that cast to uint8.

    All pixels are darker by half a grey level on average, which scores notice; only for comparisons with such codes.
    """

    def decode(self, x):
        if not x.is_floating_point():
            raise TypeError(f"a codec decodes floating point images in [-1, 1], not {x.dtype}")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.add(1.0).mul_(127.5).clamp_(0, 255).to(torch.uint8)

    def describe(self):
        return "clip((x + 1) * 127.5, 0, 255) truncated to uint8"
