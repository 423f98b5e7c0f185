"""Images as pictures: grids and animations."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from src.data.transforms import to_uint8
from src.diffusion.sampler import State


def image_grid(images: Tensor, columns: int | None = None, smallest: int = 256) -> Image.Image:
    """A grid of images with thin gaps, as square as can be.

    Args:
        images: uint8, shape (B, C, H, W), C = 1 or 3.
        columns: images in a row; by default the square root of B.
        smallest: small pictures are enlarged by a whole factor to at least this width, each pixel a block.
    """
    from torchvision.utils import make_grid

    columns = columns or math.ceil(math.sqrt(len(images)))
    grid = make_grid(images, nrow=columns, padding=1, pad_value=128)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    factor = max(1, math.ceil(smallest / picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def save_images(images: Tensor, folder: Path, first: int) -> None:
    """Writes images as <folder>/000000.png, ..., numbered from `first`; uint8, shape (B, C, H, W).

    A kill leaves no half image: each gets its name when it is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images.cpu(), start=first):
        pixels = image.squeeze(0) if image.shape[0] == 1 else image.permute(1, 2, 0)
        unfinished = folder / f".{number:06d}.{os.getpid()}.tmp"
        Image.fromarray(pixels.numpy()).save(unfinished, "PNG")
        unfinished.replace(image_path(folder, number))


def read_images(folder: Path, numbers: range) -> Tensor | None:
    """The images that `save_images` wrote under these numbers, uint8 (B, C, H, W); None if one is missing or broken."""
    images = []
    for number in numbers:
        try:
            with Image.open(image_path(folder, number)) as image:
                pixels = torch.from_numpy(np.array(image))
        except OSError:
            return None
        images.append(pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1))
    return torch.stack(images)


def image_path(folder: Path, number: int) -> Path:
    """Where the image of this number lies."""
    return folder / f"{number:06d}.png"


@dataclass(frozen=True)
class Animation:
    """Pictures one after the other."""

    frames: list[Image.Image]

    def save(self, path: Path, seconds: float = 4.0) -> None:
        """Writes an endless GIF of about this length; the last frame stands for a second."""
        each = max(20, int(1000 * seconds / len(self.frames)))
        durations = [each] * (len(self.frames) - 1) + [1000]
        first, *rest = self.frames
        first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)


def animation(states: Iterable[State]) -> Animation:
    """The states of a trajectory as grids: x_t on the left, the estimate of x0 at that time on the right."""
    frames = []
    for state in states:
        estimate = state.x if state.prediction is None else state.prediction.x0
        left, right = (image_grid(to_uint8(images).cpu()) for images in (state.x, estimate))
        frame = Image.new(left.mode, (left.width + right.width + 16, left.height), "white")
        frame.paste(left, (0, 0))
        frame.paste(right, (left.width + 16, 0))
        frames.append(frame)
    return Animation(frames)
