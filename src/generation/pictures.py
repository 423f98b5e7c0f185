"""Image files: grids, single images and animations."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from src.data.codec import Codec
from src.diffusion.sampler import State


def image_grid(images: Tensor, columns: int | None = None, smallest: int = 256) -> Image.Image:
    """A grid of images with a gap of one pixel.

    Args:
        images: uint8, shape (B, C, H, W); if C is not 1 or 3, the channels are shown side by side in grey.
        columns: images per row; by default the square root of B, rounded up.
        smallest: a narrower grid is enlarged by an integer factor (nearest neighbour) to at least this width.
    """
    from torchvision.utils import make_grid

    columns = columns or math.ceil(math.sqrt(len(images)))
    if images.shape[1] not in (1, 3):
        images = images.movedim(1, 2).flatten(2)[:, None]
    grid = make_grid(images.cpu(), nrow=columns, padding=1, pad_value=128)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    factor = max(1, math.ceil(smallest / picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def captioned_grid(images: Tensor, texts: Sequence[str] | None, columns: int | None = None) -> Image.Image:
    """A grid with a text below each image, shortened to three lines; without texts, `image_grid`.

    Args:
        images: uint8, shape (B, C, H, W); enlarged by an integer factor (nearest neighbour) to at least 96 pixels.
        texts: B texts, or None.
        columns: images per row; by default the square root of B, rounded up.
    """
    if texts is None:
        return image_grid(images, columns)
    columns = columns or math.ceil(math.sqrt(len(images)))
    font = ImageFont.load_default(size=12)
    pictures = [image_grid(image[None], 1, smallest=96).convert("RGB") for image in images]
    width, height = pictures[0].size
    line = sum(font.getmetrics())
    cell = height + 3 * line + 6
    grid = Image.new("RGB", (columns * (width + 6), -(-len(pictures) // columns) * cell), "white")
    draw = ImageDraw.Draw(grid)
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x, y = i % columns * (width + 6) + 3, i // columns * cell
        grid.paste(picture, (x, y))
        for k, part in enumerate(_wrapped(text, font, width)[:3]):
            draw.text((x + width / 2, y + height + 2 + k * line), part, font=font, fill="black", anchor="ma")
    return grid


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels; a longer word is cut."""
    lines: list[str] = []
    for word in text.split():
        while len(word) > 1 and font.getlength(word) > width:
            word = word[:-1]
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def image_rows(*rows: Tensor, columns: int = 16) -> Image.Image:
    """A grid in which the images of each row stand directly above those of the next.

    Args:
        rows: uint8, each of shape (B, C, H, W).
        columns: largest number of images beside each other.
    """
    columns = min(len(rows[0]), columns)
    blocks = [part for parts in zip(*(row.split(columns) for row in rows), strict=True) for part in parts]
    return image_grid(torch.cat(blocks), columns=columns)


def save_images(images: Tensor, folder: Path, first: int) -> None:
    """Writes images as <folder>/000000.png, ..., numbered from `first`; uint8, shape (B, C, H, W).

    Images whose number of channels is not 1 or 3 are saved as NumPy files, <folder>/000000.npy. Each file is renamed to
    its final name when it is complete, so that a killed process leaves no partial image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images.cpu().numpy(), start=first):
        path = image_path(folder, number, len(image))
        unfinished = folder / f".{number:06d}.{os.getpid()}.tmp"
        with unfinished.open("wb") as file:
            if path.suffix == ".npy":
                np.save(file, image)
            else:
                Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, "PNG")
        unfinished.replace(path)


def read_images(folder: Path, numbers: range, channels: int) -> Tensor | None:
    """The images with these numbers, as written by `save_images`, uint8 (B, C, H, W); None if one cannot be read."""
    images = []
    for number in numbers:
        path = image_path(folder, number, channels)
        try:
            if path.suffix == ".npy":
                pixels = np.load(path, allow_pickle=False)
            else:
                with Image.open(path, formats=["PNG"]) as image:
                    pixels = np.array(image)
        except (OSError, ValueError, SyntaxError):
            return None
        if path.suffix == ".png":
            pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        images.append(torch.from_numpy(np.ascontiguousarray(pixels)))
    return torch.stack(images)


def image_path(folder: Path, number: int, channels: int) -> Path:
    """The file of the image with this number."""
    return folder / f"{number:06d}.{'png' if channels in (1, 3) else 'npy'}"


@dataclass(frozen=True)
class Animation:
    """A sequence of frames."""

    frames: list[Image.Image]

    def save(self, path: Path, seconds: float = 4.0) -> None:
        """Writes a looping GIF of about this length plus one second, for which the last frame is shown."""
        each = max(20, int(1000 * seconds / len(self.frames)))
        durations = [each] * (len(self.frames) - 1) + [1000]
        first, *rest = self.frames
        first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)


def animation(states: Iterable[State], codec: Codec) -> Animation:
    """Animates a trajectory: a grid of x_t on the left, a grid of the x0 estimates on the right."""
    frames = []
    for state in states:
        estimate = state.x if state.prediction is None else state.prediction.x0
        left, right = (image_grid(codec.decode(images)) for images in (state.x, estimate))
        frame = Image.new(left.mode, (left.width + right.width + 16, left.height), "white")
        frame.paste(left, (0, 0))
        frame.paste(right, (left.width + 16, 0))
        frames.append(frame)
    return Animation(frames)
