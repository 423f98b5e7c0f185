"""Restores the network of a run from its checkpoint."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from src.app.build import build
from src.app.conditions import conditioning_of
from src.app.parts import codec_of, denoiser_of, source_of
from src.app.shared import shared
from src.app.stored import read_config
from src.conditioning import Conditioning
from src.data.codec import Codec
from src.data.source import ImageSource
from src.diffusion.denoiser import Denoiser
from src.errors import UserError
from src.runs.folder import FoundRun
from src.training import post_hoc
from src.training.checkpoint import tensors_of
from src.training.ema import EMA

log = logging.getLogger(__name__)

NETWORK = "loss.denoiser.network."
"""Prefix of the network's weights in a checkpoint."""


@dataclass(frozen=True)
class Restored:
    """The parts of a run; the denoiser's weights are those of the checkpoint after `load_weights`.

    Attributes:
        denoiser: a denoiser, a `NoiseClassifier` or an `Autoencoder`.
    """

    source: ImageSource
    codec: Codec
    conditioning: Conditioning | None
    denoiser: Denoiser


def config_of(
    content: Mapping[str, Any], found: FoundRun, encoder: str | None = None, decoder: str | None = None
) -> DictConfig:
    """The configuration that is stored in a checkpoint, with the options of this release, checked.

    Args:
        content: of the checkpoint.
        found: the run.
        encoder, decoder: where its text encoder and its autoencoder lie now; None for the stored place.

    Raises:
        UserError: see `read_config`.
    """
    return OmegaConf.create(read_config(content, found.checkpoint, encoder, decoder))


def parts_of(config: DictConfig, outputs: int | None = None, network: nn.Module | None = None) -> Restored:
    """The parts of a run, the network freshly initialised. No image is read.

    Args:
        config: how the parts are built.
        outputs: outputs per channel that the network was trained with; see `denoiser_of`.
        network: in place of the one that would be made.
    """
    depends = OmegaConf.to_yaml(OmegaConf.masked_copy(config, ("data", "conditioning")))
    source = shared("source", depends, lambda: source_of(config))
    codec = codec_of(config, source)
    conditioning = conditioning_of(config, source, codec)
    return Restored(source, codec, conditioning, denoiser_of(config, codec, conditioning, outputs, network))


def load_weights(
    denoiser: Denoiser,
    found: FoundRun,
    content: Mapping[str, Any],
    config: DictConfig,
    weights: str | float,
) -> tuple[str, float | None]:
    """Loads a checkpoint into a denoiser, for sampling.

    Args:
        denoiser: of the run's configuration; afterwards in eval mode.
        found: the run's folder and checkpoint.
        content: of the checkpoint.
        config: of the run.
        weights: "ema" (with a warning the raw weights, if the run kept no average), "raw", or the length of a
            power-function average, made from the run's snapshots.

    Returns:
        The name of the weights in records, and the decay of the average, if it has one.

    Raises:
        UserError: a file that is not one of our checkpoints, weights that are not finite, or an average that cannot be
            made.
    """
    state, name, decay = weights_of(found, content, config, weights)
    try:
        denoiser.network.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UserError(f"{found.checkpoint} does not fit its own configuration: {first}") from None
    denoiser.eval().requires_grad_(False)
    return name, decay


def weights_of(
    found: FoundRun, content: Mapping[str, Any], config: DictConfig, weights: str | float
) -> tuple[dict[str, Any], str, float | None]:
    """The state of a checkpoint's network, with the name and the decay of its weights; see `load_weights`.

    Raises:
        UserError: weights that are not finite, or an average that cannot be made.
    """
    averages, name, decay = _averages(content, config, found, weights)
    state = {k.removeprefix(NETWORK): v for k, v in content["state_dict"].items() if k.startswith(NETWORK)}
    state |= averages
    broken = next((key for key, tensor in tensors_of(state) if not bool(tensor.isfinite().all())), None)
    if broken:
        raise UserError(
            f"{found.checkpoint}: {name} weights are not finite ({broken}); choose another checkpoint"
        )
    return state, name, decay


def _averages(
    content: Mapping[str, Any], config: DictConfig, found: FoundRun, weights: str | float
) -> tuple[dict[str, torch.Tensor], str, float | None]:
    """The chosen averaged weights, their name in records, and their decay; empty for raw weights."""
    if weights == "raw":
        return {}, "raw", None
    if not isinstance(weights, str):
        made = post_hoc.synthesise(found.folder / post_hoc.FOLDER, weights, content["global_step"])
        return made, f"ema std={weights:g}, made from snapshots", None
    stored = next((s["weights"] for name, s in content["callbacks"].items() if name.startswith("EMA")), None)
    if stored is None and "imported" in content:
        return {}, "imported", None
    if stored is None:
        log.warning("%s has no averaged weights: the raw ones are used", found.checkpoint)
        return {}, "raw", None
    ema = build(config.ema, EMA, "ema")
    return stored, ema.name, ema.decay
