"""The networks of EDM (Karras et al. 2022): DDPM++ and ADM."""

import re

from src.interop.links import HEAD_CHANNEL_PART, Link, among, layers
from src.interop.network import Network, Weights, multipliers, numbers


def edm(weights: Weights) -> Network:
    """The preconditioned networks of EDM (Karras et al. 2022): DDPM++ (without classes) and ADM.

    The label is ln(sigma)/4. DDPM++: sines first after its own swap, frequencies divided by half - 1, epsilon 1e-6.
    ADM: cosines first, divided by half, epsilon 1e-5. The input for augmentation is zero in sampling and is left out.
    """
    prefix = "model." if any(name.startswith("model.") for name in weights) else ""
    sides = numbers(weights, rf"{re.escape(prefix)}enc\.(\d+)x")[::-1]
    top, adm = sides[0], f"{prefix}out_conv.weight" in weights
    enc = f"{prefix}enc."
    if not adm and f"{prefix}map_label.weight" in weights:
        raise ValueError(
            "model.map_label: a DDPM++ of EDM with classes embeds them before its first layer, ours after"
            " its second; only the unconditional one and ADM are converted"
        )
    if any("aux_down" in name or "aux_residual" in name or "_skip" in name for name in weights) or (
        f"{prefix}map_noise.freqs" in weights
    ):
        raise ValueError("aux_residual: NCSN++ is not among our networks; choose a DDPM++ or ADM checkpoint")
    blocks = len(numbers(weights, rf"{re.escape(enc)}{top}x{top}_block(\d+)\."))
    base = weights[f"{enc}{top}x{top}_conv.weight"].shape[0]
    links = _links(weights, prefix, sides, blocks, adm)
    widths = [weights[f"{enc}{side}x{side}_block0.conv0.weight"].shape[0] for side in sides]
    channels = weights[f"{enc}{top}x{top}_conv.weight"].shape[1]
    classes = weights[f"{prefix}map_label.weight"].shape[1] if f"{prefix}map_label.weight" in weights else 0
    model = {
        "_target_": "src.model.ResamplingUNet",
        "base_channels": base,
        "channel_multipliers": multipliers(widths, base),
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


def _links(weights: Weights, prefix: str, sides: list[int], blocks: int, adm: bool) -> list[Link]:
    """The links of all layers that such a network may have.

    Args:
        weights: the state dict.
        prefix: of all names.
        sides: side length of each level, in its blocks' names.
        blocks: blocks of a level of the encoder.
        adm: whether it is ADM, not DDPM++.
    """
    top, enc, dec = sides[0], f"{prefix}enc.", f"{prefix}dec."
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
    return links
