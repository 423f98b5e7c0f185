"""The one place where pixel bytes become the numbers that networks see, and the way back."""

import torch
from torch import Tensor


def to_model_range(images: Tensor) -> Tensor:
    """x / 127.5 - 1: bytes in [0, 255] to float32 in [-1, 1].

    Args:
        images: uint8, any shape.

    Raises:
        TypeError: for any other dtype, whose range is anyone's guess.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"to_model_range takes uint8 images, not {images.dtype}")
    return images.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(x: Tensor) -> Tensor:
    """clip(round((x + 1) * 127.5), 0, 255): the inverse of `to_model_range`, exact for all 256 bytes.

    Args:
        x: floating point, nominally in [-1, 1]; what lies outside is clipped. Half precision is computed in
            float32.

    Raises:
        TypeError: if x is not floating point.
    """
    if not x.is_floating_point():
        raise TypeError(f"to_uint8 takes floating point images in [-1, 1], not {x.dtype}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
