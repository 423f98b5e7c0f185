"""Conversion of weights between `src.model.UNet` and diffusers' `UNet2DModel`.

The two networks compute the same function if `UNet2DModel` has the configuration of the published DDPM networks:
`flip_sin_to_cos=False, freq_shift=1, downsample_padding=0, norm_eps=1e-6, attention_head_dim=None`, and attention in
the down and up blocks of the same levels. A class-conditional `UNet` corresponds to
`num_class_embeds = num_classes + 1`, where the last row is "no class".
"""

import re
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

# names in `UNet` -> names in diffusers; braces stand for a number
_PLACES = {
    "time_embedding": "time_embedding",
    "encoder.{level}.{block}": "down_blocks.{level}.resnets.{block}",
    "encoder.{level}.{block}.attention": "down_blocks.{level}.attentions.{block}",
    "downsample.{level}": "down_blocks.{level}.downsamplers.0",
    "middle.{block}": "mid_block.resnets.{block}",
    "middle.{block}.attention": "mid_block.attentions.{block}",
    "decoder.{level}.{block}": "up_blocks.{level}.resnets.{block}",
    "decoder.{level}.{block}.attention": "up_blocks.{level}.attentions.{block}",
    "upsample.{level}": "up_blocks.{level}.upsamplers.0",
}
_LAYERS = {
    "conv": "conv",
    "conv1": "conv1",
    "conv2": "conv2",
    "norm1": "norm1",
    "norm2": "norm2",
    "linear1": "linear_1",
    "linear2": "linear_2",
    "embedding_projection": "time_emb_proj",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "projection": "to_out.0",
}
_OUTER = {
    "conv_in": "conv_in",
    "class_embedding": "class_embedding",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_NAMES = _OUTER | {
    f"{place}.{layer}": f"{their_place}.{their_layer}"
    for place, their_place in _PLACES.items()
    for layer, their_layer in _LAYERS.items()
}
_NAMES_BACK = {theirs: ours for ours, theirs in _NAMES.items()}
# Names of the attention layers in early versions of diffusers and in files of that time, e.g. google/ddpm-cifar10-32.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def unet_from_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts a state dict of `UNet2DModel` to one of `UNet`.

    Raises:
        ValueError: a weight that a DDPM network does not have.
    """
    renamed = {}
    for name, tensor in weights.items():
        *place, layer, kind = name.split(".")
        if "attentions" in place:
            name = ".".join((*place, _OLD_ATTENTION.get(layer, layer), kind))
        renamed[_rename(name, _NAMES_BACK)] = tensor

    ours = {}
    for name, tensor in renamed.items():
        if ".attention.query." in name:
            parts = [renamed[name.replace("query", part)] for part in ("query", "key", "value")]
            ours[name.replace("query", "qkv")] = torch.cat(parts)
        elif ".attention.key." not in name and ".attention.value." not in name:
            ours[name] = tensor
    return ours


def unet_to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts a state dict of `UNet` to one of `UNet2DModel`.

    Raises:
        ValueError: a weight that `UNet` does not have.
    """
    theirs = {}
    for name, tensor in weights.items():
        if ".attention.qkv." in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                # safetensors does not save tensors that share memory
                theirs[_rename(name.replace("qkv", part), _NAMES)] = piece.clone()
        else:
            theirs[_rename(name, _NAMES)] = tensor
    return theirs


def _rename(name: str, names: Mapping[str, str]) -> str:
    """The name of a weight (ending in .weight or .bias) in the other library."""
    module, _, kind = name.rpartition(".")
    for pattern, replacement in names.items():
        if match := _regex(pattern).fullmatch(module):
            return f"{replacement.format(**match.groupdict())}.{kind}"
    raise ValueError(f"{name} is not a weight of a DDPM U-Net: other architectures cannot be converted")


@cache
def _regex(pattern: str) -> re.Pattern:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(pattern)))
