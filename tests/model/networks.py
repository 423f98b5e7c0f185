"""Small versions of all networks that are not UNet, for 8x8 images, and how to make every weight matter."""

from functools import partial

import torch
from torch import nn

from src.model import EDM2, DiT, Network, ResamplingUNet

LEVELS = {
    "base_channels": 16,
    "channel_multipliers": (1, 2),
    "blocks_per_level": 1,
    "attention_factors": (2,),
}
MODERN = {"norm": "rms", "qk_norm": True, "rotary": True, "swiglu": True}
SMALL = {
    "adm": partial(ResamplingUNet, **LEVELS, head_channels=8, groups=4),
    "ddpmpp": partial(
        ResamplingUNet,
        **LEVELS,
        decoder_attention="last",
        head_channels=None,
        scale_shift=False,
        project=True,
        skip_scale=0.5**0.5,
        groups=4,
    ),
    "edm2": partial(EDM2, **LEVELS, head_channels=8),
    "dit": partial(DiT, patch_size=2, width=32, depth=2, heads=2),
    "jit": partial(
        DiT,
        patch_size=2,
        width=32,
        depth=2,
        heads=2,
        bottleneck=4,
        class_tokens=2,
        class_tokens_from=1,
        **MODERN,
    ),
}


def small(name: str, trained: bool = True, **arguments) -> Network:
    """A small network for 8x8 images of one channel; with `trained`, the weights that start at zero are random."""
    torch.manual_seed(0)
    network = SMALL[name](**{"image_size": 8, "channels": 1, **arguments}).eval()
    if trained:
        torch.manual_seed(1)  # independent of what else the network has
        for parameter_name, weight in network.named_parameters():
            if "second_time" not in parameter_name and not weight.any():
                nn.init.normal_(weight, std=0.3)
    return network


def batch(*shape: int):
    """Images and labels of order 1."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=draw), torch.rand(shape[0], generator=draw)
