"""The images and masks that tasks start from: files, images of the data, generated masks."""

import math
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from src.conditioning import Condition, Conditioning
from src.data.decode import decode, fit, problem
from src.data.source import Split
from src.errors import UserError
from src.generation.loaded import LoadedRun
from src.randomness import generator

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MASKS = ("box", "right", "random")
OWN_CONDITION = "image i has its own condition"


class Inputs(NamedTuple):
    """The images of a task.

    Attributes:
        images: uint8, shape (n, C, H, W), on the CPU.
        condition: of the data; None for files.
        record: where they come from, with a hash of their pixels.
        filled: pixels that a task fills, bool, shape (n, 1, H, W).
    """

    images: Tensor
    condition: Condition | None
    record: dict[str, Any]
    filled: Tensor | None = None

    @property
    def from_files(self) -> bool:
        """Whether the images come from files, not from the data."""
        return self.condition is None

    def describe_condition(self, conditioning: Conditioning | None) -> str:
        """A description of the condition of image i, for records; see `condition_of`."""
        if conditioning is None:
            return "none"
        own = not self.from_files or "image" in conditioning.kinds
        return OWN_CONDITION if own else conditioning.describe_samples()

    def condition_of(self, loaded: LoadedRun, numbers: range, x0: Tensor) -> Condition | None:
        """What the network reads for the encoded images with these numbers, on the denoiser's device.

        Files have no labels or texts: file i gets those of image i of a sampling run.
        """
        conditioning = loaded.recipe.conditioning
        if conditioning is None:
            return None
        if self.condition is not None:
            return loaded.condition_of(self.condition.index(slice(numbers.start, numbers.stop)), x0)
        if "image" in conditioning.kinds:
            return loaded.condition_of(Condition(), x0)
        return conditioning.of_samples(numbers, loaded.recipe.seed).to(loaded.device)


def inputs_of(
    loaded: LoadedRun,
    images: str | None,
    split: Split,
    n: int,
    shape: Sequence[int] | None = None,
    scaled: bool = False,
) -> Inputs:
    """The first n images of a file or folder, or of a split of the run's data if `images` is None.

    Args:
        loaded: the run.
        images: a file, or a folder of files, which are sorted by name; there may be fewer than n.
        split: the split of the data.
        n: number of images.
        shape: (C, H, W) that files must have; by default that of the run's images.
        scaled: scale, crop and convert files to this shape, as data=image_folder does, instead of refusing others.

    Raises:
        UserError: there is no such file, it is not an image of this shape, or the split has fewer images.
    """
    if images is not None:
        shape = tuple(shape or loaded.recipe.codec.image_shape)
        files = files_of(images, "task.images")[:n]
        pixels = torch.stack([read_image(file, shape, "task.images", scaled) for file in files])
        return Inputs(pixels, None, _record(images, pixels))
    data = loaded.images(split, range(n))
    pixels = data.images(range(n))
    return Inputs(pixels, data.condition(range(n)), _record(f"{loaded.source.name}, {split} split", pixels))


def masks_of(mask: str, share: float, shape: Sequence[int], seed: int, n: int) -> tuple[Tensor, dict]:
    """The pixels to fill of n images, and the masks' record.

    Args:
        mask: a file, or a folder with one file for each image, sorted by name: white is filled, black is kept; or a
            generated mask: "box" (in the centre), "right" (the columns at the right) or "random" (pixels, drawn from
            (seed, "mask", i)).
        share: share of a generated mask's pixels that is filled, in (0, 1].
        shape: (C, H, W) of the images.
        seed: the sampling seed.
        n: number of images.

    Returns:
        bool, shape (n, 1, H, W), True where a pixel is filled.

    Raises:
        ValueError: share is out of range.
        UserError: there is no such file, or it has another size or no white pixel.
    """
    check_share(share)
    _, height, width = shape
    filled = torch.zeros(n, 1, height, width, dtype=torch.bool)
    if mask == "box":
        h, w = (max(1, round(side * math.sqrt(share))) for side in (height, width))
        top, left = (height - h) // 2, (width - w) // 2
        filled[..., top : top + h, left : left + w] = True
    elif mask == "right":
        filled[..., width - max(1, round(width * share)) :] = True
    elif mask == "random":
        for i, image in enumerate(filled):
            image[:] = torch.rand(1, height, width, generator=generator(seed, "mask", i)) < share
    else:
        filled = _masks_from_files(mask, (height, width), n)
    return filled, _record(mask, filled.to(torch.uint8) * 255)


def check_share(share: float) -> None:
    """Raises ValueError if the share of the pixels to fill is out of range."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")


def mask_files(mask: str) -> list[Path]:
    """The files of masks that a path names; see `files_of`."""
    if not Path(mask).expanduser().exists():
        raise UserError(
            f"task.mask={mask}: no such file or folder; give one, or a generated mask: {', '.join(MASKS)}"
        )
    return files_of(mask, "task.mask")


def _masks_from_files(mask: str, size: tuple[int, int], n: int) -> Tensor:
    files = mask_files(mask)
    if len(files) not in (1, n):
        raise UserError(
            f"task.mask={mask}: {len(files)} files for {n} images; give one for all, or one for each image"
        )
    filled = torch.stack([read_image(file, (1, *size), "task.mask") >= 128 for file in files])
    for file, one in zip(files, filled, strict=True):
        if not one.any():
            raise UserError(f"task.mask: {file} has no white pixel, so nothing is filled; white is filled")
    return filled.expand(n, -1, -1, -1)


def files_of(path: str, option: str) -> list[Path]:
    """The image files that a path names: itself, or those of a folder, sorted by name.

    Raises:
        UserError: there is no such file or folder, or the folder has no image files.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UserError(f"{option}={path}: no such file or folder")
    files = sorted(
        file for file in place.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != "."
    )
    if not files:
        raise UserError(f"{option}={path}: the folder has no image files ({', '.join(sorted(SUFFIXES))})")
    return files


def read_image(file: Path, shape: Sequence[int], option: str, scaled: bool = False) -> Tensor:
    """An image file as uint8, shape (C, H, W). Grey files are repeated into RGB; only `scaled` changes other values.

    Args:
        file: the file.
        shape: (C, H, W) that it must have.
        option: names the file's option in errors.
        scaled: scale and crop it to this size, and convert colour to grey for C = 1, as data=image_folder does.

    Raises:
        UserError: it cannot be read, or has another size or colours that grey images do not have.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise UserError(
            f"{option}: this run's images have {channels} channels, and image files have 1 or 3; leave {option} out"
        )
    try:
        picture = decode(file.read_bytes(), channels if scaled else 3)
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"{option}: {file} cannot be read: {problem(error)}") from None
    if not scaled and picture.size != (width, height):
        found = f"{picture.size[0]} x {picture.size[1]}"
        raise UserError(
            f"{option}: {file} has {found} pixels and must have {width} x {height} (width x height); resize it"
        )
    pixels = fit(picture, height, width) if scaled else torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    if len(pixels) == channels:
        return pixels.contiguous()
    if (pixels != pixels[:1]).any():
        raise UserError(
            f"{option}: {file} is in colour, and must be grey; convert it, e.g. by Pillow's convert('L')"
        )
    return pixels[:1].contiguous()


def _record(origin: str, pixels: Tensor) -> dict[str, Any]:
    digest = sha256(f"{tuple(pixels.shape)}".encode())
    digest.update(pixels.contiguous().numpy().tobytes())
    return {"from": origin, "number": len(pixels), "sha256": digest.hexdigest()}
