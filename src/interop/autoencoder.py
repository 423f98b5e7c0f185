"""diffusers' autoencoder as a network that is trained."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from src.errors import UserError
from src.model.base import Network, height_and_width
from src.model.sizes import check_attention, check_base_channels, check_groups, check_levels


class AutoencoderKL(Network):
    """diffusers' `AutoencoderKL`, the network of Rombach et al. 2022 (arXiv:2112.10752, sec. 3.1).

    Each level of the channel multipliers but the first halves the sides: latents of 64x64 images have 16x16 pixels with
    three levels. `module` is diffusers' network.

    Args:
        image_size: side length of the images in pixels, or a pair [H, W].
        channels: channels of the images.
        latent_channels: channels of the latents.
        base_channels, channel_multipliers, blocks_per_level, attention_factors, groups: see `UNet`; the middle always
            has attention, and the decoder has one block more in each level.

    Raises:
        UserError: diffusers is not installed.
        ValueError: the sizes do not fit, or the latents have more values than the images.
    """

    autoencodes = True

    def __init__(
        self,
        image_size: int | Sequence[int],
        channels: int,
        *,
        latent_channels: int = 4,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 4, 4),
        blocks_per_level: int = 2,
        attention_factors: Sequence[int] = (),
        groups: int = 32,
    ):
        super().__init__()
        if find_spec("diffusers") is None:
            raise UserError("model=autoencoder_kl needs the package diffusers: pip install -e '.[latent]'")
        from diffusers import AutoencoderKL as Module

        height, width = height_and_width(image_size)
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        factors = [2**level for level in range(len(widths))]
        check_levels((height, width), widths, blocks_per_level)
        check_base_channels(base_channels)
        check_groups(base_channels, widths, groups)
        check_attention(attention_factors, len(widths))
        self.image_shape, self.out_channels = (channels, height, width), channels
        self.latent_shape = torch.Size((latent_channels, height // factors[-1], width // factors[-1]))
        values = channels * height * width
        if not 0 < self.latent_shape.numel() <= values:
            raise ValueError(
                f"latent_channels={latent_channels}: latents of {' x '.join(map(str, self.latent_shape))} values do not"
                f" compress images of {values}; choose 1 to {values * latent_channels // self.latent_shape.numel()}"
                if latent_channels > 0
                else f"latent_channels={latent_channels} must be at least 1"
            )
        attention = ["Attn" if factor in attention_factors else "" for factor in factors]
        self.module = Module(
            in_channels=channels,
            out_channels=channels,
            down_block_types=tuple(f"{kind}DownEncoderBlock2D" for kind in attention),
            up_block_types=tuple(f"{kind}UpDecoderBlock2D" for kind in reversed(attention)),
            block_out_channels=tuple(widths),
            layers_per_block=blocks_per_level,
            latent_channels=latent_channels,
            norm_num_groups=groups,
            sample_size=height if height == width else (height, width),
            force_upcast=False,
        )

    def forward(self, x, noise=None):
        """See `Autoencoder`."""
        latents = self.module.encode(x).latent_dist
        z = latents.mean if noise is None else latents.mean + latents.std * noise
        return self.module.decode(z).sample, latents.mean, latents.logvar
