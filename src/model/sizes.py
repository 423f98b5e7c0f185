"""Checks of the sizes of networks; each error begins with the name of the option."""

from collections.abc import Sequence


def check_levels(size: tuple[int, int], widths: Sequence[int], blocks_per_level: int) -> None:
    """Checks that images of this height and width can be halved between the levels of a U-Net."""
    if not widths:
        raise ValueError("channel_multipliers is empty: give one for each level, e.g. (1, 2, 2)")
    if min(widths) < 1:
        raise ValueError("channel_multipliers must be positive")
    if blocks_per_level < 1:
        raise ValueError(f"blocks_per_level is {blocks_per_level}: it must be at least 1")
    factor = 2 ** (len(widths) - 1)
    for side in size:
        if side % factor:
            possible = (side & -side).bit_length()
            padded = -(-side // factor) * factor
            raise ValueError(
                f"image_size {side} can be halved {possible - 1} times, but {len(widths)} channel_multipliers halve it"
                f" {len(widths) - 1} times: pad the images to {padded} pixels, or give at most {possible}"
                " channel_multipliers"
            )


def check_base_channels(base_channels: int) -> None:
    """Checks the channels of the first level, which are also the width of the sinusoidal embedding."""
    if base_channels < 4 or base_channels % 2:
        raise ValueError(f"base_channels is {base_channels}: it must be even and at least 4")


def check_groups(base_channels: int, widths: Sequence[int], groups: int) -> None:
    """Checks that the groups of the normalisation divide the channels of every level."""
    if groups < 1:
        raise ValueError(f"groups is {groups}: it must be at least 1")
    for width in (base_channels, *widths):
        if width < 1 or width % groups:
            raise ValueError(
                f"groups={groups} does not divide the {width} channels of a level: choose groups that divide "
                f"base_channels={base_channels}, or another base_channels"
            )


def check_attention(attention_factors: Sequence[int], levels: int) -> None:
    """Checks that there is a level with each of these downsampling factors."""
    factors = [2**level for level in range(levels)]
    unknown = [factor for factor in attention_factors if factor not in factors]
    if unknown:
        raise ValueError(
            f"attention_factors {unknown} name no level: the levels are downsampled by {factors}; "
            "these are factors, not image sizes"
        )


def check_heads(width: int, head_channels: int | None) -> None:
    """Checks that the channels of a level with attention divide into heads."""
    if head_channels is not None and (head_channels < 1 or width % head_channels):
        raise ValueError(
            f"head_channels={head_channels} does not divide the {width} channels of a level with attention: choose a"
            " divisor"
        )


def check_patches(size: tuple[int, int], patch_size: int) -> None:
    """Checks that images of this height and width divide into square patches."""
    if patch_size < 1:
        raise ValueError(f"patch_size is {patch_size}: it must be at least 1")
    for side in size:
        if side % patch_size:
            fitting = [p for p in range(1, patch_size + 1) if all(s % p == 0 for s in size)]
            raise ValueError(
                f"patch_size={patch_size} does not divide an image side of {side} pixels: choose"
                f" {' or '.join(map(str, fitting[-2:]))}"
            )
