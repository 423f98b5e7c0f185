"""The layout of U-Nets whose residual blocks halve and double the resolution."""

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from src.model.base import Network
from src.model.sizes import check_attention, check_heads, check_levels

halve = partial(F.avg_pool2d, kernel_size=2)
double = partial(F.interpolate, scale_factor=2.0, mode="nearest")


class LevelUNet(Network):
    """Levels of residual blocks with skip connections; a subclass defines blocks and what is around them.

    Each level has half the height and width of the previous one. The encoder's outputs (of the first convolution and of
    every block) are joined to the inputs of the decoder, which has one more block per level.
    """

    def add_levels(
        self,
        block: Callable[..., nn.Module],
        base_channels: int,
        channel_multipliers: Sequence[int],
        blocks_per_level: int,
        attention_factors: Sequence[int],
        head_channels: int | None,
        last_only: bool = False,
    ) -> int:
        """Adds encoder, middle and decoder; returns the channels of the decoder's output.

        Args:
            block: makes a block from (in_channels, out_channels, heads=..., encoder=..., resample=...): the number of
                heads of its attention, 0 for none; whether it belongs to the encoder; `halve`, `double` or None.
            base_channels: channels of the decoder's first input.
            channel_multipliers, blocks_per_level, attention_factors, head_channels: see the subclasses.
            last_only: whether only the last block of a decoder's level has attention.

        Raises:
            ValueError: the sizes do not fit; the message begins with the option.
        """
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        check_levels(self.image_shape[1:], widths, blocks_per_level)
        check_attention(attention_factors, len(widths))
        heads = []
        for level, width in enumerate(widths):
            attends = 2**level in attention_factors
            if attends or level == len(widths) - 1:
                check_heads(width, head_channels)
            heads.append(width // (head_channels or width) if attends else 0)

        encode, decode = partial(block, encoder=True), partial(block, encoder=False)
        skip_widths = [base_channels]
        self.encoder = nn.ModuleList()
        for level, width in enumerate(widths):
            if level:
                self.encoder.append(encode(skip_widths[-1], skip_widths[-1], resample=halve))
                skip_widths.append(skip_widths[-1])
            for _ in range(blocks_per_level):
                self.encoder.append(encode(skip_widths[-1], width, heads=heads[level]))
                skip_widths.append(width)
        middle_heads = width // (head_channels or width)
        self.middle = nn.ModuleList([decode(width, width, heads=middle_heads), decode(width, width)])
        self.upsample, self.decoder = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths))):
            if level < len(widths) - 1:
                self.upsample.append(decode(width, width, resample=double))
            blocks = nn.ModuleList()
            for number in range(blocks_per_level + 1):
                chosen = heads[level] if not last_only or number == blocks_per_level else 0
                blocks.append(decode(width + skip_widths.pop(), widths[level], heads=chosen))
                width = widths[level]
            self.decoder.append(blocks)
        return width

    def through_levels(
        self, x: Tensor, embedding: Tensor, join: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Encoder, middle and decoder; `join` joins the decoder's input and an output of the encoder."""
        skips = [x]
        for block in self.encoder:
            x = self.run(block, x, embedding)
            skips.append(x)
        for block in self.middle:
            x = self.run(block, x, embedding)
        for level, blocks in enumerate(self.decoder):
            if level:
                x = self.run(self.upsample[level - 1], x, embedding)
            for block in blocks:
                x = self.run(block, join(x, skips.pop()), embedding)
        return x
