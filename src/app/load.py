"""Loads a trained run: run folder or checkpoint -> `LoadedRun`, ready to be sampled and scored."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from src.app.build import build, class_of
from src.app.options import NUMERICS, groups_of
from src.app.recipes import recipe_of
from src.app.restore import config_of, load_weights, parts_of
from src.app.shared import shared
from src.data.source import ImageSource
from src.diffusion.autoencoder import Autoencoder
from src.diffusion.classifier import NoiseClassifier
from src.diffusion.denoiser import Denoiser
from src.diffusion.restoration import Restoration
from src.diffusion.variance import Variance
from src.errors import UserError
from src.generation.loaded import USUAL, LoadedRun, Numerics
from src.generation.recipe import Recipe, describe, kind_of, warn_of_amplified_errors
from src.runs.folder import FoundRun, find_run
from src.runs.machine import keep_freed_memory
from src.runs.processes import rank
from src.training.reading import read_checkpoint

log = logging.getLogger(__name__)


def load_with(config: DictConfig) -> tuple[LoadedRun, DictConfig]:
    """The run that conf/sample.yaml or conf/evaluate.yaml names, with its choices.

    Returns:
        The run; and its configuration, with those choices.

    Raises:
        UserError: no such run, or an impossible choice.
    """
    # groups that replace those of the run; null keeps the run's choice
    chosen = {name: config[name] for name in groups_of("train") if config.get(name) is not None}
    chosen |= {"wrappers": config.wrappers} if config.wrappers else {}
    chosen = {name: node for name, node in chosen.items() if name not in ("data", "conditioning", "codec")}
    found, content = shared(
        "checkpoint", (config.run, config.checkpoint), lambda: _checkpoint(config.run, config.checkpoint)
    )
    own = config_of(content, found, config.conditioning.encoder.name, config.codec.folder)
    own_variance = build(own.variance, Variance, "variance")
    merged = with_choices(own, chosen, config.data)
    for name in ("prompts", "labels"):
        if config[name] is not None:
            merged[name] = config[name]
    report_replaced(own.guidance, merged.guidance)
    variance = build(merged.variance, Variance, "variance")
    if variance.outputs > 1 and type(variance) is not type(own_variance):
        raise UserError(
            f"variance: {describe(variance)} needs a network that was trained with it, and this run's was trained with"
            f" {describe(own_variance)}; choose variance=small or large"
        )
    outputs = own_variance.outputs
    method = restoration_of(config)
    # exports have no such options
    numerics = Numerics(*(config.get(option.name, option.default) for option in NUMERICS))
    loaded = load(
        found, content, merged, config.weights, config.device, config.seed, outputs, method, numerics
    )
    if config.data.root or config.data.path:
        warn_of_other_images(loaded.source, content)
    return loaded, merged


def _checkpoint(run: str, which: str) -> tuple[FoundRun, Mapping[str, Any]]:
    """A run and the content of its checkpoint."""
    found = find_run(run, which)
    return found, read_checkpoint(found.checkpoint)


def with_choices(own: DictConfig, chosen: Mapping[str, DictConfig], data: DictConfig) -> DictConfig:
    """A run's configuration with other groups, and with its data in another place.

    Raises:
        UserError: the data have no such option.
    """
    merged = own.copy()
    for name, node in chosen.items():
        merged[name] = node
    for name, value in data.items():
        if value is not None:
            if name not in merged.data:
                raise UserError(
                    f"data.{name}: this run's data set, {merged.data._target_}, has no such option"
                )
            merged.data[name] = value
    return merged


def restoration_of(config: DictConfig) -> type[Restoration] | None:
    """The method of a task's restoration: the chosen one, or the task's own; None for other tasks."""
    default = getattr(class_of(config.get("task")), "default", None)
    return class_of(config.get("restoration")) or (default and kind_of(default))


def report_replaced(own: DictConfig | None, chosen: DictConfig | None) -> None:
    """Reports a run's own guidance that another one replaces, e.g. by `guidance.scale=4` alone."""
    kinds = [{**(node or {}), "scale": None} for node in (own, chosen)]
    if own and chosen and kinds[0] != kinds[1] and rank() == 0:
        before, after = (
            f"{str(node._target_).rpartition('.')[2]}("
            + ", ".join(f"{name}={value}" for name, value in node.items() if not str(name).startswith("_"))
            + ")"
            for node in (own, chosen)
        )
        log.info(
            "guidance: %s replaces this run's own, %s; to keep its kind, choose guidance=<its file>",
            after,
            before,
        )


def warn_of_other_images(source: ImageSource, content: Mapping[str, Any]) -> None:
    """Warns where the images in a new place are not those of the training."""
    source.prepare()
    trained_on = (content.get("origin") or {}).get("data")
    if trained_on and source.fingerprint("train") != trained_on:
        log.warning("data: these training images differ from those that the run was trained on")


def load(
    found: FoundRun,
    content: Mapping[str, Any],
    config: DictConfig,
    weights: str | float = "ema",
    device: str = "auto",
    seed: int = 0,
    outputs: int | None = None,
    restoration: type[Restoration] | None = None,
    numerics: Numerics = USUAL,
) -> LoadedRun:
    """The denoiser of a run.

    Args:
        found: its folder and checkpoint.
        content: of the checkpoint.
        config: how the parts are built.
        weights: see `load_weights`.
        device: "auto", or a torch device.
        seed: of the sampling noise.
        outputs: outputs per channel that the network was trained with; see `denoiser_of`.
        restoration: the method that will be used around the sampler, if any.
        numerics: how images are computed.

    Raises:
        UserError: a file that is not one of our checkpoints, or an impossible choice.
    """
    on = pick_device(device)
    parts_of_network = ("model", "data", "codec", "conditioning", "augmentation", "ema")
    depends = OmegaConf.to_yaml(OmegaConf.masked_copy(config, parts_of_network))
    key = (found, weights, on, outputs, numerics.precision, numerics.compiled, depends)
    kept: dict[str, Any] = shared("network", key, dict)
    parts = parts_of(config, outputs, kept.get("network"))
    if isinstance(parts.denoiser, Autoencoder):
        raise UserError(
            f"run={found.folder}: this run is an autoencoder, which makes no images; write it with python -m src.export"
            " run=... out=<folder>, and train with codec=autoencoder_kl codec.folder=<folder>"
        )
    if isinstance(parts.denoiser, NoiseClassifier):
        raise UserError(
            f"run={found.folder}: this run is a classifier, which makes no images; choose a diffusion run, and guide it"
            f" with guidance=classifier guidance.run={found.folder}"
        )
    denoiser = parts.denoiser
    recipe = recipe_of(config, seed, denoiser, parts.codec, parts.conditioning, restoration)
    warn_of_amplified_errors(denoiser, recipe)
    if not kept:
        kept["weights"] = load_weights(denoiser, found, content, config, weights)
        kept["network"] = denoiser.network
        if numerics.compiled:
            denoiser.network.compile()
    name, decay = kept["weights"]
    if on.type == "cpu":
        keep_freed_memory()
    denoiser.eval().to(on)
    parts.codec.to(on)
    recipe = replace(recipe, device_noise=numerics.noise == "device")
    for each in (denoiser, *guides_in(recipe)):
        set_precision(each, numerics.precision)
    return LoadedRun(denoiser, recipe, parts.source, found, content["global_step"], name, decay, numerics)


def guides_in(recipe: Recipe) -> list[Denoiser]:
    """The denoisers of second runs that guide a recipe. A classifier is none, and keeps its precision."""
    arguments = [part for wrapper in recipe.wrappers for part in getattr(wrapper, "keywords", {}).values()]
    modules = [module for part in arguments if isinstance(part, nn.Module) for module in part.modules()]
    return [each for each in modules if isinstance(each, Denoiser) and not isinstance(each, NoiseClassifier)]


def set_precision(denoiser: Denoiser, precision: str) -> None:
    """Lets the network compute in this precision; see `Numerics`."""
    if precision == "bf16-true":
        denoiser.network.to(torch.bfloat16)
    denoiser.autocast = torch.bfloat16 if precision == "bf16-mixed" else None


def pick_device(device: str) -> torch.device:
    """A torch device; "auto" takes an accelerator if there is one, of several processes each its own.

    Raises:
        UserError: there is no such device.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            return torch.device("cpu")
        return torch.device(accelerator.type, rank() % torch.accelerator.device_count())
    try:
        return torch.empty(0, device=device).device
    except Exception as error:
        raise UserError(f"device={device}: {str(error).splitlines()[0]}; choose auto or cpu") from None
