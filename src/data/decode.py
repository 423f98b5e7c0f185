"""Image files of any kind -> 8-bit grey or RGB pixels, without a silent change of meaning."""

from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

PAPER = (255, 255, 255)


def decode(content: bytes, channels: int) -> Image.Image:
    """The picture in a file's bytes, upright, in 8 bits a channel.

    The EXIF orientation is applied. Transparency is composited on white. Of 16 bits, white is 65535: v / 257,
    rounded; float values must lie in [0, 1]. Grey is repeated into RGB; colour becomes grey by ITU-R 601
    luma. CMYK is converted by the plain formula, colour profiles are not applied. Of several frames the first
    is taken.

    Args:
        content: the file.
        channels: 1 or 3.

    Raises:
        ValueError: for pixels whose white point cannot be known.
        OSError, SyntaxError, Image.DecompressionBombError, ...: whatever Pillow raises on a damaged file.
    """
    image = ImageOps.exif_transpose(Image.open(BytesIO(content)))
    image.load()
    if image.mode.startswith("I;16") and "transparency" not in image.info:
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"float values from {values.min():g} to {values.max():g}, not within [0, 1]")
        image = Image.fromarray(np.rint(values * 255).astype(np.uint8))
    elif image.mode.startswith("I"):
        raise ValueError(f"integers of mode {image.mode}, whose white point cannot be known")
    elif image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.new("RGBA", picture.size, (*PAPER, 255))
        image.alpha_composite(picture)
        # Through RGB: converting RGBA to grey would be the same, but LA keeps its exact greys this way too.
        image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def fit(image: Image.Image, image_size: int) -> Tensor:
    """Scales the shorter side to `image_size` (Lanczos, antialiased) and cuts the centre out.

    Args:
        image: mode L or RGB, any size. One that fits already is passed on unchanged.

    Returns:
        uint8 (C, image_size, image_size).
    """
    fitted = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(fitted))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def verify(content: bytes) -> None:
    """Raises what Pillow raises if checksums do not hold: decoding alone lets damaged ends of PNGs pass."""
    with Image.open(BytesIO(content)) as image:
        image.verify()


def problem(error: Exception) -> str:
    """In a few words for a list of files: what is wrong with one that could not be decoded."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__
