"""The parts that training and loading share. Hydra picks the leaves, these lines join them."""

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from src.app.build import build, class_of, takes
from src.app.options import CONF, RUN_OPTIONS
from src.conditioning import Conditioning
from src.data.codec import Codec
from src.data.source import ImageSource
from src.diffusion.autoencoder import Autoencoder
from src.diffusion.classifier import NoiseClassifier
from src.diffusion.denoiser import BaseDenoiser, Denoiser
from src.diffusion.distance import Distance, Squared
from src.diffusion.loss import ClassificationLoss, Loss, ReconstructionLoss
from src.diffusion.parameterization import Parameterization
from src.diffusion.schedule import Schedule
from src.diffusion.spacing import Spacing
from src.diffusion.time_sampling import TimeSampling
from src.diffusion.variance import Variance
from src.diffusion.weighting import Simple, Weighting
from src.errors import UserError
from src.evaluation.likelihood import Likelihood
from src.evaluation.memorisation import Memorisation
from src.evaluation.scores import ScoreSet
from src.generation.recipe import Recipe
from src.metrics.score import FidelityScore
from src.model import ForeignNetwork, Network, adapted


def source_of(config: DictConfig) -> ImageSource:
    """The data set; nothing is read yet.

    Raises:
        UserError: the network is conditioned on what the data do not have.
    """
    source = build(config.data, ImageSource, "data")
    if source is None:
        raise UserError("data: choose a data set, e.g. data=digits")
    if config.conditioning and not source.num_classes and takes(config.conditioning, "num_classes"):
        raise UserError(
            "conditioning=class (class_conditional=true): these data have no labels; choose conditioning=none"
        )
    if config.conditioning and not source.captioned and takes(config.conditioning, "captions"):
        raise UserError(
            "conditioning=text: these data have no captions; choose data=emoji, or data.captions=true or"
            " data.caption_column=<column> where data have this option, or conditioning=none"
        )
    return source


def source_named(name: str) -> ImageSource:
    """The data set of conf/data/<name>.yaml, with its defaults."""
    return build(OmegaConf.load(CONF / "data" / f"{name}.yaml"), ImageSource, "data")


def codec_of(config: DictConfig, source: ImageSource) -> Codec:
    """What stands between the images' bytes and the network.

    Raises:
        UserError: it does not fit the images, or has no folder.
    """
    if OmegaConf.is_missing(config.codec, "folder"):
        raise UserError(
            "codec.folder is missing: give codec.folder=<folder of an AutoencoderKL>; see docs/latents.md"
        )
    return build(config.codec, Codec, "codec", image_shape=source.image_shape)


def denoiser_of(
    config: DictConfig,
    codec: Codec,
    conditioning: Conditioning | None,
    outputs: int | None = None,
    network: nn.Module | None = None,
) -> Denoiser:
    """The network with its schedule and the meaning of its output, freshly initialised; or what trains as one.

    Args:
        config: composed.
        codec: gives the shape of what the network sees.
        conditioning: what the network is given besides; None for nothing.
        outputs: outputs per channel that the network was trained with; by default those that the variance needs.
        network: in place of the one that would be made.

    Raises:
        UserError: the parts do not fit together.
    """
    schedule = build(config.schedule, Schedule, "schedule")
    parameterization = build(config.parameterization, Parameterization, "parameterization")
    variance = build(config.variance, Variance, "variance")
    if network is None:
        network = network_of(config, codec, conditioning, outputs or variance.outputs)
    if network.autoencodes and not codec.bounded:
        raise UserError("codec: an autoencoder is trained on pixels; choose codec=pixels")
    try:
        if network.autoencodes:
            return Autoencoder(network, schedule, parameterization)
        if network.classifies:
            return NoiseClassifier(network, schedule, parameterization)
        return Denoiser(network, schedule, parameterization, variance)
    except ValueError as error:
        raise UserError(str(error)) from None


# Options of the network that follow the conditioning or the augmentation, and cannot be given.
OF_CONDITIONING = ("num_classes", "token_channels", "condition_channels", "augment_channels")


def network_of(config: DictConfig, codec: Codec, conditioning: Conditioning | None, outputs: int) -> Network:
    """The network, checked against what it is given; `outputs` for each channel."""
    channels, height, width = codec.shape
    reads_images = conditioning is not None and "image" in conditioning.kinds
    offered: dict[str, Any] = {
        "num_classes": getattr(conditioning, "num_classes", 0),
        "token_channels": getattr(conditioning, "token_channels", 0),
        "condition_channels": channels if reads_images else 0,
        "augment_channels": getattr(class_of(config.get("augmentation")), "channels", 0),
        "channels": channels,
        "image_size": height if height == width else [height, width],
    }
    if outputs > 1:
        offered["out_channels"] = channels * outputs
    joined = {
        name: value
        for name, value in offered.items()
        if takes(config.model, name) and (name in OF_CONDITIONING or name not in config.model)
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


# Parts of a loss that not every loss takes, with the choice that then stands for "none".
OPTIONAL_PARTS = {"weighting": (Weighting, Simple), "distance": (Distance, Squared)}


def loss_of(config: DictConfig, denoiser: Denoiser, teacher: BaseDenoiser | None = None) -> Loss:
    """What is minimised, with those of its parts that the loss takes.

    Args:
        config: composed.
        denoiser: the denoiser that is trained.
        teacher: a frozen denoiser, for losses that take one; see `guides.teacher_of`.

    Raises:
        UserError: a part was chosen that has no effect on this loss.
    """
    found = class_of(config.loss) or object
    for kind, loss, choice, model in (
        (NoiseClassifier, ClassificationLoss, "classification", "encoder_tiny"),
        (Autoencoder, ReconstructionLoss, "reconstruction", "autoencoder_kl"),
    ):
        if issubclass(found, loss) and not isinstance(denoiser, kind):
            raise UserError(
                f"loss={choice}: {_name(denoiser.network)} is no network for it; choose e.g. model={model}, or"
                " loss=denoising"
            )
        if isinstance(denoiser, kind) and not issubclass(found, loss):
            raise UserError(
                f"loss: {_name(denoiser.network)} is a network for loss={choice}; choose it, or e.g. model=unet_tiny"
            )
    parts: dict[str, Any] = {"denoiser": denoiser}
    if takes(config.loss, "time_sampling"):
        parts["time_sampling"] = build(config.time_sampling, TimeSampling, "time_sampling")
    if takes(config.loss, "spacing"):
        parts["spacing"] = build(config.spacing, Spacing, "spacing")
    node = config.loss
    if takes(node, "teacher"):
        parts["teacher"] = teacher
        content = OmegaConf.to_container(node, resolve=False)
        content = {name: value for name, value in content.items() if name not in RUN_OPTIONS}
        node = OmegaConf.create(content, parent=node._get_parent())
    for option, (kind, plain) in OPTIONAL_PARTS.items():
        part = build(config[option], kind, option)
        if takes(config.loss, option):
            parts[option] = part
        elif type(part) is not plain:
            raise UserError(
                f"{option} has no effect on this loss, which has its own: choose {option}={plain.__name__.lower()}"
            )
    return build(node, Loss, "loss", **parts)


def scores_of(config: DictConfig, recipe: Recipe, per_class: bool) -> ScoreSet | None:
    """The scores of images, tried on a black image: does each feature space take images of this shape?

    Args:
        config: composed.
        recipe: how the images are made.
        per_class: also score each class by itself.

    Raises:
        UserError: it does not, a score is one of likelihood, or needs classes that the images do not have.
    """
    conditioning = recipe.conditioning
    labelled = conditioning is not None and "labels" in conditioning.kinds
    if per_class and not labelled and metric_nodes(config):
        raise UserError(
            "per_class=true: this network is not conditioned on classes; leave per_class out, or train with"
            " conditioning=class"
        )
    return image_scores(
        config, recipe.codec.image_shape, conditioning.num_classes if per_class and labelled else 0, labelled
    )


def image_scores(
    config: DictConfig, image_shape: Sequence[int], num_classes: int = 0, labelled: bool = False
) -> ScoreSet | None:
    """The scores of images of a shape, with intervals; see `scores_of`.

    Args:
        config: with the metrics.
        image_shape: (C, H, W).
        num_classes: number of classes that are also scored by themselves.
        labelled: whether the images were conditioned on classes.
    """
    nodes = metric_nodes(config)
    if not nodes:
        return None
    scores = []
    for option, node in nodes.items():
        if is_likelihood(node):
            raise UserError(
                f"{option}: bits per dimension are only for src.evaluate run=<run> (metrics=nll or nll_flow), by"
                " themselves; choose a score of images, or metrics=none"
            )
        if is_memorisation(node):
            raise UserError(
                f"{option}: memorisation is only for src.evaluate run=<run>, by itself; choose a score of images, or"
                " metrics=none"
            )
        try:
            score = build(node, FidelityScore, option)
        except UserError as error:  # the features do not know which of several metrics they are of
            raise UserError(str(error).replace("metrics.features.", f"{option}.features.")) from None
        if score.needs_labels and not labelled:
            raise UserError(
                f"{option}: {score.name} is of images conditioned on classes, and this network is not; choose another"
                " score, or train with conditioning=class"
            )
        image = torch.zeros(1, *image_shape, dtype=torch.uint8)
        try:
            score.features(image)
        except ValueError as error:
            raise UserError(f"{option}: {error}") from None
        scores.append(score)
    return ScoreSet(scores, num_classes, intervals=True)


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


def is_memorisation(node: DictConfig) -> bool:
    """Whether a metric's class compares generated images with those of the training."""
    found = class_of(node)
    return found is not None and issubclass(found, Memorisation)
