"""Embeddings of the time."""

import math

import torch
from torch import Tensor, nn

from src.model.blocks import xavier


def sinusoidal_embedding(label: Tensor, dim: int, frequency_shift: int = 1) -> Tensor:
    """Sines and cosines of the time at `dim / 2` geometrically spaced frequencies.

        [sin(label w_0), ..., sin(label w_{h-1}), cos(label w_0), ..., cos(label w_{h-1})]
        w_i = 10000^(-i / (h - frequency_shift)),   h = dim / 2

    The default is the form of the DDPM code (Ho et al. 2020): sines first, and h - 1 in the exponent. The transformer
    (Vaswani et al. 2017, section 3.5) interleaves sines and cosines and uses h.

    Args:
        label: the time, shape (B,), float or integer; not necessarily integer-valued.
        dim: an even number, at least 4.
        frequency_shift: 1 as in the DDPM code, or 0 as in the transformer and in OpenAI's networks.

    Returns:
        Shape (B, dim), always float32: bfloat16 would round a label of 999 to 1000, an error of one radian.
    """
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=label.device)
    frequency = torch.exp(-math.log(10000) * i / (half - frequency_shift))
    angle = label.float()[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=1)


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding followed by a two-layer perceptron (Ho et al. 2020, appendix B).

    Args:
        dim: width of the sinusoidal embedding, an even number, at least 4.
        embedding_channels: width of both layers.
        frequency_shift: see `sinusoidal_embedding`.

    Raises:
        ValueError: frequency_shift is neither 0 nor 1.
    """

    def __init__(self, dim: int, embedding_channels: int, frequency_shift: int = 1):
        super().__init__()
        if frequency_shift not in (0, 1):
            raise ValueError(f"frequency_shift must be 0 or 1, got {frequency_shift}")
        self.dim, self.frequency_shift = dim, frequency_shift
        self.linear1 = xavier(nn.Linear(dim, embedding_channels))
        self.linear2 = xavier(nn.Linear(embedding_channels, embedding_channels))

    def forward(self, label: Tensor) -> Tensor:
        """(B,) -> (B, embedding_channels)."""
        embedding = sinusoidal_embedding(label, self.dim, self.frequency_shift).to(self.linear1.weight.dtype)
        return self.linear2(nn.functional.silu(self.linear1(embedding)))
