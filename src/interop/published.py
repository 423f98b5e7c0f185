"""State dicts of published code: DDIM (and pesser's conversions), OpenAI's improved and guided diffusion, EDM, DiT.

Each layout is recognised by the names of its weights, and the sizes of the network follow from their shapes. The
conventions that no shape shows are part of the layout: the order of sines and cosines, the divisor of the frequencies
(`frequency_shift`), the epsilon of normalisations, and what the label is.
"""

from typing import Any

from src.interop.edm import edm
from src.interop.links import Link, among, layers
from src.interop.network import DDPM_PROCESS, Network, Weights, multipliers, numbers
from src.interop.openai import openai


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


def ddim(weights: Weights) -> Network:
    """The DDPM U-Net as in the DDIM code (Song et al. 2021) and pesser's conversions of the DDPM checkpoints.

    Sines first, frequencies divided by half - 1, label t - 1: the conventions of our `UNet`.
    """
    levels, blocks = (
        len(numbers(weights, r"down\.(\d+)\.")),
        len(numbers(weights, r"down\.0\.block\.(\d+)\.")),
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
        "channel_multipliers": multipliers(widths, base),
        "blocks_per_level": blocks,
        "attention_factors": [2**level for level in attention],
        "groups": 32,
    }
    outputs = weights["conv_out.weight"].shape[0] // channels
    return Network(
        model, among(links, weights), channels, outputs, process=DDPM_PROCESS | {"variance": "large"}
    )


def dit(weights: Weights) -> Network:
    """The transformer as in the code of DiT (Peebles & Xie 2023): cosines first, frequencies divided by half."""
    depth = len(numbers(weights, r"blocks\.(\d+)\."))
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
