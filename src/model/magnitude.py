"""Layers that preserve the magnitude of activations (EDM2, Karras et al. 2024, arXiv:2312.02696, sec. 2 and app. B).

If the inputs have expected unit magnitude (root mean square over channels), so have the outputs.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-4


def unit_magnitude(x: Tensor, dims: Sequence[int]) -> Tensor:
    """x divided by its root mean square over `dims`, which is computed in at least float32; same dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rms = wide.square().mean(dim=tuple(dims), keepdim=True).sqrt()
    return (wide / (rms + EPSILON)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) / 0.596, the root mean square of silu for normal x (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2) for independent a and b (eq. 88)."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenates channels; b contributes a fraction t, independent of the numbers of channels (eq. 103)."""
    channels = a.shape[1] + b.shape[1]
    scale = math.sqrt(channels) / math.hypot(1 - t, t)
    return torch.cat(
        (a * (scale * (1 - t) / math.sqrt(a.shape[1])), b * (scale * t / math.sqrt(b.shape[1]))), dim=1
    )


class MPFourier(nn.Module):
    """sqrt(2) cos(2 pi (frequency label + phase)) with random frequencies and phases (eq. 75).

    The frequencies are standard normal, for labels of the order of 1, such as ln(sigma)/4.

    Args:
        channels: number of features.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, label: Tensor) -> Tensor:
        """(B,) -> (B, channels), in the dtype of the buffers."""
        angles = torch.addcmul(self.phases.float(), label.float()[:, None], self.frequencies.float())
        return (math.sqrt(2) * angles.cos()).to(self.phases.dtype)


class MPLayer(nn.Module):
    """A convolution or linear layer without bias, whose weights of each output are normalised (eq. 47).

    The gradient is that of the normalised weights, which is orthogonal to them, so that the stored weights grow.
    `normalise` divides them by their magnitude after each optimiser step ("forced weight normalisation", eq. 66), which
    keeps the effective learning rate. It does not change the function, nor is it part of the forward pass, so that it
    needs no care with torch.compile, DistributedDataParallel or derivatives.

    Args:
        in_channels, out_channels: channels.
        kernel: side length of the kernel, odd; 0 for a linear layer.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 0):
        super().__init__()
        self.kernel = kernel
        shape = (kernel, kernel) if kernel else ()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *shape))
        self.normalise()

    @torch.no_grad()
    def normalise(self) -> None:
        """Divides the weights of each output by their root mean square, in place."""
        self.weight.copy_(unit_magnitude(self.weight, range(1, self.weight.dim())))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """(B, in_channels, ...) -> (B, out_channels, ...), times the gain."""
        weight = unit_magnitude(self.weight, range(1, self.weight.dim()))
        weight = (weight * (gain / math.sqrt(weight[0].numel()))).to(x.dtype)
        return F.conv2d(x, weight, padding=self.kernel // 2) if self.kernel else F.linear(x, weight)
