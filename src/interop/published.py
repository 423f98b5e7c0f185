"""State dicts of published code: DDIM (and pesser's conversions), OpenAI's improved and guided diffusion, EDM, DiT.

Each layout is recognised by the names of its weights, and the sizes of the network follow from their shapes. The
conventions that no shape shows are part of the layout: the order of sines and cosines, the divisor of the frequencies
(`frequency_shift`), the epsilon of normalisations, and what the label is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from src.interop.links import (
    HEAD_CHANNEL_PART,
    HEAD_PART_CHANNEL,
    PART_HEAD_CHANNEL,
    Link,
    among,
    layers,
    read_all,
)

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Network:
    """A network in another layout.

    Attributes:
        model: class and options of our network, as in conf/model.
        links: its weights.
        channels: channels of the images.
        outputs: outputs per channel, 2 with a learned variance.
        num_classes: number of classes; 0 for an unconditional network.
        process: choices of conf/train.yaml that give input and output their meaning.
        ignored: names of their weights that sampling does not use.
        side: side length of the images that it was built for, if the weights show it.
    """

    model: dict[str, Any]
    links: list[Link]
    channels: int
    outputs: int = 1
    num_classes: int = 0
    process: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    side: int | None = None

    def read(self, theirs: Weights) -> dict[str, Tensor]:
        """Our state dict; see `read_all`."""
        return read_all(self.links, theirs, self.ignored)


DDPM_PROCESS = {"schedule": "linear", "parameterization": "eps"}


def recognised(weights: Weights, attention_order: str = "legacy", head_channels: int = 64) -> Network:
    """The network that a state dict is of.

    Args:
        weights: the state dict.
        attention_order: of guided diffusion's networks: "legacy", or "new" (its use_new_attention_order).
        head_channels: channels of an attention head in OpenAI's networks, which no shape shows.

    Raises:
        ValueError: none of the known layouts, or a variant that our networks do not have.
    """
    if "temb.dense.0.weight" in weights:
        return ddim(weights)
    if "time_embed.0.weight" in weights and "input_blocks.0.0.weight" in weights:
        return openai(weights, attention_order, head_channels)
    if any(name.startswith(("model.map_layer0", "map_layer0")) for name in weights):
        return edm(weights)
    if "x_embedder.proj.weight" in weights and "final_layer.linear.weight" in weights:
        return dit(weights)
    some = ", ".join(sorted(weights)[:2])
    raise ValueError(
        f"the weights ({some}, ...) are of none of the known layouts: DDIM, OpenAI's improved and guided diffusion,"
        " EDM, DiT, diffusers"
    )


def _numbers(weights: Weights, pattern: str) -> list[int]:
    """The different numbers in names that match a pattern with one group, ascending."""
    return sorted({int(match[1]) for name in weights if (match := re.match(pattern, name))})


def ddim(weights: Weights) -> Network:
    """The DDPM U-Net as in the DDIM code (Song et al. 2021) and pesser's conversions of the DDPM checkpoints.

    Sines first, frequencies divided by half - 1, label t - 1: the conventions of our `UNet`.
    """
    levels, blocks = (
        len(_numbers(weights, r"down\.(\d+)\.")),
        len(_numbers(weights, r"down\.0\.block\.(\d+)\.")),
    )
    base = weights["conv_in.weight"].shape[0]
    widths = [weights[f"down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    attention = [level for level in range(levels) if f"down.{level}.attn.0.q.weight" in weights]
    links = layers({"conv_in": "conv_in", "norm_out": "norm_out", "conv_out": "conv_out"})
    links += layers({"linear1": "temb.dense.0", "linear2": "temb.dense.1"}, "time_embedding.")
    places = {"middle.0": ("mid.block_1", "mid.attn_1"), "middle.1": ("mid.block_2", "")}
    for level in range(levels):
        up = levels - 1 - level
        for block in range(blocks + 1):
            places[f"encoder.{level}.{block}"] = f"down.{level}.block.{block}", f"down.{level}.attn.{block}"
            places[f"decoder.{level}.{block}"] = f"up.{up}.block.{block}", f"up.{up}.attn.{block}"
        links += layers(
            {
                f"downsample.{level}.conv": f"down.{level}.downsample.conv",
                f"upsample.{level}.conv": f"up.{up}.upsample.conv",
            }
        )
    same = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
    for ours, (block_name, attention_name) in places.items():
        links += layers(same | {"embedding_projection": "temb_proj"}, f"{ours}.", f"{block_name}.")
        links += layers({"shortcut": "nin_shortcut"}, f"{ours}.", f"{block_name}.")
        links += layers({"norm": "norm"}, f"{ours}.attention.", f"{attention_name}.")
        links += layers({"projection": "proj_out"}, f"{ours}.attention.", f"{attention_name}.", kernel=2)
        links += [
            Link(f"{ours}.attention.qkv.{end}", tuple(f"{attention_name}.{p}.{end}" for p in "qkv"), kernel=2)
            for end in ("weight", "bias")
        ]
    channels = weights["conv_in.weight"].shape[1]
    model = {
        "_target_": "src.model.UNet",
        "base_channels": base,
        "channel_multipliers": _multipliers(widths, base),
        "blocks_per_level": blocks,
        "attention_factors": [2**level for level in attention],
        "groups": 32,
    }
    outputs = weights["conv_out.weight"].shape[0] // channels
    return Network(
        model, among(links, weights), channels, outputs, process=DDPM_PROCESS | {"variance": "large"}
    )


def _multipliers(widths: list[int], base: int) -> list[int]:
    if any(width % base for width in widths):
        raise ValueError(
            f"levels of {widths} channels are no multiples of the {base} channels of the first layer"
        )
    return [width // base for width in widths]


RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "embedding_projection": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "shortcut": "skip_connection",
}


def openai(weights: Weights, attention_order: str, head_channels: int) -> Network:
    """The U-Nets of improved diffusion (Nichol & Dhariwal 2021) and guided diffusion (ADM, Dhariwal & Nichol 2021).

    Cosines first, frequencies divided by half, label t - 1, epsilon 1e-5. Classes have no row for "no class".
    """
    if attention_order not in ("legacy", "new"):
        raise ValueError(f"attention_order={attention_order}: choose legacy or new")
    if "conv_in.weight" in weights or "out.2.weight" not in weights:
        raise ValueError(
            "no out.2.weight: this is no U-Net of images, perhaps a classifier, which is not converted"
        )
    outs = len(_numbers(weights, r"output_blocks\.(\d+)\."))
    ends = [k for k in range(outs) if _up(weights, k)]
    blocks = ends[0] if ends else outs - 1
    levels = outs // (blocks + 1)
    base = weights["input_blocks.0.0.weight"].shape[0]
    stride = blocks + 1  # input blocks of a level with what downsamples
    first = [1 + level * stride for level in range(levels)]
    widths = [weights[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0] for i in first]
    attention = [2**level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in weights]
    conv = any(f"input_blocks.{i - 1}.0.op.weight" in weights for i in first)
    order = PART_HEAD_CHANNEL if attention_order == "new" else HEAD_PART_CHANNEL

    links = layers({"conv_in": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2"})
    links += layers({"linear2": "time_embed.2"}, "embedding.time.")
    links += [
        Link("embedding.time.linear1.weight", ("time_embed.0.weight",), swapped=True),
        Link("embedding.time.linear1.bias", ("time_embed.0.bias",)),
        Link("embedding.classes.weight", ("label_emb.weight",), no_class=True),
    ]
    places = {f"encoder.{i - 1}": f"input_blocks.{i}" for i in range(1, levels * stride)}
    places |= {
        f"decoder.{level}.{block}": f"output_blocks.{level * stride + block}"
        for level in range(levels)
        for block in range(stride)
    }
    parts = [(ours, f"{theirs}.0", f"{theirs}.1") for ours, theirs in places.items()]
    parts += [("middle.0", "middle_block.0", "middle_block.1"), ("middle.1", "middle_block.2", "")]
    parts += [(f"upsample.{level}", _up(weights, k), "") for level, k in enumerate(ends)]
    for ours, residual, attends in parts:
        links += layers(RESIDUAL, f"{ours}.", f"{residual}.")
        links += layers({"conv": "op"}, f"{ours}.", f"{residual}.")
        links += layers({"conv": "conv"}, f"{ours}.", f"{residual}.")
        links += layers({"norm": "norm"}, f"{ours}.attention.", f"{attends}.")
        links += layers({"projection": "proj_out"}, f"{ours}.attention.", f"{attends}.", kernel=1)
        width = len(weights.get(f"{attends}.norm.bias", ""))
        links += layers(
            {"qkv": "qkv"},
            f"{ours}.attention.",
            f"{attends}.",
            kernel=1,
            rows=order,
            heads=max(width // head_channels, 1),
        )
    embedded = weights["input_blocks.1.0.emb_layers.1.bias"].shape[0]
    channels = weights["input_blocks.0.0.weight"].shape[1]
    classes = weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else 0
    outputs = weights["out.2.weight"].shape[0] // channels
    model = {
        "_target_": "src.model.ResamplingUNet",
        "base_channels": base,
        "channel_multipliers": _multipliers(widths, base),
        "blocks_per_level": blocks,
        "attention_factors": attention,
        "head_channels": head_channels,
        "scale_shift": embedded == 2 * widths[0],
        "groups": 32,
        "conv_resampling": conv,
        "norm_eps": 1e-5,
        "frequency_shift": 0,
    }
    process = {**DDPM_PROCESS, "variance": "learned_range" if outputs == 2 else "large"}
    return Network(model, among(links, weights), channels, outputs, classes, process)


def _up(weights: Weights, k: int) -> str:
    """The name of what doubles the resolution at the end of an output block; empty for none."""
    for place in (f"output_blocks.{k}.1", f"output_blocks.{k}.2"):
        if f"{place}.in_layers.0.weight" in weights or f"{place}.conv.weight" in weights:
            return place
    return ""


def edm(weights: Weights) -> Network:
    """The preconditioned networks of EDM (Karras et al. 2022): DDPM++ (without classes) and ADM.

    The label is ln(sigma)/4. DDPM++: sines first after its own swap, frequencies divided by half - 1, epsilon 1e-6.
    ADM: cosines first, divided by half, epsilon 1e-5. The input for augmentation is zero in sampling and is left out.
    """
    prefix = "model." if any(name.startswith("model.") for name in weights) else ""
    sides = _numbers(weights, rf"{re.escape(prefix)}enc\.(\d+)x")[::-1]
    top, adm = sides[0], f"{prefix}out_conv.weight" in weights
    enc, dec = f"{prefix}enc.", f"{prefix}dec."
    if not adm and f"{prefix}map_label.weight" in weights:
        raise ValueError(
            "model.map_label: a DDPM++ of EDM with classes embeds them before its first layer, ours after"
            " its second; only the unconditional one and ADM are converted"
        )
    if any("aux_down" in name or "aux_residual" in name or "_skip" in name for name in weights) or (
        f"{prefix}map_noise.freqs" in weights
    ):
        raise ValueError("aux_residual: NCSN++ is not among our networks; choose a DDPM++ or ADM checkpoint")
    blocks = len(_numbers(weights, rf"{re.escape(enc)}{top}x{top}_block(\d+)\."))
    base = weights[f"{enc}{top}x{top}_conv.weight"].shape[0]
    names = {"conv_in": f"{enc}{top}x{top}_conv"}
    names |= (
        {"norm_out": f"{prefix}out_norm", "conv_out": f"{prefix}out_conv"}
        if adm
        else {"norm_out": f"{dec}{top}x{top}_aux_norm", "conv_out": f"{dec}{top}x{top}_aux_conv"}
    )
    links = layers(names) + layers({"linear2": f"{prefix}map_layer1"}, "embedding.time.")
    links += [
        Link("embedding.time.linear1.weight", (f"{prefix}map_layer0.weight",), swapped=adm),
        Link("embedding.time.linear1.bias", (f"{prefix}map_layer0.bias",)),
        Link("embedding.classes.weight", (f"{prefix}map_label.weight",), transposed=True, no_class=True),
    ]
    encoder = []
    for level, side in enumerate(sides):
        encoder += [f"{enc}{side}x{side}_down"] if level else []
        encoder += [f"{enc}{side}x{side}_block{block}" for block in range(blocks)]
    places = {f"encoder.{i}": name for i, name in enumerate(encoder)}
    low = sides[-1]
    places |= {f"middle.{i}": f"{dec}{low}x{low}_in{i}" for i in range(2)}
    for level, side in enumerate(reversed(sides)):
        places |= {f"upsample.{level - 1}": f"{dec}{side}x{side}_up"} if level else {}
        places |= {f"decoder.{level}.{b}": f"{dec}{side}x{side}_block{b}" for b in range(blocks + 1)}
    plain = {
        "norm1": "norm0",
        "conv1": "conv0",
        "embedding_projection": "affine",
        "norm2": "norm1",
        "conv2": "conv1",
        "shortcut": "skip",
        "attention.norm": "norm2",
    }
    for ours, theirs in places.items():
        links += layers(plain, f"{ours}.", f"{theirs}.")
        width = len(weights.get(f"{theirs}.norm2.bias", ""))
        heads = max(width // 64, 1) if adm else 1
        links += layers({"attention.projection": "proj"}, f"{ours}.", f"{theirs}.", kernel=2)
        links += layers(
            {"attention.qkv": "qkv"}, f"{ours}.", f"{theirs}.", kernel=2, rows=HEAD_CHANNEL_PART, heads=heads
        )
    widths = [weights[f"{enc}{side}x{side}_block0.conv0.weight"].shape[0] for side in sides]
    channels = weights[f"{enc}{top}x{top}_conv.weight"].shape[1]
    classes = weights[f"{prefix}map_label.weight"].shape[1] if f"{prefix}map_label.weight" in weights else 0
    model = {
        "_target_": "src.model.ResamplingUNet",
        "base_channels": base,
        "channel_multipliers": _multipliers(widths, base),
        "blocks_per_level": blocks,
        "attention_factors": [
            2**level for level, side in enumerate(sides) if f"{enc}{side}x{side}_block0.qkv.weight" in weights
        ],
        "decoder_attention": "all" if adm else "last",
        "head_channels": 64 if adm else None,
        "scale_shift": adm,
        "project": not adm,
        "skip_scale": 1.0 if adm else 0.5**0.5,
        "groups": 32,
        "norm_eps": 1e-5 if adm else 1e-6,
        "frequency_shift": 0 if adm else 1,
    }
    process = {
        "schedule": "edm",
        "parameterization": "edm",
        "sampler": "heun",
        "spacing": "karras",
        "clipping": "none",
        "weighting": "edm",
        "time_sampling": "log_normal",
        "sampler.steps": 18,
    }
    ignored = tuple(
        name for name in weights if name.endswith("resample_filter") or name == f"{prefix}map_augment.weight"
    )
    return Network(model, among(links, weights), channels, 1, classes, process, ignored, top)


def dit(weights: Weights) -> Network:
    """The transformer as in the code of DiT (Peebles & Xie 2023): cosines first, frequencies divided by half."""
    depth = len(_numbers(weights, r"blocks\.(\d+)\."))
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    links = layers({"patches": "x_embedder.proj", "linear_out": "final_layer.linear"})
    links += layers(
        {"modulation_out": "final_layer.adaLN_modulation.1", "embedding.time.linear2": "t_embedder.mlp.2"}
    )
    links += [
        Link("embedding.time.linear1.weight", ("t_embedder.mlp.0.weight",), swapped=True),
        Link("embedding.time.linear1.bias", ("t_embedder.mlp.0.bias",)),
        Link("embedding.classes.weight", ("y_embedder.embedding_table.weight",)),
    ]
    for i in range(depth):
        names = {
            "modulation": "adaLN_modulation.1",
            "attention.qkv": "attn.qkv",
            "attention.projection": "attn.proj",
            "feed_forward.linear_in": "mlp.fc1",
            "feed_forward.linear_out": "mlp.fc2",
        }
        links += layers(names, f"blocks.{i}.", f"blocks.{i}.")
    outputs = weights["final_layer.linear.bias"].shape[0] // (patch * patch * channels)
    classes = weights["y_embedder.embedding_table.weight"].shape[0] - 1
    model = dit_model(width, depth, patch, weights["blocks.0.mlp.fc1.bias"].shape[0] / width, 0)
    return Network(model, links, channels, outputs, classes, dit_process(outputs), ("pos_embed",))


# Heads of the published sizes, which no shape shows; others have heads of 64 channels.
HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}


def dit_model(width: int, depth: int, patch: int, mlp_ratio: float, frequency_shift: int) -> dict[str, Any]:
    """Class and options of a DiT."""
    return {
        "_target_": "src.model.DiT",
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "heads": HEADS.get(width, max(width // 64, 1)),
        "mlp_ratio": float(mlp_ratio),
        "frequency_shift": frequency_shift,
    }


def dit_process(outputs: int) -> dict[str, Any]:
    """How DiT's authors train and sample."""
    variance = "learned_range" if outputs == 2 else "large"
    return {**DDPM_PROCESS, "variance": variance, "sampler": "ddpm", "clipping": "none", "sampler.steps": 250}
