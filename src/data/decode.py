"""Image files of the usual formats -> 8-bit grey or RGB pixels, without a silent change of meaning."""

from contextlib import suppress
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# Pillow identifies files by content, and some of its decoders start other programs (EPS starts Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
BACKGROUND = (255, 255, 255)
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
"""TIFF tags."""


class Header(NamedTuple):
    """Attributes:
    bits: per channel, as stored.
    frames: number of frames of an animation or stack.
    """

    bits: int
    frames: int


def verify(content: bytes) -> Header:
    """Checks checksums, since decoding alone accepts damaged ends of PNGs.

    Raises:
        what Pillow raises on a damaged file or one of another format.
    """
    with Image.open(BytesIO(content), formats=FORMATS) as image:
        frames = 1
        if image.format != "MPO":  # a photograph and its previews
            with suppress(Exception):  # a fault behind the first frame does not matter
                frames = getattr(image, "n_frames", 1)
        header = Header(_bits(image, content), frames)
        image.verify()
    return header


def decode(content: bytes, channels: int, white: float | None = None) -> Image.Image:
    """The picture in a file's bytes, upright, with 8 bits per channel.

    The EXIF orientation is applied. Transparency is composited on white. Grey with more than 8 bits becomes
    round(255 v / white), with v in [0, white]; colour with more than 8 bits keeps the high byte. Grey is
    repeated into RGB; colour becomes grey by ITU-R 601 luma. CMYK is converted by the plain formula; colour
    profiles are not applied. Of several frames the first is decoded.

    Args:
        content: the file.
        channels: 1 or 3.
        white: value of white in grey files with more than 8 bits, in integers of 32 bits, in signed integers and
            in floats. None: 2^bits - 1 for unsigned integers of up to 16 bits, 1 for floats; the others are refused.

    Raises:
        ValueError: white is unknown, or values lie outside [0, white].
        OSError, SyntaxError, Image.DecompressionBombError, ...: what Pillow raises on a damaged file.
    """
    opened = Image.open(BytesIO(content), formats=FORMATS)
    bits, tags = _bits(opened, content), getattr(opened, "tag_v2", {})
    signed = 2 in tags.get(SAMPLE_FORMAT, ())
    image = ImageOps.exif_transpose(opened)
    image.load()
    if image.mode.startswith(("I", "F")) or signed:
        values = np.asarray(image).view(np.int8) if bits == 8 else np.asarray(image)
        pixels = _eight_bits(values, white or _white(image.mode, bits, signed), tags.get(PHOTOMETRIC) == 0)
        if "transparency" in image.info:
            pixels[values == image.info["transparency"]] = 255
        image = Image.fromarray(pixels)
    elif bits > 8 and white is not None:
        raise ValueError(f"{bits} bits of colour, to which data.white={white:g} cannot be applied")
    elif image.has_transparency_data:
        _scale_transparency(image, bits)
        picture = image.convert("RGBA")
        image = Image.new("RGBA", picture.size, (*BACKGROUND, 255))
        image.alpha_composite(picture)
        # To grey through RGB, which keeps the greys of LA exactly.
        image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def fit(image: Image.Image, height: int, width: int) -> Tensor:
    """Scales an image until it covers height x width (Lanczos, antialiased) and crops the centre.

    Args:
        image: mode L or RGB, any size. One that fits already stays as it is.

    Returns:
        uint8 (C, height, width).
    """
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(fitted))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def problem(error: Exception) -> str:
    """What is wrong with a file that could not be decoded, in a few words for a list of files."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__


def _bits(image: Image.Image, content: bytes) -> int:
    if image.format == "PNG":
        return content[24]  # the bit depth in IHDR
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))
    return 8


def _white(mode: str, bits: int, signed: bool) -> float:
    if mode == "F":
        return 1.0
    if mode.startswith("I;16") and not signed:
        return 2.0**bits - 1  # TIFF has 12 bits too
    kind = f"{'signed ' if signed else ''}integers of {bits} bits"
    raise ValueError(f"{kind}, whose white point is unknown: set data.white")


def _eight_bits(values: np.ndarray, white: float, white_is_zero: bool) -> np.ndarray:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):
        raise ValueError(f"values from {low:g} to {high:g}, not within [0, {white:g}]; data.white sets white")
    if white_is_zero:  # which Pillow applies to 8 bits only
        values = white - values
    return np.rint(values * 255.0 / white).astype(np.uint8)


def _scale_transparency(image: Image.Image, bits: int) -> None:
    """Scales a PNG's transparent value as Pillow scales pixels, which are compared with it."""
    value = image.info.get("transparency")
    if image.mode == "L" and isinstance(value, int) and bits in (2, 4):
        image.info["transparency"] = value * 255 // (2**bits - 1)
    elif image.mode == "RGB" and isinstance(value, tuple) and bits == 16:
        image.info["transparency"] = tuple(v >> 8 for v in value)
