"""Parts of vision transformers: positions, attention, feed-forward layers, and blocks conditioned by adaLN-zero."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.model.attention import attend
from src.model.blocks import zero


def grid_positions(height: int, width: int) -> Tensor:
    """(row, column) of each token of a grid, in row-major order: float32, shape (height width, 2)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((rows, columns), dim=-1).flatten(0, 1).float()


def _angles(positions: Tensor, count: int) -> Tensor:
    """Positions (N, 2) times the frequencies 10000^(-i / count), i < count: shape (N, 2, count)."""
    frequencies = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    return (positions.double()[:, :, None] * frequencies).float()


def fixed_embedding(positions: Tensor, dim: int) -> Tensor:
    """Sines and cosines of the column, then of the row (Vaswani et al. 2017, sec. 3.5, in two dimensions).

    Args:
        positions: (row, column) of each token, shape (N, 2).
        dim: width, a multiple of 4.

    Returns:
        Shape (N, dim).
    """
    angles = _angles(positions.flip(1), dim // 4)
    return torch.cat((angles.sin(), angles.cos()), dim=2).flatten(1)


def rotary_table(positions: Tensor, head_channels: int) -> Tensor:
    """Rotations of queries and keys by row and column (RoFormer, Su et al. 2021, arXiv:2104.09864, eq. 34, for images).

    Args:
        positions: (row, column) of each token, shape (N, 2); position 0 is not rotated.
        head_channels: channels of a head, a multiple of 4; half rotate with the row, half with the column.

    Returns:
        cosines and sines, shape (2, N, head_channels / 2), one for each pair of channels.
    """
    angles = _angles(positions, head_channels // 4).flatten(1)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates each pair of channels of x, shape (B, heads, N, d), by the angles of `rotary_table`."""
    cos, sin = table.to(x.dtype)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + 1e-6), times a learned scale in x's dtype, which the fused kernel requires."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class TokenAttention(nn.Module):
    """Multi-head self-attention over tokens.

    Args:
        width: channels of a token, a multiple of `heads`.
        heads: number of heads.
        qk_norm: normalise each query and key by its root mean square, with learned scales (Dehghani et al. 2023,
            arXiv:2302.05442, sec. 2, with RMSNorm).
    """

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        """(B, N, width), rotations of the N tokens or None -> (B, N, width)."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        return self.projection(attend(query, key, value).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two layers with GELU (tanh form), or SwiGLU: out(silu(gate(x)) value(x)) (Shazeer 2020, arXiv:2002.05202).

    Args:
        width: channels of a token.
        hidden: channels of the hidden layer; SwiGLU has two thirds of them, for equal parameters.
        swiglu: whether it is SwiGLU.
    """

    def __init__(self, width: int, hidden: int, swiglu: bool):
        super().__init__()
        self.swiglu = swiglu
        hidden = 2 * hidden // 3 if swiglu else hidden
        self.linear_in = nn.Linear(width, 2 * hidden if swiglu else hidden)
        self.linear_out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        h = self.linear_in(x)
        if self.swiglu:
            gate, value = h.chunk(2, dim=-1)
            return self.linear_out(F.silu(gate) * value)
        return self.linear_out(F.gelu(h, approximate="tanh"))


def token_norm(width: int, kind: str) -> nn.Module:
    """Normalisation of tokens: LayerNorm without parameters ("layer"), or RMSNorm with a learned scale ("rms")."""
    if kind == "rms":
        return RMSNorm(width)
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with one shift and scale per image and channel."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class TransformerBlock(nn.Module):
    """Attention and a feed-forward layer, conditioned by adaLN-zero (Peebles & Xie 2023, arXiv:2212.09748, sec. 3.2).

        x = x + gate_1 attention(norm_1(x) (1 + scale_1) + shift_1)
        x = x + gate_2 feed_forward(norm_2(x) (1 + scale_2) + shift_2)

    Shifts, scales and gates are linear in the embedding and zero at initialisation, so an untrained block is the
    identity.

    Args:
        width: channels of a token, a multiple of `heads`.
        heads: heads of the attention.
        hidden: channels of the feed-forward layer.
        norm: see `token_norm`.
        qk_norm: see `TokenAttention`.
        swiglu: see `FeedForward`.
    """

    def __init__(self, width: int, heads: int, hidden: int, *, norm: str, qk_norm: bool, swiglu: bool):
        super().__init__()
        self.norm1 = token_norm(width, norm)
        self.attention = TokenAttention(width, heads, qk_norm)
        self.norm2 = token_norm(width, norm)
        self.feed_forward = FeedForward(width, hidden, swiglu)
        self.modulation = zero(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, embedding: Tensor, rotary: Tensor | None) -> Tensor:
        """(B, N, width), (B, width) after SiLU, rotations or None -> (B, N, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding).chunk(6, dim=1)
        h = self.attention(modulate(self.norm1(x), shift1, scale1), rotary)
        x = torch.addcmul(x, gate1[:, None], h)
        h = self.feed_forward(modulate(self.norm2(x), shift2, scale2))
        return torch.addcmul(x, gate2[:, None], h)
