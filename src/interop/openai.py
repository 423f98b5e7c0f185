"""The U-Nets of OpenAI's improved and guided diffusion."""

from src.interop.links import HEAD_PART_CHANNEL, PART_HEAD_CHANNEL, Link, among, layers
from src.interop.network import DDPM_PROCESS, Network, Weights, multipliers, numbers

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
    outs = len(numbers(weights, r"output_blocks\.(\d+)\."))
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
    links = _links(weights, levels, stride, ends, order, head_channels)
    embedded = weights["input_blocks.1.0.emb_layers.1.bias"].shape[0]
    channels = weights["input_blocks.0.0.weight"].shape[1]
    classes = weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else 0
    outputs = weights["out.2.weight"].shape[0] // channels
    model = {
        "_target_": "src.model.ResamplingUNet",
        "base_channels": base,
        "channel_multipliers": multipliers(widths, base),
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


def _links(
    weights: Weights, levels: int, stride: int, ends: list[int], order: str, head_channels: int
) -> list[Link]:
    """The links of all layers that such a network may have.

    Args:
        weights: the state dict.
        levels: number of levels.
        stride: blocks of a level, with the one that resamples.
        ends: output blocks at whose end the resolution is doubled.
        order: of the rows of query, key and value.
        head_channels: channels of an attention head.
    """
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
    return links


def _up(weights: Weights, k: int) -> str:
    """The name of what doubles the resolution at the end of an output block; empty for none."""
    for place in (f"output_blocks.{k}.1", f"output_blocks.{k}.2"):
        if f"{place}.in_layers.0.weight" in weights or f"{place}.conv.weight" in weights:
            return place
    return ""
