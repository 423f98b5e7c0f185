"""The network of DDPM (Ho et al. 2020, arXiv:2006.11239, appendix B)."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.conditioning import Condition
from src.model.base import Network, height_and_width
from src.model.blocks import Downsample, ResidualBlock, Upsample, group_norm, xavier, zero
from src.model.condition_embedding import augmentation_layer, with_augmentation
from src.model.embedding import TimeEmbedding
from src.model.sizes import check_attention, check_base_channels, check_groups, check_levels


class UNet(Network):
    """The DDPM U-Net, optionally conditioned on classes or texts.

    There is one level per channel multiplier; each level has half the height and width of the previous one. The
    decoder has one more block per level than the encoder, and concatenates the encoder's outputs (of the first
    convolution, every block and every downsampling) to its inputs. The class embedding is added to the time embedding,
    as in Nichol and Dhariwal (2021). With text, cross-attention follows each self-attention. Its keys are the tokens
    and a learned null token, which is the only one of an image without text. The last layer is initialised to zero, so
    an untrained network returns zero.

    With the default arguments and `image_size=32, channels=3` this is the published CIFAR-10 network
    (35,746,307 parameters), except for its dropout of 0.1.

    Args:
        image_size: side length of the images in pixels, or a pair [H, W].
        channels: channels of the images.
        out_channels: channels of the output; None for the images' channels.
        num_classes: number of classes; 0 for an unconditional network.
        base_channels: channels of the first level; even, at least 4.
        channel_multipliers: channels of each level, in units of `base_channels`.
        blocks_per_level: residual blocks of each level of the encoder.
        attention_factors: downsampling factors of the levels with self-attention: 1 is full resolution, 2 is half
            the height and width. The middle always has attention.
        dropout: dropout probability in the residual blocks, in [0, 1).
        groups: groups of every group normalisation; must divide the channels of every level.
        second_time: also embed the label of a second time, for losses and samplers of steps from t to s. Its
            embedding is added to that of t and initialised to zero.
        token_channels: width of the tokens of a text; 0 for a network without text.
        pooled_text: also add a linear map of the mean of the tokens to the time embedding.
        condition_channels: channels of an image in the condition, which is a further input of the first convolution;
            0 for none.
        augment_channels: size of an augmentation that the network reads; 0 for none. Initialised to zero.
        checkpointing: recompute the activations of each block in the backward pass, to save memory.

    Raises:
        ValueError: dropout is out of range, the image size cannot be halved once per level, the groups do not divide
            the channels, or there is no level with an attention factor.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        channels: int,
        *,
        out_channels: int | None = None,
        num_classes: int = 0,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks_per_level: int = 2,
        attention_factors: Sequence[int] = (2,),
        dropout: float = 0.0,
        groups: int = 32,
        second_time: bool = False,
        token_channels: int = 0,
        pooled_text: bool = False,
        condition_channels: int = 0,
        augment_channels: int = 0,
        checkpointing: bool = False,
    ):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        height, width = height_and_width(image_size)
        self.image_shape = (channels, height, width)
        self.out_channels = channels if out_channels is None else out_channels
        self.num_classes, self.second_time, self.checkpointing = num_classes, second_time, checkpointing
        read = {"labels": num_classes, "tokens": token_channels, "image": condition_channels}
        read["augment"] = augment_channels
        self.reads = frozenset(kind for kind, size in read.items() if size)

        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        factors = [2**level for level in range(len(widths))]
        check_levels((height, width), widths, blocks_per_level)
        check_base_channels(base_channels)
        check_groups(base_channels, widths, groups)
        check_attention(attention_factors, len(widths))

        embedding_channels = 4 * base_channels
        self.time_embedding = TimeEmbedding(base_channels, embedding_channels)
        # The last row represents "no class".
        self.class_embedding = nn.Embedding(num_classes + 1, embedding_channels) if num_classes else None

        self.second_time_embedding = None

        block = partial(ResidualBlock, embedding_channels=embedding_channels, dropout=dropout, groups=groups)
        block = partial(block, token_channels=token_channels)
        self.conv_in = xavier(nn.Conv2d(channels, base_channels, 3, padding=1))
        attention = [factor in attention_factors for factor in factors]
        skip_widths = self._add_encoder(block, base_channels, widths, attention, blocks_per_level)
        width = widths[-1]
        self.middle = nn.ModuleList(
            [block(width, width, attention=True), block(width, width, attention=False)]
        )
        self._add_decoder(block, skip_widths, widths, attention, blocks_per_level)
        self.norm_out = group_norm(widths[0], groups)
        self.conv_out = zero(nn.Conv2d(widths[0], self.out_channels, 3, padding=1))
        if second_time:  # created last, so that the initial weights of the other layers do not depend on it
            self.second_time_embedding = TimeEmbedding(base_channels, embedding_channels)
            zero(self.second_time_embedding.linear2)
        self.null_token, self.text_embedding = None, None
        if token_channels:
            self.null_token = nn.Parameter(torch.randn(token_channels))
        if token_channels and pooled_text:
            self.text_embedding = nn.Sequential(
                nn.LayerNorm(token_channels), xavier(nn.Linear(token_channels, embedding_channels))
            )
        self.conv_condition = None
        if condition_channels:  # the convolution of concatenated channels is a sum of two; last, as above
            self.conv_condition = xavier(nn.Conv2d(condition_channels, base_channels, 3, padding=1))
        self.augment_embedding = augmentation_layer(augment_channels, embedding_channels)

    def _add_encoder(
        self,
        block: Callable[..., ResidualBlock],
        base_channels: int,
        widths: Sequence[int],
        attention: Sequence[bool],
        blocks_per_level: int,
    ) -> list[int]:
        """Adds the encoder; returns the channels of its outputs, which the decoder concatenates in reverse order."""
        skip_widths = [base_channels]
        self.encoder = nn.ModuleList()
        self.downsample = nn.ModuleList()
        for index, width in enumerate(widths):
            if index > 0:
                self.downsample.append(Downsample(skip_widths[-1]))
                skip_widths.append(skip_widths[-1])
            level = nn.ModuleList()
            for _ in range(blocks_per_level):
                level.append(block(skip_widths[-1], width, attention=attention[index]))
                skip_widths.append(width)
            self.encoder.append(level)
        return skip_widths

    def _add_decoder(
        self,
        block: Callable[..., ResidualBlock],
        skip_widths: list[int],
        widths: Sequence[int],
        attention: Sequence[bool],
        blocks_per_level: int,
    ) -> None:
        self.decoder = nn.ModuleList()
        self.upsample = nn.ModuleList()
        in_width = widths[-1]
        for index in reversed(range(len(widths))):
            level = nn.ModuleList()
            for _ in range(blocks_per_level + 1):
                level.append(block(in_width + skip_widths.pop(), widths[index], attention=attention[index]))
                in_width = widths[index]
            self.decoder.append(level)
            if index > 0:
                self.upsample.append(Upsample(in_width))

    def forward(self, x, label, condition=None, to_label=None):
        """See `Network`. Class labels of -1 (`NO_CLASS`) or num_classes mean "no class".

        Raises:
            ValueError: a condition or second time is given, but the network does not support it.
        """
        embedding = self.time_embedding(label)
        labels = None if condition is None else condition.labels
        if self.class_embedding is not None:
            if labels is None:
                labels = torch.full_like(label, self.num_classes, dtype=torch.long)
            embedding = embedding + self.class_embedding(labels.where(labels >= 0, self.num_classes))
        elif labels is not None:
            raise ValueError(
                "the network has no classes: give no condition, or build it with num_classes > 0"
            )
        if self.second_time_embedding is not None:
            to_label = label if to_label is None else to_label
            embedding = embedding + self.second_time_embedding(to_label)
        elif to_label is not None:
            raise ValueError("the network has no second time: build it with second_time=true")
        embedding = with_augmentation(embedding, condition, self.augment_embedding)
        text = self._text(x, condition)
        if self.text_embedding is not None:
            embedding = embedding + self.text_embedding(_mean_of_text(*text))
        embedding = F.silu(embedding)

        x = self._first(x, condition)
        skips = [x]
        for i, level in enumerate(self.encoder):
            if i > 0:
                x = self.downsample[i - 1](x)
                skips.append(x)
            for block in level:
                x = self.run(block, x, embedding, text)
                skips.append(x)

        for block in self.middle:
            x = self.run(block, x, embedding, text)

        for i, level in enumerate(self.decoder):
            if i > 0:
                x = self.upsample[i - 1](x)
            for block in level:
                x = self.run(block, torch.cat((x, skips.pop()), dim=1), embedding, text)

        return self.conv_out(F.silu(self.norm_out(x)))

    def _first(self, x: Tensor, condition: Condition | None) -> Tensor:
        """The first convolution, of x and of the condition's image."""
        image = None if condition is None else condition.image
        if self.conv_condition is None:
            if image is not None:
                raise ValueError(
                    "the network reads no images: give no image, or build it with condition_channels > 0"
                )
            return self.conv_in(x)
        if image is None:  # as a dropped one
            image = x.new_zeros(len(x), self.conv_condition.in_channels, *x.shape[2:])
        return self.conv_in(x) + self.conv_condition(image.to(x.dtype))

    def _text(self, x: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor] | None:
        """The tokens, (B, 1 + L, token_channels), the null token first, and the mask; None in a network without text.

        The null token is always valid, so that no softmax is empty.
        """
        tokens = None if condition is None else condition.tokens
        if self.null_token is None:
            if tokens is not None:
                raise ValueError(
                    "the network reads no text: give no tokens, or build it with token_channels > 0"
                )
            return None
        null = self.null_token.expand(len(x), 1, -1)
        valid = torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
        if tokens is None:
            return null, valid
        mask = condition.mask
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        return torch.cat((null, tokens.to(null.dtype)), dim=1), torch.cat((valid, mask), dim=1)


def _mean_of_text(tokens: Tensor, mask: Tensor) -> Tensor:
    """The mean of the valid tokens, the null token among them: (B, L, D), (B, L) -> (B, D)."""
    weight = mask.unsqueeze(2).to(tokens.dtype)
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1)
