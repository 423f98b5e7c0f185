"""The parts that training and loading share. Hydra picks the leaves, these lines join them."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from src.app.build import build, class_of
from src.app.options import CONF
from src.conditioning import Conditioning
from src.data.codec import Codec
from src.data.source import ImageSource
from src.diffusion.classifier import NoiseClassifier
from src.diffusion.denoiser import Denoiser
from src.diffusion.distance import Distance, Squared
from src.diffusion.loss import ClassificationLoss, Loss
from src.diffusion.parameterization import Parameterization
from src.diffusion.schedule import Schedule
from src.diffusion.time_sampling import TimeSampling
from src.diffusion.variance import Variance
from src.diffusion.weighting import Simple, Weighting
from src.errors import UserError
from src.evaluation.likelihood import Likelihood
from src.evaluation.scores import ScoreSet
from src.metrics.fidelity import FidelityScore
from src.model import ForeignNetwork, Network, adapted


def source_of(config: DictConfig) -> ImageSource:
    """The data set; nothing is read yet.

    Raises:
        UserError: the network is conditioned on what the data do not have.
    """
    source = build(config.data, ImageSource, "data")
    if source is None:
        raise UserError("data: choose a data set, e.g. data=digits")
    if config.conditioning and not source.num_classes and _takes(config.conditioning, "num_classes"):
        raise UserError(
            "conditioning=class (class_conditional=true): these data have no labels; choose conditioning=none"
        )
    if config.conditioning and not source.captioned and _takes(config.conditioning, "captions"):
        raise UserError(
            "conditioning=text: these data have no captions; choose data=emoji, data.captions=true or data.caption_column"
            "=<column> where data have these options, or conditioning=none"
        )
    return source


def source_named(name: str) -> ImageSource:
    """The data set of conf/data/<name>.yaml, with its defaults."""
    return build(OmegaConf.load(CONF / "data" / f"{name}.yaml"), ImageSource, "data")


def codec_of(config: DictConfig, source: ImageSource) -> Codec:
    """What stands between the images' bytes and the network."""
    return build(config.codec, Codec, "codec", image_shape=source.image_shape)


def conditioning_of(config: DictConfig, source: ImageSource) -> Conditioning | None:
    """What the network is conditioned on; a text encoder is also given to the source, for its captions.

    Raises:
        UserError: prompts of a network without text, or no text encoder.
    """
    joined: dict[str, Any] = {}
    prompts = prompts_of(config)
    if config.conditioning and _takes(config.conditioning, "captions"):
        joined = {"prompts": prompts, "captions": lambda: captions_of(source)}
    elif prompts is not None:
        raise UserError(
            "prompts: this network is not conditioned on text; leave them out, or train with conditioning=text"
        )
    conditioning = build(config.conditioning, Conditioning, "conditioning", **joined)
    source.text_encoder = getattr(conditioning, "encoder", None)
    return conditioning


def prompts_of(config: DictConfig) -> list[str] | None:
    """The prompts of sampled images: a list, or the lines of a text file; None if none are given.

    Raises:
        UserError: the file cannot be read, or there is no text.
    """
    prompts = config.get("prompts")
    if prompts is None:
        return None
    if isinstance(prompts, str) and prompts.endswith(".txt"):
        try:
            prompts = [
                line.strip()
                for line in Path(prompts).read_text(encoding="utf-8").splitlines()
                if line.strip()
            ]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompts={config.prompts}: the file cannot be read ({error})") from None
    elif isinstance(prompts, str):
        prompts = [prompts]
    if not prompts:
        raise UserError(f"prompts={config.prompts}: there is no text in it")
    return list(prompts)


def captions_of(source: ImageSource) -> Sequence[str]:
    """The captions of the validation split."""
    source.prepare()
    return source.split("validation").captions


def denoiser_of(
    config: DictConfig, codec: Codec, conditioning: Conditioning | None, outputs: int | None = None
) -> Denoiser:
    """The network with its schedule and the meaning of its output, freshly initialised; or a classifier.

    Args:
        config: composed.
        codec: gives the shape of what the network sees.
        conditioning: what the network is given besides; None for nothing.
        outputs: outputs per channel that the network was trained with; by default those that the variance needs.

    Raises:
        UserError: the parts do not fit together.
    """
    schedule = build(config.schedule, Schedule, "schedule")
    parameterization = build(config.parameterization, Parameterization, "parameterization")
    variance = build(config.variance, Variance, "variance")
    network = network_of(config, codec, conditioning, outputs or variance.outputs)
    try:
        if network.classifies:
            return NoiseClassifier(network, schedule, parameterization)
        return Denoiser(network, schedule, parameterization, variance)
    except ValueError as error:
        raise UserError(str(error)) from None


def network_of(config: DictConfig, codec: Codec, conditioning: Conditioning | None, outputs: int) -> Network:
    """The network, checked against what it is given; `outputs` for each channel."""
    channels, height, width = codec.shape
    offered: dict[str, Any] = {
        "num_classes": getattr(conditioning, "num_classes", 0),
        "token_channels": getattr(conditioning, "token_channels", 0),
        "channels": channels,
        "image_size": height if height == width else [height, width],
    }
    if outputs > 1:
        offered["out_channels"] = channels * outputs
    joined = {
        name: value
        for name, value in offered.items()
        if _takes(config.model, name)
        and (name in ("num_classes", "token_channels") or name not in config.model)
    }
    network = adapted(build(config.model, nn.Module, "model", **joined), codec.shape)
    built, needed = network.image_shape or codec.shape, codec.shape
    for option, part in (("channels", slice(0, 1)), ("image_size", slice(1, 3))):
        if tuple(built[part]) != tuple(needed[part]):
            wrong, right = (", ".join(map(str, shape[part])) for shape in (built, needed))
            raise UserError(
                f"model.{option}={wrong}: the images have {right}; leave model.{option} out, it follows the data"
            )
    unread = (conditioning.kinds if conditioning else frozenset()) - network.reads
    if unread:
        raise UserError(
            f"model: {_name(network)} does not read {', '.join(sorted(unread))}, which conditioning="
            f"{type(conditioning).__name__} gives it; choose conditioning=none or another model"
        )
    if conditioning is not None and conditioning.dropout and isinstance(network, ForeignNetwork):
        raise UserError(
            f"conditioning.dropout={conditioning.dropout:g}: {_name(network)} comes from another package and has no"
            " embedding of dropped labels; choose conditioning.dropout=0, or write a subclass of src.model.Network"
        )
    return network


def _name(network: Network) -> str:
    return type(getattr(network, "module", network)).__name__


def _takes(node: DictConfig, name: str) -> bool:
    """Whether the constructor of a node's class has an argument of this name."""
    found = class_of(node)
    return found is not None and name in inspect.signature(found).parameters


# Parts of a loss that not every loss takes, with the choice that then stands for "none".
OPTIONAL_PARTS = {"weighting": (Weighting, Simple), "distance": (Distance, Squared)}


def loss_of(config: DictConfig, denoiser: Denoiser) -> Loss:
    """What is minimised, with those of its parts that the loss takes.

    Raises:
        UserError: a part was chosen that has no effect on this loss.
    """
    found = class_of(config.loss)
    classifies = found is not None and issubclass(found, ClassificationLoss)
    if classifies and not isinstance(denoiser, NoiseClassifier):
        raise UserError(
            "loss: this network is no classifier; choose e.g. model=encoder_tiny, or loss=denoising"
        )
    if isinstance(denoiser, NoiseClassifier) and not classifies:
        raise UserError(
            "loss: this network is a classifier; choose loss=classification, or e.g. model=unet_tiny"
        )
    parts: dict[str, Any] = {"denoiser": denoiser}
    if _takes(config.loss, "time_sampling"):
        parts["time_sampling"] = build(config.time_sampling, TimeSampling, "time_sampling")
    for option, (kind, plain) in OPTIONAL_PARTS.items():
        part = build(config[option], kind, option)
        if _takes(config.loss, option):
            parts[option] = part
        elif type(part) is not plain:
            raise UserError(
                f"{option} has no effect on this loss, which has its own: choose {option}={plain.__name__.lower()}"
            )
    return build(config.loss, Loss, "loss", **parts)


def scores_of(config: DictConfig, codec: Codec) -> ScoreSet | None:
    """The scores of images, tried on a black image: does each feature space take images of this shape?

    Raises:
        UserError: it does not, or a score is one of likelihood.
    """
    nodes = metric_nodes(config)
    if not nodes:
        return None
    scores = []
    for option, node in nodes.items():
        if is_likelihood(node):
            raise UserError(
                f"{option}: bits per dimension are for src.evaluate (metrics=nll or nll_flow), not for training; choose"
                " a score of images, or metrics=none"
            )
        score = build(node, FidelityScore, option)
        image = torch.zeros(1, *codec.image_shape, dtype=torch.uint8)
        try:
            score.features(image)
        except ValueError as error:
            raise UserError(f"{option}: {error}") from None
        scores.append(score)
    return ScoreSet(scores)


def metric_nodes(config: DictConfig) -> dict[str, DictConfig]:
    """The chosen metrics by option: one by itself, or several by name."""
    chosen = config.get("metrics")
    if not chosen:
        return {}
    if "_target_" in chosen:
        return {"metrics": chosen}
    return {f"metrics.{name}": node for name, node in chosen.items() if node}


def is_likelihood(node: DictConfig) -> bool:
    """Whether a metric's class is a score of likelihood."""
    found = class_of(node)
    return found is not None and issubclass(found, Likelihood)
