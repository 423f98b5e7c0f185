"""U-Nets whose residual blocks change the resolution: ADM and DDPM++."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.model.attention import attend
from src.model.base import height_and_width
from src.model.blocks import group_norm, upsampled, xavier, zero
from src.model.condition_embedding import ConditionEmbedding
from src.model.levels import LevelUNet, double
from src.model.sizes import check_base_channels, check_groups


class PixelAttention(nn.Module):
    """Multi-head self-attention over the pixels with a residual connection: (x + projection(attention)) scale.

    Args:
        channels: a multiple of `groups` and of `heads`.
        heads: number of heads.
        groups: groups of the normalisation.
        scale: factor of the sum.
        norm_eps: epsilon of the normalisation.
    """

    def __init__(self, channels: int, heads: int, groups: int, scale: float, norm_eps: float = 1e-6):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.norm = group_norm(channels, groups, norm_eps)
        self.qkv = xavier(nn.Linear(channels, 3 * channels), parts=3)
        self.projection = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(pixels).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = attend(query, key, value).transpose(1, 2).flatten(2)
        return (x + self.projection(mixed).transpose(1, 2).reshape(x.shape)) * self.scale


class ResamplingBlock(nn.Module):
    """A residual block that may halve or double the resolution of both branches, as in BigGAN (arXiv:1809.11096).

        h = conv1(resample(silu(norm1(x))))
        h = norm2(h) (1 + a) + b  or  norm2(h + b),    with a, b linear in the embedding
        h = (conv2(dropout(silu(h))) + shortcut(resample(x))) skip_scale, then attention

    Args:
        in_channels, out_channels: multiples of `groups`.
        resample: `halve`, `double` or None.
        heads: heads of the self-attention that follows; 0 for none.
        embedding_channels: width of the embedding.
        scale_shift: whether the embedding scales and shifts the second normalisation (adaptive group normalisation)
            instead of being added before it.
        project: whether a resampled shortcut has a 1x1 convolution even if the channels do not change.
        skip_scale: factor of the sums of shortcut and branch.
        dropout: probability, in [0, 1].
        groups: groups of the normalisation.
        norm_eps: epsilon of the normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        resample: Callable[[Tensor], Tensor] | None = None,
        heads: int = 0,
        embedding_channels: int,
        scale_shift: bool,
        project: bool,
        skip_scale: float,
        dropout: float,
        groups: int,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.resample, self.scale_shift, self.skip_scale = resample, scale_shift, skip_scale
        self.norm1 = group_norm(in_channels, groups, norm_eps)
        self.conv1 = xavier(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        parts = 2 if scale_shift else 1
        self.embedding_projection = xavier(nn.Linear(embedding_channels, parts * out_channels), parts=parts)
        self.norm2 = group_norm(out_channels, groups, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity()
        if in_channels != out_channels or (project and resample):
            self.shortcut = xavier(nn.Conv2d(in_channels, out_channels, 1))
        self.attention = nn.Identity()
        if heads:
            self.attention = PixelAttention(out_channels, heads, groups, skip_scale, norm_eps)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, in_channels, H, W), (B, embedding_channels) after SiLU -> (B, out_channels, H', W')."""
        h = F.silu(self.norm1(x))
        if self.resample is double:
            h, x = upsampled(h, self.conv1), double(self.shortcut(x))
        elif self.resample is not None:
            h, x = self.conv1(self.resample(h)), self.shortcut(self.resample(x))
        else:
            h, x = self.conv1(h), self.shortcut(x)
        projected = self.embedding_projection(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = projected.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + projected)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention((h + x) * self.skip_scale)


class ConvResampling(nn.Module):
    """Halves the resolution by a convolution with stride 2, or doubles it by repetition and a convolution.

    These layers of improved DDPM (Nichol & Dhariwal 2021) stand for the residual blocks that resample; the embedding is
    not used. Zeros are padded at all borders.

    Args:
        channels: channels of input and output.
        up: whether the resolution is doubled.
    """

    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = xavier(nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W')."""
        return self.conv(double(x) if self.up else x)


class ResamplingUNet(LevelUNet):
    """A U-Net in which residual blocks halve and double the resolution: ADM or DDPM++, depending on the options.

    ADM (Dhariwal & Nichol 2021, arXiv:2105.05233, sec. 3) has adaptive group normalisation and attention with heads of
    64 channels at several resolutions: the default options. DDPM++ (Song et al. 2021, arXiv:2011.13456, app. H; as
    configured by EDM, Karras et al. 2022, arXiv:2206.00364, table 7) has `scale_shift=False`, `head_channels=None`,
    `decoder_attention="last"`, `project=True` and `skip_scale=sqrt(1/2)`. Resampling averages 2x2 pixels or repeats a
    pixel. Weights are initialised as in the DDPM network, and an untrained network returns zero.

    With out_channels=6 the default arguments are ADM's ImageNet 256 network (552.8M parameters without classes).

    Args:
        image_size: side length of the images in pixels, or a pair [H, W].
        channels: channels of the images.
        out_channels: channels of the output; None for the images' channels.
        num_classes: number of classes; 0 for an unconditional network.
        base_channels: channels of the first convolution; even, at least 4.
        channel_multipliers: channels of each level, in units of `base_channels`.
        blocks_per_level: residual blocks of each level of the encoder; the decoder has one more.
        attention_factors: downsampling factors of the levels with self-attention. The middle always has it.
        decoder_attention: at these levels, "all" blocks of the decoder have attention or only the "last".
        head_channels: channels of each head; None for a single head.
        scale_shift, project, skip_scale: see `ResamplingBlock`.
        dropout: dropout probability in the residual blocks, in [0, 1].
        groups: groups of every group normalisation; must divide the channels of every level.
        conv_resampling: resample by convolutions instead of residual blocks, as in improved DDPM.
        norm_eps: epsilon of every group normalisation; 1e-5 in the published ADM networks.
        frequency_shift: of the time embedding: 1, or 0 as in the published ADM networks, see `sinusoidal_embedding`.
        second_time: also embed the label of a second time, initialised to zero.
        augment_channels: size of an augmentation that the network reads; 0 for none. Initialised to zero.
        checkpointing: recompute the activations of each block in the backward pass, to save memory.

    Raises:
        ValueError: the image size cannot be halved once per level, groups or head_channels do not divide the channels,
            or there is no level with an attention factor.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        channels: int,
        *,
        out_channels: int | None = None,
        num_classes: int = 0,
        base_channels: int = 256,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4, 4),
        blocks_per_level: int = 2,
        attention_factors: Sequence[int] = (8, 16, 32),
        decoder_attention: str = "all",
        head_channels: int | None = 64,
        scale_shift: bool = True,
        project: bool = False,
        skip_scale: float = 1.0,
        dropout: float = 0.0,
        groups: int = 32,
        conv_resampling: bool = False,
        norm_eps: float = 1e-6,
        frequency_shift: int = 1,
        second_time: bool = False,
        augment_channels: int = 0,
        checkpointing: bool = False,
    ):
        super().__init__()
        height, width = height_and_width(image_size)
        self.image_shape = (channels, height, width)
        self.out_channels = channels if out_channels is None else out_channels
        self.reads = frozenset(["labels"] * bool(num_classes) + ["augment"] * bool(augment_channels))
        self.num_classes, self.checkpointing, self.second_time = num_classes, checkpointing, second_time

        check_base_channels(base_channels)
        check_groups(base_channels, [base_channels * m for m in channel_multipliers], groups)
        if decoder_attention not in ("all", "last"):
            raise ValueError(f"decoder_attention must be all or last, got {decoder_attention!r}")
        block = partial(
            ResamplingBlock,
            embedding_channels=4 * base_channels,
            scale_shift=scale_shift,
            project=project,
            skip_scale=skip_scale,
            dropout=dropout,
            groups=groups,
            norm_eps=norm_eps,
        )

        def make(*widths: int, encoder: bool, **options: Any) -> nn.Module:  # the same in the decoder
            if conv_resampling and options.get("resample"):
                return ConvResampling(widths[0], options["resample"] is double)
            return block(*widths, **options)

        self.embedding = ConditionEmbedding(base_channels, 4 * base_channels, num_classes, frequency_shift)
        self.conv_in = xavier(nn.Conv2d(channels, base_channels, 3, padding=1))
        width = self.add_levels(
            make,
            base_channels,
            channel_multipliers,
            blocks_per_level,
            attention_factors,
            head_channels,
            last_only=decoder_attention == "last",
        )
        self.norm_out = group_norm(width, groups, norm_eps)
        self.conv_out = zero(nn.Conv2d(width, self.out_channels, 3, padding=1))
        if second_time:
            self.embedding.add_second_time()
        self.embedding.add_augmentation(augment_channels)

    def forward(self, x, label, condition=None, to_label=None):
        """See `Network`. Class labels of -1 (`NO_CLASS`) or num_classes mean "no class".

        Raises:
            ValueError: a condition or second time is given, but the network does not support it.
        """
        embedding = F.silu(self.embedding(label, condition, to_label))
        x = self.through_levels(self.conv_in(x), embedding, lambda x, skip: torch.cat((x, skip), dim=1))
        return self.conv_out(F.silu(self.norm_out(x)))
