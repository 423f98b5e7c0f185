"""A denoiser as a pipeline of diffusers: `UNet2DModel` with `DDPMScheduler` or `DDIMScheduler`."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from src.diffusion.clipping import StaticClipping
from src.diffusion.denoiser import Denoiser
from src.diffusion.parameterization import X0, Eps, V
from src.diffusion.sampler import DDIM, DDPM, Sampler
from src.diffusion.schedule import DiscreteSchedule
from src.diffusion.spacing import Leading, Linspace, Spacing, Trailing
from src.diffusion.variance import Large, Learned, LearnedRange, Small
from src.interop.diffusers import unet_to_diffusers
from src.interop.diffusers_folder import CLOSE, UNET
from src.model import UNet

PREDICTIONS = {Eps: "epsilon", X0: "sample", V: "v_prediction"}
SPACINGS = {Trailing: "trailing", Leading: "leading", Linspace: "linspace"}
VARIANCES = {Small: "fixed_small", Large: "fixed_large", Learned: "learned", LearnedRange: "learned_range"}
# Tables of the package that we have too, tried in this order.
NAMED = ("linear", "scaled_linear", "squaredcos_cap_v2")


def unet_config(network: nn.Module) -> dict[str, Any]:
    """The configuration of the `UNet2DModel` that computes the same as our network.

    Raises:
        ValueError: there is none; the message begins with the option to change.
    """
    if type(network) is not UNet:
        raise ValueError(
            f"model: {type(network).__name__} has no counterpart that DDPMPipeline loads: UNet has (model=unet_tiny,"
            " unet_small or unet_ddpm); choose format=torch or format=onnx"
        )
    for part, option in (
        ("null_token", "conditioning=text"),
        ("conv_condition", "conditioning=low_resolution"),
        ("second_time_embedding", "model.second_time=true"),
    ):
        if getattr(network, part) is not None:
            raise ValueError(
                f"{option} has no counterpart in UNet2DModel, and format=torch and format=onnx refuse it too"
            )
    widths = [level[0].conv1.out_channels for level in network.encoder]
    if network.conv_in.out_channels != widths[0]:
        raise ValueError(
            f"model.channel_multipliers must begin with 1 for UNet2DModel, whose first layer has the {widths[0]}"
            " channels of the first level: choose format=torch or format=onnx"
        )
    attention = [not isinstance(level[0].attention, nn.Identity) for level in network.encoder]
    channels, height, width = network.image_shape
    return {
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "out_channels": network.out_channels,
        "layers_per_block": len(network.encoder[0]),
        "block_out_channels": tuple(widths),
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        "norm_num_groups": network.norm_out.num_groups,
        "dropout": network.encoder[0][0].dropout.p,
        "num_class_embeds": network.num_classes + 1 if network.num_classes else None,
        **{key: ours for key, (ours, _) in UNET.items()},
    }


def scheduler_config(
    denoiser: Denoiser, sampler: Sampler, spacing: Spacing, bound: float | None
) -> tuple[str, dict[str, Any]]:
    """The class and the configuration of the scheduler with the same levels and steps.

    Args:
        denoiser: gives schedule, parameterisation and variance.
        sampler: DDIM or DDPM.
        spacing: trailing, leading or linspace.
        bound: of x0; None where it is not clipped.

    Raises:
        ValueError: there is none; the message begins with the option to change.
    """
    schedule = denoiser.schedule
    other = "or format=torch or format=onnx, which hold the network alone"
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError(
            f"schedule: {type(schedule).__name__} is continuous, and DDPMScheduler has a table; choose {other}"
        )
    for option, part, known in (
        ("parameterization", denoiser.parameterization, PREDICTIONS),
        ("spacing", spacing, SPACINGS),
        ("sampler", sampler, {DDIM: "", DDPM: ""}),
        ("variance", denoiser.variance, VARIANCES),
    ):
        if type(part) not in known:
            names = ", ".join(kind.__name__.lower() for kind in known)
            raise ValueError(f"{option}: {type(part).__name__} has no counterpart; choose {names}, {other}")
    config = {
        "num_train_timesteps": schedule.T,
        "prediction_type": PREDICTIONS[type(denoiser.parameterization)],
        "timestep_spacing": SPACINGS[type(spacing)],
        "clip_sample": bound is not None,
        "clip_sample_range": 1.0 if bound is None else bound,
        **_betas(schedule),
    }
    if type(sampler) is DDIM and denoiser.variance.outputs > 1:
        raise ValueError("sampler: DDIMScheduler cannot split off a learned variance: choose sampler=ddpm")
    if type(sampler) is DDPM:
        return "DDPMScheduler", config | {"variance_type": VARIANCES[type(denoiser.variance)]}
    return "DDIMScheduler", config | {"set_alpha_to_one": True, "steps_offset": 0}


def _betas(schedule: DiscreteSchedule) -> dict[str, Any]:
    """The table by its name in the package, if that gives the same levels; otherwise as a list."""
    from diffusers import DDPMScheduler

    betas = schedule.beta
    ends = {"beta_start": betas[0].item(), "beta_end": betas[-1].item()}
    for name in NAMED:
        named = {"beta_schedule": name} | ({} if name == "squaredcos_cap_v2" else ends)
        theirs = DDPMScheduler(num_train_timesteps=schedule.T, **named).alphas_cumprod.double()
        if (theirs - schedule.alphabar[1:]).abs().max() < CLOSE:
            return named
    return {"trained_betas": betas.tolist()}


def bound_of(wrappers: Any) -> float | None:
    """The bound of static clipping among a recipe's wrappers, None for no clipping.

    Raises:
        ValueError: another wrapper, which a scheduler does not have.
    """
    bound = None
    for wrapper in wrappers:
        kind = getattr(wrapper, "func", wrapper)
        if kind is not StaticClipping:
            raise ValueError(
                f"{kind.__name__} has no counterpart in a scheduler: choose guidance=none and clipping=static or none"
            )
        bound = float(wrapper.keywords.get("bound", 1.0)) if hasattr(wrapper, "keywords") else 1.0
    return bound


def write_pipeline(
    denoiser: Denoiser, sampler: Sampler, spacing: Spacing, bound: float | None, folder: Path
) -> None:
    """Writes a folder that `DDPMPipeline` and `DDIMPipeline` load, with weights as safetensors.

    Raises:
        ValueError: see `unet_config` and `scheduler_config`.
    """
    import diffusers

    config = unet_config(denoiser.network)
    name, numbers = scheduler_config(denoiser, sampler, spacing, bound)
    with torch.device("cpu"):
        unet = diffusers.UNet2DModel(**config)
    # augmentations are zero in sampling
    state = {k: w for k, w in denoiser.network.state_dict().items() if k != "augment_embedding.weight"}
    unet.load_state_dict(unet_to_diffusers(state))
    pipeline = diffusers.DDIMPipeline if name == "DDIMScheduler" else diffusers.DDPMPipeline
    scheduler = getattr(diffusers, name)(**numbers)
    pipeline(unet=unet, scheduler=scheduler).save_pretrained(folder, safe_serialization=True)
