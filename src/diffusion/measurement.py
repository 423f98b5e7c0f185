"""Linear measurements of images: y = A x0 + n with n ~ N(0, noise^2 I).

Each operator A knows its adjoint and the solution of (scale A A^T + shift I) z = y, which posterior sampling needs
(`restoration`).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class Operator(ABC):
    """A linear map A of images, shape (B, C, H, W), to measurements."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A x."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, of the images' shape: <A x, y> = <x, A^T y>."""

    @abstractmethod
    def solve(self, y: Tensor, scale: float, shift: float) -> Tensor:
        """(scale A A^T + shift I)^-1 y for y in the range of A; scale and shift are at least 0, and not both 0."""

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """A^T (A A^T)^-1 y, the smallest image with the measurement y."""
        return self.adjoint(self.solve(y, 1.0, 0.0))


class Mask(Operator):
    """Some pixels are measured, the others read 0: A A^T = 1 on the measured ones.

    Args:
        known: the measured pixels, bool, shape (B, 1, H, W), (1, 1, H, W) or the images' shape.
    """

    def __init__(self, known: Tensor):
        self.known = known

    def __call__(self, x):
        return x * self.known

    def adjoint(self, y):
        return y * self.known

    def solve(self, y, scale, shift):
        return y / (scale + shift)


class Downsample(Operator):
    """The mean of each block of factor x factor pixels: A A^T = 1 / factor^2.

    Args:
        factor: at least 1; divides the height and width of the images.

    Raises:
        ValueError: factor is below 1.
    """

    def __init__(self, factor: int = 2):
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        self.factor = factor

    def __call__(self, x):
        return F.avg_pool2d(x, self.factor)

    def adjoint(self, y):
        return enlarged(y, self.factor) / self.factor**2

    def solve(self, y, scale, shift):
        return y / (scale / self.factor**2 + shift)


def enlarged(y: Tensor, factor: int) -> Tensor:
    """Each pixel repeated to a block of factor x factor pixels."""
    return y.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


class Blur(Operator):
    """A Gaussian blur, symmetric at the borders, as scipy.ndimage.gaussian_filter(mode="reflect").

    The kernel is sampled at whole pixels and cut off at 4 standard deviations. On images extended by their mirror
    image the blur is a circular convolution, so A is symmetric and a product with real factors in Fourier space.

    Args:
        std: standard deviation of the kernel in pixels, above 0.

    Raises:
        ValueError: std is not positive.
    """

    def __init__(self, std: float = 1.0):
        if std <= 0:
            raise ValueError(f"std must be positive, got {std}")
        self.std = std

    def __call__(self, x):
        return self._filter(x, self._factors(x))

    def adjoint(self, y):
        return self(y)

    def solve(self, y, scale, shift):
        return self._filter(y, 1 / (scale * self._factors(y).square() + shift))

    def _factors(self, x: Tensor) -> Tensor:
        """The factors of the two-dimensional frequencies, shape (2H, W + 1)."""
        height, width = x.shape[-2:]
        return torch.outer(self._factors_of(height, 2 * height, x), self._factors_of(width, width + 1, x))

    def _factors_of(self, side: int, count: int, x: Tensor) -> Tensor:
        """sum_j w_j cos(pi k j / side) for the frequencies k = 0, ..., count - 1."""
        radius = int(4 * self.std + 0.5)
        places = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
        weights = (-(places**2) / (2 * self.std**2)).softmax(dim=0)
        frequencies = torch.arange(count, device=x.device, dtype=x.dtype) * (math.pi / side)
        return torch.outer(frequencies, places).cos() @ weights

    @staticmethod
    def _filter(x: Tensor, factors: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        mirrored = torch.cat([x, x.flip(-2)], dim=-2)
        mirrored = torch.cat([mirrored, mirrored.flip(-1)], dim=-1)
        filtered = torch.fft.irfft2(torch.fft.rfft2(mirrored) * factors, s=mirrored.shape[-2:])
        return filtered[..., :height, :width]


@dataclass(frozen=True)
class Measurement:
    """What is known about the images of a batch.

    Attributes:
        operator: A.
        y: the measurements, A x0 + n, in the codec's range.
        noise: standard deviation of n.
    """

    operator: Operator
    y: Tensor
    noise: float = 0.0

    def residual(self, x0: Tensor) -> Tensor:
        """y - A x0."""
        return self.y - self.operator(x0)
