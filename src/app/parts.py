"""The parts that training and loading share. Hydra picks the leaves, these lines join them."""

import inspect
import logging
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from src.app.build import build, check_value, class_of, resolve
from src.app.options import CONF
from src.conditioning import Conditioning
from src.data.codec import Codec
from src.data.examples import Examples
from src.data.source import ImageSource
from src.diffusion.denoiser import Denoiser, WrappedDenoiser, Wrapper
from src.diffusion.distance import Distance, Squared
from src.diffusion.guidance import ClassifierFree
from src.diffusion.loss import Loss
from src.diffusion.parameterization import Parameterization
from src.diffusion.sampler import Sampler
from src.diffusion.schedule import Schedule
from src.diffusion.spacing import Spacing
from src.diffusion.time_sampling import TimeSampling
from src.diffusion.variance import Variance
from src.diffusion.weighting import Simple, Weighting
from src.errors import UserError
from src.evaluation.likelihood import Likelihood
from src.evaluation.scores import ScoreSet
from src.generation.recipe import Recipe
from src.metrics.fidelity import FidelityScore
from src.model import ForeignNetwork, Network, adapted

log = logging.getLogger(__name__)


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
    return source


def source_named(name: str) -> ImageSource:
    """The data set of conf/data/<name>.yaml, with its defaults."""
    return build(OmegaConf.load(CONF / "data" / f"{name}.yaml"), ImageSource, "data")


def codec_of(config: DictConfig, source: ImageSource) -> Codec:
    """What stands between the images' bytes and the network."""
    return build(config.codec, Codec, "codec", image_shape=source.image_shape)


def conditioning_of(config: DictConfig, source: ImageSource, codec: Codec) -> Conditioning | None:
    """What the network is conditioned on; images come from the validation split in previews and scores.

    Raises:
        UserError: it does not suit the images.
    """
    if not config.conditioning:
        return None
    joined = {"examples": Examples(source, codec)} if _takes(config.conditioning, "examples") else {}
    conditioning = build(config.conditioning, Conditioning, "conditioning", **joined)
    try:
        conditioning.check(codec.shape)
    except ValueError as error:
        raise UserError(f"conditioning.{error}") from None
    return conditioning


def denoiser_of(
    config: DictConfig, codec: Codec, conditioning: Conditioning | None, outputs: int | None = None
) -> Denoiser:
    """The network with its schedule and the meaning of its output, freshly initialised.

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
        return Denoiser(network, schedule, parameterization, variance)
    except ValueError as error:
        raise UserError(str(error)) from None


# Options of the network that follow the conditioning, and cannot be given.
OF_CONDITIONING = ("num_classes", "condition_channels")


def network_of(config: DictConfig, codec: Codec, conditioning: Conditioning | None, outputs: int) -> Network:
    """The network, checked against what it is given; `outputs` for each channel."""
    channels, height, width = codec.shape
    reads_images = conditioning is not None and "image" in conditioning.kinds
    offered: dict[str, Any] = {
        "num_classes": getattr(conditioning, "num_classes", 0),
        "condition_channels": channels if reads_images else 0,
        "channels": channels,
        "image_size": height if height == width else [height, width],
    }
    if outputs > 1:
        offered["out_channels"] = channels * outputs
    joined = {
        name: value
        for name, value in offered.items()
        if _takes(config.model, name) and (name in OF_CONDITIONING or name not in config.model)
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


def recipe_of(
    config: DictConfig, seed: int, denoiser: Denoiser, codec: Codec, conditioning: Conditioning | None
) -> Recipe:
    """How images are made; its times and its wrappers are tried on the denoiser at once.

    Raises:
        UserError: they do not fit.
    """
    numbers = resolve(config.sampler, "sampler")
    # the number of steps belongs to the spacing, but everyone looks for it at the sampler
    steps = numbers.pop("steps", None)
    if steps is None:
        raise UserError("sampler.steps is missing: give it in the sampler's file or as sampler.steps=...")
    check_value(int, steps, "sampler.steps")
    check_guidance(config, conditioning)
    wrappers = wrappers_of(config)
    recipe = Recipe(
        sampler=build(OmegaConf.create(numbers), Sampler, "sampler"),
        spacing=build(config.spacing, Spacing, "spacing"),
        steps=steps,
        wrappers=tuple(wrappers.values()),
        codec=codec,
        conditioning=conditioning,
        seed=seed,
    )
    option, inner = "sampler", denoiser
    try:
        recipe.times(denoiser.schedule)
        for option, wrap in wrappers.items():  # noqa: B007 - named in the error
            inner = wrap(inner)
    except ValueError as error:
        raise UserError(f"{option}.{error}") from None
    except TypeError as error:  # a wrapper without a needed argument
        raise UserError(f"{option}: {error}") from None
    return recipe


def check_guidance(config: DictConfig, conditioning: Conditioning | None) -> None:
    """Checks guidance against the network's conditioning, and warns of a network that was not trained for it.

    Raises:
        UserError: guidance of an unconditional network.
    """
    found = class_of(config.guidance)
    if found is None or not issubclass(found, ClassifierFree):
        return
    if conditioning is None:
        raise UserError(
            "guidance: this network has no condition to be guided by; choose guidance=none, or train with"
            " conditioning=class conditioning.dropout=0.1"
        )
    if not conditioning.dropout and config.guidance.get("scale", 1) != 1:
        log.warning(
            "guidance: this network was trained with conditioning.dropout=0, so that its prediction without a condition"
            " is arbitrary; train with conditioning.dropout=0.1"
        )


def wrappers_of(config: DictConfig) -> dict[str, Wrapper]:
    """What makes the denoisers around the network's, by option, the innermost first: guidance, your own, clipping."""
    nodes = {"guidance": config.guidance}
    nodes |= {f"wrappers.{name}": node for name, node in (config.get("wrappers") or {}).items()}
    nodes["clipping"] = config.clipping
    wrappers = {}
    for option, node in nodes.items():
        if node and not isinstance(node, DictConfig):
            raise UserError(f"{option}={node}: give a class, e.g. {{_target_: mypackage.Mine}}")
        if node:
            content = {**OmegaConf.to_container(node, resolve=False), "_partial_": True}
            resolved = OmegaConf.create(content, parent=node._get_parent())
            wrappers[option] = build(resolved, WrappedDenoiser, option)
    return wrappers


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
