"""The magnitude-preserving network of EDM2 (Karras et al. 2024, arXiv:2312.02696)."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.model.attention import attend
from src.model.base import height_and_width
from src.model.condition_embedding import class_rows, second_label
from src.model.levels import LevelUNet
from src.model.magnitude import MPFourier, MPLayer, mp_cat, mp_silu, mp_sum, unit_magnitude
from src.model.sizes import check_base_channels

# the share t of the second operand of a sum or concatenation (config G)
RESIDUAL, ATTENTION, CLASS, SKIP = 0.3, 0.3, 0.5, 0.5
# bound of the activations, for float16
LARGEST = 256.0


class MPBlock(nn.Module):
    """A residual block of EDM2 (fig. 22), with resampling, a gain by the embedding, and cosine attention.

        encoder: x = normalise(shortcut(resample(x)));  decoder: x = resample(x)
        h = conv2(dropout(mp_silu(conv1(mp_silu(x)) (1 + gain projection(embedding)))))
        x = mp_sum(x or in the decoder shortcut(x), h), then attention

    Args:
        in_channels, out_channels: channels.
        encoder: whether it is a block of the encoder.
        resample: `halve`, `double` or None.
        heads: heads of the attention; 0 for none.
        embedding_channels: width of the embedding.
        dropout: probability, in [0, 1].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        encoder: bool,
        resample: Callable[[Tensor], Tensor] | None = None,
        heads: int = 0,
        embedding_channels: int,
        dropout: float,
    ):
        super().__init__()
        self.encoder, self.resample, self.heads = encoder, resample, heads
        self.conv1 = MPLayer(out_channels if encoder else in_channels, out_channels, 3)
        self.conv2 = MPLayer(out_channels, out_channels, 3)
        self.embedding_projection = MPLayer(embedding_channels, out_channels)
        self.embedding_gain = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = MPLayer(in_channels, out_channels, 1)
        self.qkv = MPLayer(out_channels, 3 * out_channels, 1) if heads else None
        self.projection = MPLayer(out_channels, out_channels, 1) if heads else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, in_channels, H, W), (B, embedding_channels) -> (B, out_channels, H', W')."""
        if self.resample is not None:
            x = self.resample(x)
        if self.encoder:
            x = unit_magnitude(self.shortcut(x), [1])
        gain = 1 + self.embedding_projection(embedding, self.embedding_gain)[:, :, None, None]
        h = self.conv2(self.dropout(mp_silu(self.conv1(mp_silu(x)) * gain.to(x.dtype))))
        if not self.encoder:
            x = self.shortcut(x)
        x = mp_sum(x, h, RESIDUAL)
        if self.heads:
            x = mp_sum(x, self._attention(x), ATTENTION)
        return x.clamp(-LARGEST, LARGEST)

    def _attention(self, x: Tensor) -> Tensor:
        """Attention whose queries, keys and values have unit magnitude per head (sec. 2.2)."""
        qkv = self.qkv(x).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(3, 4)
        query, key, value = unit_magnitude(qkv, [4]).unbind(1)
        return self.projection(
            attend(query, key, value).transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
        )


class EDM2(LevelUNet):
    """A U-Net in which all layers preserve the magnitude of activations, and weights have unit magnitude (config G).

    Use it with `parameterization=edm`, whose input has unit variance and whose label ln(sigma)/4 suits the Fourier
    features, and with lr_schedule=edm2. Each optimiser step is followed by forced weight normalisation
    (`after_optimizer_step`). An untrained network returns zero.

    The default arguments are the small network: 280M parameters with 1,000 classes, on 64x64 latents or images.

    Args:
        image_size: side length of the images in pixels, or a pair [H, W].
        channels: channels of the images.
        out_channels: channels of the output; None for the images' channels.
        num_classes: number of classes; 0 for an unconditional network.
        base_channels: channels of the first level; even, at least 4.
        channel_multipliers: channels of each level, in units of `base_channels`.
        blocks_per_level: residual blocks of each level of the encoder; the decoder has one more.
        attention_factors: downsampling factors of the levels with self-attention. The middle always has it.
        head_channels: channels of each head.
        dropout: dropout probability in the residual blocks, in [0, 1].
        second_time: also embed the label of a second time; its gain is initialised to zero.
        checkpointing: recompute the activations of each block in the backward pass, to save memory.

    Raises:
        ValueError: the image size cannot be halved once per level, head_channels does not divide the channels, or there
            is no level with an attention factor.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        channels: int,
        *,
        out_channels: int | None = None,
        num_classes: int = 0,
        base_channels: int = 192,
        channel_multipliers: Sequence[int] = (1, 2, 3, 4),
        blocks_per_level: int = 3,
        attention_factors: Sequence[int] = (4, 8),
        head_channels: int = 64,
        dropout: float = 0.0,
        second_time: bool = False,
        checkpointing: bool = False,
    ):
        super().__init__()
        height, width = height_and_width(image_size)
        self.image_shape = (channels, height, width)
        self.out_channels = channels if out_channels is None else out_channels
        self.reads = frozenset({"labels"} if num_classes else ())
        self.num_classes, self.checkpointing = num_classes, checkpointing
        self.second_time = second_time

        check_base_channels(base_channels)
        embedding_channels = base_channels * max(channel_multipliers, default=1)
        self.fourier = MPFourier(base_channels)
        self.time_embedding = MPLayer(base_channels, embedding_channels)
        self.class_embedding = MPLayer(num_classes + 1, embedding_channels) if num_classes else None
        self.conv_in = MPLayer(channels + 1, base_channels, 3)
        width = self.add_levels(
            partial(MPBlock, embedding_channels=embedding_channels, dropout=dropout),
            base_channels,
            channel_multipliers,
            blocks_per_level,
            attention_factors,
            head_channels,
        )
        self.conv_out = MPLayer(width, self.out_channels, 3)
        self.gain_out = nn.Parameter(torch.zeros(()))
        self.second_time_embedding = None
        if second_time:  # created last, so that the initial weights of the other layers do not depend on it
            self.second_time_embedding = MPLayer(base_channels, embedding_channels)
            self.second_time_gain = nn.Parameter(torch.zeros(()))

    def after_optimizer_step(self) -> None:
        """Forced weight normalisation of all layers."""
        for module in self.modules():
            if isinstance(module, MPLayer):
                module.normalise()

    def embed(self, label, condition, to_label):
        """The embedding of time, class and second time, shape (B, embedding channels)."""
        embedding = self.time_embedding(self.fourier(label))
        rows = class_rows(condition, self.num_classes, label)
        if self.class_embedding is not None:
            # of unit magnitude: a one-hot vector of n entries has magnitude 1/sqrt(n)
            one_hot = (
                F.one_hot(rows, self.num_classes + 1).to(embedding.dtype) * (self.num_classes + 1) ** 0.5
            )
            embedding = mp_sum(embedding, self.class_embedding(one_hot), CLASS)
        to_label = second_label(label, to_label, self.second_time_embedding is not None)
        if self.second_time_embedding is not None:
            second = self.second_time_embedding(self.fourier(to_label), self.second_time_gain)
            embedding = embedding + second
        return mp_silu(embedding)

    def forward(self, x, label, condition=None, to_label=None):
        """See `Network`. Class labels of -1 (`NO_CLASS`) or num_classes mean "no class".

        Raises:
            ValueError: a condition or second time is given, but the network does not support it.
        """
        embedding = self.embed(label, condition, to_label)
        # a channel of ones replaces the biases
        x = self.conv_in(torch.cat((x, torch.ones_like(x[:, :1])), dim=1))
        x = self.through_levels(x, embedding, partial(mp_cat, t=SKIP))
        return self.conv_out(x, self.gain_out)
