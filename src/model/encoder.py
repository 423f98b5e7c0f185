"""Classifiers of noisy images: the first half of the DDPM network (Dhariwal & Nichol 2021, sec. 4)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import nn

from src.model.base import Network, height_and_width
from src.model.blocks import Downsample, ResidualBlock, group_norm, xavier, zero
from src.model.embedding import TimeEmbedding
from src.model.sizes import check_attention, check_base_channels, check_groups, check_levels


class Encoder(Network):
    """Maps noisy images and the label of the time to logits of shape (B, num_classes).

    The encoder and the middle are those of `UNet`. Their output is normalised and averaged over the pixels, where the
    paper (arXiv:2105.05233) has attention pooling, and a linear layer gives the logits. An untrained network
    gives zeros.

    Args:
        image_size: side length of the images in pixels, or a pair [H, W].
        channels: channels of the images.
        num_classes: number of classes, at least 2.
        base_channels, channel_multipliers, blocks_per_level, attention_factors, dropout, groups: see `UNet`.

    Raises:
        ValueError: there are no classes, or the sizes do not fit; see `UNet`.
    """

    classifies = True
    reads = frozenset({"labels"})  # as its target, not as its input

    def __init__(
        self,
        image_size: int | Sequence[int],
        channels: int,
        num_classes: int = 0,
        *,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks_per_level: int = 2,
        attention_factors: Sequence[int] = (2,),
        dropout: float = 0.0,
        groups: int = 32,
    ):
        super().__init__()
        if num_classes < 2:
            raise ValueError(
                f"a classifier needs at least 2 classes, got {num_classes}: choose conditioning=class"
            )
        height, width = height_and_width(image_size)
        self.image_shape = (channels, height, width)
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        factors = [2**level for level in range(len(widths))]
        check_levels((height, width), widths, blocks_per_level)
        check_base_channels(base_channels)
        check_groups(base_channels, widths, groups)
        check_attention(attention_factors, len(widths))

        embedding_channels = 4 * base_channels
        self.time_embedding = TimeEmbedding(base_channels, embedding_channels)
        self.conv_in = xavier(nn.Conv2d(channels, base_channels, 3, padding=1))
        shared = {"embedding_channels": embedding_channels, "dropout": dropout, "groups": groups}
        self.levels, before = nn.ModuleList(), base_channels
        for factor, after in zip(factors, widths, strict=True):
            level = nn.ModuleList([Downsample(before)] if factor > 1 else [])
            for _ in range(blocks_per_level):
                level.append(ResidualBlock(before, after, attention=factor in attention_factors, **shared))
                before = after
            self.levels.append(level)
        self.middle = nn.ModuleList(
            ResidualBlock(before, before, attention=attention, **shared) for attention in (True, False)
        )
        self.norm_out = group_norm(before, groups)
        self.linear_out = zero(nn.Linear(before, num_classes))

    def forward(self, x, label, condition=None, to_label=None):
        """See `Network`; the condition is not used."""
        embedding = F.silu(self.time_embedding(label))
        x = self.conv_in(x)
        for layer in (layer for level in (*self.levels, self.middle) for layer in level):
            x = layer(x) if isinstance(layer, Downsample) else layer(x, embedding)
        return self.linear_out(F.silu(self.norm_out(x)).mean(dim=(2, 3)))
