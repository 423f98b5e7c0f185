"""Augmentation that does not leak into samples: the network is given what was done to an image."""

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from src.randomness import draws_at, generator

# Standard deviations of scalings (as a power of 2) and of translations (as a fraction of the image's size).
SCALE, TRANSLATION = 0.2, 1 / 8
TRANSFORMATIONS = ("flip_x", "flip_y", "scaling", "rotation", "anisotropy", "translation")
"""In the order in which they are applied."""


class GeometricAugmentation:
    """Geometric augmentation of EDM (Karras et al. 2022, arXiv:2206.00364, appendix F.2, table 6).

    Eight random numbers a0, ..., a7 describe the transformations of an image, in this order:

        flip in x       a0 in {0, 1}                        network's input  a0
        flip in y       a1 in {0, 1}                                         a1
        scaling         2^(0.2 a2),     a2 ~ N(0, 1)                         a2
        rotation        by a3,          a3 ~ U(-pi, pi)                      cos a3 - 1, sin a3
        anisotropy      2^(0.2 a5) along the direction a4 and 2^(-0.2 a5) across it,
                        a4 ~ U(-pi, pi), a5 ~ N(0, 1)                        a5 cos a4, a5 sin a4
        translation     by a6/8 of the width and a7/8 of the height,
                        a6, a7 ~ N(0, 1)                                     a6, a7

    Each is applied with a probability, except for the flip in x, which is drawn for every image as in the authors'
    runs; the numbers of the others are 0. An image that was not changed has the input 0, and so have sampled images.

    Flips are exact. All other transformations of an image are one bicubic interpolation, of the image mirrored at its
    borders. The authors sample an image of twice the size between two low-pass filters: theirs has no aliasing where
    an image shrinks. Interpolation may leave [-1, 1] slightly, as theirs.

    Args:
        probability: of each transformation, in [0, 1]; 0.12 in the paper for CIFAR-10. 0 changes nothing.
        without: those of `TRANSFORMATIONS` that are left out, or None; their inputs are 0, and the others stay.

    Attributes:
        channels: size of the network's input.

    Raises:
        ValueError: an argument is out of range.
    """

    channels = 9

    def __init__(self, probability: float = 0.12, without: Collection[str] | None = None):
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {probability:g}")
        without = without or ()
        if unknown := set(without).difference(TRANSFORMATIONS):
            raise ValueError(
                f"without={list(without)}: there is no {', '.join(sorted(unknown))}; choose from"
                f" {', '.join(TRANSFORMATIONS)}"
            )
        self.probability = probability
        self.used = torch.tensor([name not in without for name in TRANSFORMATIONS])

    def __call__(self, x0: Tensor, positions: Tensor, seed: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Transforms training images.

        Everything is drawn for the whole global batch, keyed by (seed, "augmentation", batch number).

        Args:
            x0: images, shape (b, C, H, W).
            positions: positions in the training stream, int64, shape (b,), on the CPU.
            seed: the run's seed.
            batch_size: the global batch size.

        Returns:
            The transformed images, and the network's input, shape (b, channels), x0's dtype.
        """
        numbers = draws_at(
            positions, batch_size, lambda k: self.draw(batch_size, generator(seed, "augmentation", k))
        )
        return transformed(x0, numbers), inputs(numbers).to(x0, non_blocking=True)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """a0, ..., a7 of n images, float64, shape (n, 8), on the CPU."""
        options = {"generator": generator, "dtype": torch.float64}
        applied = torch.rand(n, 6, **options) < self.probability
        applied[:, 0] = self.probability > 0
        applied &= self.used
        flips = torch.rand(n, 2, **options) < 0.5
        a2, a5, a6, a7 = torch.randn(4, n, **options)
        a3, a4 = math.pi * (2 * torch.rand(2, n, **options) - 1)
        values = torch.stack((*flips.T.double(), a2, a3, a4, a5, a6, a7), dim=1)
        return values * applied[:, [0, 1, 2, 3, 4, 4, 5, 5]]


def inputs(numbers: Tensor) -> Tensor:
    """The network's input for a0, ..., a7, shape (n, 9)."""
    a0, a1, a2, a3, a4, a5, a6, a7 = numbers.unbind(1)
    turned = (a3.cos() - 1, a3.sin(), a5 * a4.cos(), a5 * a4.sin())
    return torch.stack((a0, a1, a2, *turned, a6, a7), dim=1)


def transformed(x0: Tensor, numbers: Tensor) -> Tensor:
    """Images transformed by a0, ..., a7.

    Args:
        x0: shape (n, C, H, W).
        numbers: float64, shape (n, 8), on the CPU.
    """
    for column, dim in ((0, 3), (1, 2)):
        flip = numbers[:, column, None, None, None].bool().to(x0.device, non_blocking=True)
        x0 = torch.where(flip, x0.flip(dim), x0)
    rows = numbers[:, 2:].any(dim=1).nonzero()[:, 0]  # on the CPU
    if len(rows) == 0:
        return x0
    on = rows.to(x0.device, non_blocking=True)
    chosen = x0[on].to(torch.promote_types(x0.dtype, torch.float32))
    theta = _sampled_from(numbers[rows], *x0.shape[2:]).to(chosen, non_blocking=True)
    grid = F.affine_grid(theta, chosen.shape, align_corners=False)
    moved = F.grid_sample(chosen, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return x0.index_copy(0, on, moved.to(x0.dtype))


def _sampled_from(numbers: Tensor, height: int, width: int) -> Tensor:
    """Where a pixel comes from, as a map of (x, y, 1) in coordinates from -1 to 1; shape (n, 2, 3).

    The transformations move pixels in coordinates of pixels, x to the right and y down, with the centre at 0.
    """
    _, _, a2, a3, a4, a5, a6, a7 = numbers.unbind(1)
    stretch = torch.stack((SCALE * a5, -SCALE * a5), dim=1).exp2().diag_embed()
    linear = _rotation(a4) @ stretch @ _rotation(-a4) @ _rotation(-a3) * (SCALE * a2).exp2()[:, None, None]
    shift = TRANSLATION * torch.stack((a6 * width, a7 * height), dim=1)
    inverse = torch.linalg.inv(linear)
    half = torch.tensor([width, height], dtype=numbers.dtype) / 2
    origin = -(inverse @ shift[:, :, None])[:, :, 0] / half
    return torch.cat((inverse * half / half[:, None], origin[:, :, None]), dim=2)


def _rotation(angle: Tensor) -> Tensor:
    """(n,) -> (n, 2, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((cos, -sin, sin, cos), dim=1).unflatten(1, (2, 2))
