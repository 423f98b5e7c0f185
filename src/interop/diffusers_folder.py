"""Folders of diffusers: which of our networks and schedules they are, without loading the package.

A folder holds a network (config.json with its weights as safetensors) and often a scheduler, in subfolders or, in early
versions, side by side.
"""

import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.diffusion.schedule import (
    JSD,
    Constant,
    Cosine,
    DiscreteSchedule,
    Quadratic,
    ScaledLinear,
    Sigmoid,
    SigmoidBeta,
    ZeroTerminalSNR,
)
from src.interop.diffusers import unet_from_diffusers
from src.interop.links import Link, layers
from src.interop.network import DDPM_PROCESS, Network, Weights
from src.interop.published import dit_model, dit_process
from src.runs.files import read_json

log = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model.safetensors"
# What our U-Net computes; keys that a file lacks have the package's default, the second entry.
UNET: dict[str, tuple[Any, Any]] = {
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "norm_eps": (1e-6, 1e-5),
    "act_fn": ("silu", "silu"),
    "attention_head_dim": (None, 8),
    "mid_block_scale_factor": (1, 1),
    "resnet_time_scale_shift": ("default", "default"),
    "add_attention": (True, True),
    "attn_norm_num_groups": (None, None),
    "class_embed_type": (None, None),
    "time_embedding_dim": (None, None),
}
ATTENTION = {"DownBlock2D": False, "AttnDownBlock2D": True, "UpBlock2D": False, "AttnUpBlock2D": True}


@dataclass(frozen=True)
class Folder:
    """Where the parts of a folder of diffusers lie.

    Attributes:
        config: of the network.
        weights: the file of its weights; it may be missing.
        scheduler: configuration of the scheduler; empty for none.
        decoder: the folder of the autoencoder, of a pipeline in latents; else None.
    """

    config: dict[str, Any]
    weights: Path
    scheduler: dict[str, Any]
    decoder: Path | None


def folder_at(path: Path) -> Folder | None:
    """The parts of a folder of diffusers; None if it holds no network's configuration.

    Raises:
        Damaged: a configuration is not JSON.
    """
    place = next(
        (p for p in (path / "unet", path / "transformer", path) if (p / "config.json").is_file()), None
    )
    if place is None:
        return None
    schedulers = (path / "scheduler" / "scheduler_config.json", path / "scheduler_config.json")
    scheduler = next((read_json(file, dict[str, Any]) for file in schedulers if file.is_file()), {})
    decoder = path / "vae"
    config = read_json(place / "config.json", dict[str, Any])
    return Folder(config, place / WEIGHTS, scheduler, decoder if decoder.is_dir() else None)


def network_of(folder: Folder, weights: Weights) -> Network:
    """The network of a folder with these weights.

    Raises:
        ValueError: our networks do not compute the same; the message names the entry of the configuration.
    """
    kind = folder.config.get("_class_name")
    if kind == "UNet2DModel":
        return unet(folder.config)
    if kind in ("Transformer2DModel", "DiTTransformer2DModel"):
        return transformer(folder.config, weights)
    raise ValueError(f"config.json: _class_name={kind}: UNet2DModel and the transformer of DiT are converted")


class DiffusersUNet(Network):
    """Our `UNet` in the layout of `UNet2DModel`.

    The last row of its class embedding is that of "no class", unless the data have a class for each row.
    """

    def read(self, theirs: Weights) -> dict[str, Tensor]:
        ours = unet_from_diffusers(theirs)
        rows = ours.get("class_embedding.weight")
        if rows is not None and len(rows) == self.num_classes:  # without a row for "no class"
            ours["class_embedding.weight"] = torch.cat((rows, torch.zeros_like(rows[:1])))
        return ours

    def for_data(self, num_classes: int) -> Network:
        every = self.num_classes and num_classes == self.num_classes + 1
        return replace(self, num_classes=num_classes) if every else self


def unet(config: Mapping[str, Any]) -> Network:
    """The network of a `UNet2DModel`, if it is that of DDPM."""
    for key, (ours, default) in UNET.items():
        theirs = config.get(key, default)
        if theirs != ours:
            raise ValueError(f"config.json: {key}={theirs}: this U-Net is not that of DDPM, which has {ours}")
    down, up = config["down_block_types"], config["up_block_types"]
    if not {*down, *up} <= ATTENTION.keys():
        other = sorted({*down, *up} - ATTENTION.keys())[0]
        raise ValueError(
            f"config.json: {other}: our U-Net has DownBlock2D, AttnDownBlock2D, UpBlock2D, AttnUpBlock2D"
        )
    attention = [ATTENTION[name] for name in down]
    if attention != [ATTENTION[name] for name in reversed(up)]:
        raise ValueError("config.json: up_block_types: attention is not at the levels of down_block_types")
    widths = config["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise ValueError(f"config.json: block_out_channels={widths}: they are no multiples of the first")
    model = {
        "_target_": "src.model.UNet",
        "base_channels": widths[0],
        "channel_multipliers": [width // widths[0] for width in widths],
        "blocks_per_level": config.get("layers_per_block", 2),
        "attention_factors": [2**level for level, attends in enumerate(attention) if attends],
        "groups": config.get("norm_num_groups", 32),
        "dropout": float(config.get("dropout", 0.0)),
    }
    channels = config.get("in_channels", 3)
    classes = config.get("num_class_embeds")
    side = config.get("sample_size")
    return DiffusersUNet(
        model,
        [],
        channels,
        config.get("out_channels", 3) // channels,
        classes - 1 if classes else 0,
        DDPM_PROCESS,
        side=side if isinstance(side, int) else None,
    )


EMBEDDING = "transformer_blocks.{}.norm1.emb."


def transformer(config: Mapping[str, Any], weights: Weights) -> Network:
    """The transformer of DiT. Each block has a copy of the embedding of time and class; ours has one.

    Frequencies are divided by half - 1, as the package computes them; DiT's own code divides by half.
    """
    for key, ours in (
        ("activation_fn", "gelu-approximate"),
        ("norm_type", "ada_norm_zero"),
        ("patch_size", None),
    ):
        if ours is not None and config.get(key, ours) != ours:
            raise ValueError(f"config.json: {key}={config[key]}: DiT has {ours}")
    depth, heads = config["num_layers"], config["num_attention_heads"]
    copies = transformer_copies(depth)
    for name, original in copies.items():
        if not torch.equal(weights[name], weights[original]):
            raise ValueError(f"{name} differs from {original}: in DiT all blocks share one embedding")
    width, patch = heads * config["attention_head_dim"], config["patch_size"]
    hidden = weights["transformer_blocks.0.ff.net.0.proj.bias"].shape[0]
    model = dit_model(width, depth, patch, hidden / width, 1) | {"heads": heads}
    channels = config["in_channels"]
    outputs = (config.get("out_channels") or channels) // channels
    classes = weights[f"{EMBEDDING.format(0)}class_embedder.embedding_table.weight"].shape[0] - 1
    ignored = (*copies, "pos_embed.pos_embed")
    return Network(
        model,
        transformer_links(depth),
        channels,
        outputs,
        classes,
        dit_process(outputs),
        ignored,
        config.get("sample_size"),
    )


def transformer_copies(depth: int) -> dict[str, str]:
    """The embedding's weights of all blocks but the first, with the names of those of the first."""
    names = [f"timestep_embedder.linear_{i}.{end}" for i in (1, 2) for end in ("weight", "bias")]
    names.append("class_embedder.embedding_table.weight")
    return {EMBEDDING.format(i) + name: EMBEDDING.format(0) + name for i in range(1, depth) for name in names}


def transformer_links(depth: int) -> list[Link]:
    """The links between `DiT` and diffusers' transformer."""
    first = EMBEDDING.format(0)
    links = layers(
        {
            "patches": "pos_embed.proj",
            "modulation_out": "proj_out_1",
            "linear_out": "proj_out_2",
            "embedding.time.linear2": f"{first}timestep_embedder.linear_2",
        }
    )
    links += [
        Link("embedding.time.linear1.weight", (f"{first}timestep_embedder.linear_1.weight",), swapped=True),
        Link("embedding.time.linear1.bias", (f"{first}timestep_embedder.linear_1.bias",)),
        Link("embedding.classes.weight", (f"{first}class_embedder.embedding_table.weight",)),
    ]
    for i in range(depth):
        names = {
            "modulation": "norm1.linear",
            "attention.projection": "attn1.to_out.0",
            "feed_forward.linear_in": "ff.net.0.proj",
            "feed_forward.linear_out": "ff.net.2",
        }
        links += layers(names, f"blocks.{i}.", f"transformer_blocks.{i}.")
        links += [
            Link(
                f"blocks.{i}.attention.qkv.{end}",
                tuple(f"transformer_blocks.{i}.attn1.to_{part}.{end}" for part in "qkv"),
            )
            for end in ("weight", "bias")
        ]
    return links


SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "sigmoid": "sigmoid_beta"}
# Our tables that diffusers does not name, with the default options; src.export writes them as trained_betas.
TABLES: dict[str, Callable[[int], DiscreteSchedule]] = {
    "sigmoid": Sigmoid,
    "sigmoid_beta": SigmoidBeta,
    "quadratic": Quadratic,
    "cosine": Cosine,
    "constant": Constant,
    "jsd": JSD,
    "zero_terminal_snr": lambda T: ZeroTerminalSNR(ScaledLinear(T)),
}
CLOSE = 2e-6
"""The largest difference of alphabar between equal tables; diffusers computes in float32."""
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "small",
    "fixed_large": "large",
    "learned": "learned",
    "learned_range": "learned_range",
}
SAMPLERS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"}


def process_of(scheduler: Mapping[str, Any], chosen: Collection[str] = ()) -> dict[str, Any]:
    """Choices of conf/train.yaml that are the same process as a scheduler of diffusers.

    Args:
        scheduler: its configuration.
        chosen: groups that are chosen otherwise; what the scheduler says of them is not read.

    Raises:
        ValueError: a schedule that is none of ours; the message names the entry of the configuration.
    """
    if not scheduler:
        return {}
    process = {} if "schedule" in chosen else schedule_of(scheduler)
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction in PREDICTIONS:
        process["parameterization"] = PREDICTIONS[prediction]
    elif "parameterization" not in chosen:
        raise ValueError(
            f"scheduler_config.json: prediction_type={prediction}: choose from {', '.join(PREDICTIONS)}"
        )
    process["variance"] = VARIANCES.get(
        re.sub("_log$", "", scheduler.get("variance_type", "fixed_small")), "small"
    )
    process["spacing"] = scheduler.get("timestep_spacing", "leading")
    kind = scheduler.get("_class_name", "DDIMScheduler")
    process["clipping"] = "static" if scheduler.get("clip_sample", kind in SAMPLERS) else "none"
    if process["clipping"] == "static":
        process["clipping.bound"] = float(scheduler.get("clip_sample_range", 1.0))
    process["sampler"] = SAMPLERS.get(kind, "ddim")
    if process["sampler"] == "ddpm":
        process["sampler.steps"] = scheduler.get("num_train_timesteps", 1000)
    # what is not converted: its group, the value that is, and what is done instead
    for key, group, same, instead in (
        ("_class_name", "sampler", kind if kind in SAMPLERS else "", "sampler=ddim is used"),
        ("set_alpha_to_one", "sampler", True, "the last step leads to the clean image"),
        ("steps_offset", "spacing", 0, "times are those of steps_offset=0"),
        ("thresholding", "clipping", False, f"clipping={process['clipping']} is used"),
    ):
        theirs = scheduler.get(key, same)
        if theirs != same and group not in chosen:
            log.warning(
                f"scheduler_config.json: {key}={theirs} is not converted: {instead}; choose another with {group}=..."
            )
    return process


def schedule_of(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule of a scheduler of diffusers, with its options.

    Raises:
        ValueError: it is none of ours.
    """
    if scheduler.get("rescale_betas_zero_snr"):
        raise ValueError(
            "scheduler_config.json: rescale_betas_zero_snr=true: add schedule=zero_terminal_snr and its inner schedule,"
            " schedule@schedule.inner=linear, scaled_linear or cosine"
        )
    if betas := scheduler.get("trained_betas"):
        alphabar = torch.tensor(betas, dtype=torch.float64).neg().add(1).cumprod(0)
        for name, table in TABLES.items() if len(betas) > 1 else ():
            if (table(len(betas)).alphabar[1:] - alphabar).abs().max() < CLOSE:
                inner = "inner." if name == "zero_terminal_snr" else ""
                return {"schedule": name, f"schedule.{inner}T": len(betas)}
        raise ValueError(
            "scheduler_config.json: trained_betas is no table of ours with the default options: add the schedule of the"
            " training with its options, e.g. schedule=sigmoid schedule.tau=0.7"
        )
    T = scheduler.get("num_train_timesteps", 1000)
    kind = scheduler.get("beta_schedule", "linear")
    if kind == "squaredcos_cap_v2":
        return {"schedule": "cosine", "schedule.T": T}
    if kind not in SCHEDULES:
        known = ", ".join((*SCHEDULES, "squaredcos_cap_v2"))
        raise ValueError(
            f"scheduler_config.json: beta_schedule={kind}: {known} are converted; add schedule=... for another"
        )
    # our linear schedule is that of 1,000 steps, scaled to T
    scale = T / 1000 if kind == "linear" else 1.0
    ends = {
        f"schedule.{end}": scheduler.get(end, default) * scale
        for end, default in (("beta_start", 1e-4), ("beta_end", 0.02))
    }
    return {"schedule": SCHEDULES[kind], "schedule.T": T, **ends}
