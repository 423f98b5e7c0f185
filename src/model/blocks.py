"""Blocks of the DDPM network (Ho et al. 2020, appendix B), with their initialisation."""

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from src.model.attention import attend

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def xavier(layer: Layer, parts: int = 1) -> Layer:
    """Initialises a layer in place as the DDPM code does, with zero biases, and returns it.

    Uniform variance scaling with the mean of fan-in and fan-out and scale 1 (`default_init` in nn.py of the
    code of Ho et al. 2020), which is the Xavier uniform distribution (Glorot and Bengio 2010, eq. 16).

    Args:
        layer: the layer.
        parts: number of equal layers stacked in this one; the fan-out is that of one part.
    """
    for weight in layer.weight.detach().chunk(parts):
        nn.init.xavier_uniform_(weight)
    nn.init.zeros_(layer.bias)
    return layer


def zero(layer: Layer) -> Layer:
    """Initialises a layer to zero in place and returns it; used for the last layer of a residual branch.

    The DDPM code scales these weights by 1e-10; Nichol and Dhariwal (2021) use exact zeros.
    """
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Group normalisation with the epsilon of the published DDPM networks (PyTorch's default is 1e-5)."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class SelfAttention(nn.Module):
    """Single-head self-attention over the pixels, with a residual connection.

    Args:
        channels: a multiple of `groups`.
        groups: groups of the normalisation.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.qkv = xavier(nn.Linear(channels, 3 * channels), parts=3)
        self.projection = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        # The fused kernels require (B, heads, pixels, channels) with contiguous channels.
        query, key, value = self.qkv(pixels).unsqueeze(1).chunk(3, dim=-1)
        mixed = attend(query, key, value).squeeze(1)
        return x + self.projection(mixed).transpose(1, 2).reshape(x.shape)


class CrossAttention(nn.Module):
    """Attention of the pixels to the tokens of a text, with a residual connection.

    As in latent diffusion (Rombach et al. 2022, arXiv:2112.10752, eq. 3), but without the feed-forward layer. Keys and
    values are computed from the normalised tokens, since encoders differ in scale.

    Args:
        channels: a multiple of `groups` and of the number of heads.
        token_channels: width of a token.
        groups: groups of the normalisation.
    """

    HEAD = 32
    """Channels of a head, where they divide the channels of the pixels; otherwise there is one head."""

    def __init__(self, channels: int, token_channels: int, groups: int):
        super().__init__()
        self.heads = channels // self.HEAD if channels % self.HEAD == 0 else 1
        self.norm = group_norm(channels, groups)
        self.token_norm = nn.LayerNorm(token_channels)
        self.query = xavier(nn.Linear(channels, channels))
        self.key_value = xavier(nn.Linear(token_channels, 2 * channels), parts=2)
        self.projection = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, C, H, W), (B, L, token_channels), bool (B, L) with at least one True each -> (B, C, H, W)."""
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        query = self.query(pixels).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key_value = self.key_value(self.token_norm(tokens)).unflatten(2, (2 * self.heads, -1)).transpose(1, 2)
        key, value = key_value.chunk(2, dim=1)
        mixed = attend(query, key, value, mask[:, None, None])
        return x + self.projection(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)


class ResidualBlock(nn.Module):
    """A residual block of two convolutions with the time embedding added in between, and optional attention.

        h = conv1(silu(norm1(x))) + embedding_projection(embedding)
        h = conv2(dropout(silu(norm2(h)))) + shortcut(x)

    Args:
        in_channels, out_channels: multiples of `groups`.
        embedding_channels: width of the time and class embedding.
        attention: whether self-attention follows, and cross-attention if there are tokens.
        dropout: probability, in [0, 1].
        groups: groups of the normalisation.
        token_channels: width of the tokens of a text; 0 for a network without text.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_channels: int,
        attention: bool,
        dropout: float,
        groups: int,
        token_channels: int = 0,
    ):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = xavier(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.embedding_projection = xavier(nn.Linear(embedding_channels, out_channels))
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = xavier(nn.Conv2d(in_channels, out_channels, 1))
        self.attention = SelfAttention(out_channels, groups) if attention else nn.Identity()
        self.cross_attention = None
        if attention and token_channels:
            self.cross_attention = CrossAttention(out_channels, token_channels, groups)

    def forward(self, x: Tensor, embedding: Tensor, text: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, in_channels, H, W), (B, embedding_channels) after SiLU -> (B, out_channels, H, W).

        `text` are the tokens and the mask of `CrossAttention`, in a network with text.
        """
        h = self.conv1(F.silu(self.norm1(x)))
        # In place, since a convolution's backward pass does not need its output.
        h += self.embedding_projection(embedding)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        h += self.shortcut(x)
        h = self.attention(h)
        return h if self.cross_attention is None else self.cross_attention(h, *text)


class Downsample(nn.Module):
    """Halves height and width by a convolution with stride 2.

    Zeros are padded at the right and the bottom only. This is TensorFlow's "SAME" padding for even sizes, which the
    published networks use.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = xavier(nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2), H and W even."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width by nearest-neighbour upsampling, followed by a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = xavier(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
