"""Terms of the training loss that read hidden activations, and changes of the training images."""

import torch
from omegaconf import DictConfig

from src.app.build import build, class_of, takes
from src.conditioning import GeometricAugmentation
from src.data.codec import Codec
from src.diffusion.loss import ContrastiveLoss, Loss, TimedLoss
from src.errors import UserError
from src.randomness import key
from src.training.coupling import OptimalTransport
from src.training.module import DiffusionModule
from src.training.regularizer import Regularizer
from src.training.resume import part_with_pairs


def augmentation_of(config: DictConfig, loss: Loss, codec: Codec) -> GeometricAugmentation | None:
    """What transforms the training images.

    Args:
        config: composed.
        loss: with the network, which reads how an image was transformed.
        codec: of the images.

    Raises:
        UserError: it does not suit the network, the images, the loss or the coupling.
    """
    augmentation = build(config.augmentation, GeometricAugmentation, "augmentation")
    if augmentation is None:
        return None
    network = loss.denoiser.network
    if "augment" not in network.reads:
        raise UserError(
            f"augmentation: {type(getattr(network, 'module', network)).__name__} does not read how an image was"
            " transformed; choose augmentation=none, or e.g. model=unet_tiny, unet_ddpmpp or dit_tiny"
        )
    if config.data.get("horizontal_flip"):
        raise UserError(
            "data.horizontal_flip=true mirrors images without a note to the network, and augmentation mirrors them with"
            " one; choose data.horizontal_flip=false"
        )
    if not codec.bounded:
        raise UserError("augmentation moves pixels, and this training has latents; choose augmentation=none")
    if getattr(loss, "teacher", None) is not None:
        raise UserError("augmentation has not been tried with a teacher (loss.run); choose augmentation=none")
    if issubclass(class_of(config.coupling) or object, OptimalTransport):
        raise UserError(
            "coupling=optimal_transport makes the noise depend on the augmentation, which it does not in sampling;"
            " choose coupling=independent, or augmentation=none"
        )
    return augmentation


def regularizer_of(config: DictConfig, loss: Loss, codec: Codec) -> Regularizer | None:
    """The chosen term of the loss, tried on one image.

    Args:
        config: composed; `compile` is settled.
        loss: evaluates the network whose activations are read.
        codec: gives the shape of what the network sees.

    Raises:
        UserError: the term does not suit the network, or the loss does not evaluate the network once for a batch.
    """
    if not config.regularizer:
        return None
    if not isinstance(loss, TimedLoss):
        raise UserError(
            f"regularizer: {type(loss).__name__} evaluates the network several times, or for parts of a batch; choose"
            " regularizer=none, or a loss of one time, e.g. loss=denoising"
        )
    if config.compile:
        raise UserError(
            "compile=true: a compiled network has no hidden activations to read; choose compile=false"
        )
    if not codec.bounded and takes(config.regularizer, "weights"):
        raise UserError(
            "regularizer=repa reads pixels, and this training has latents; choose regularizer=none"
        )
    torch.manual_seed(key(config.seed, "regularizer", 0))
    network = loss.denoiser.network
    return build(config.regularizer, Regularizer, "regularizer", network=network, image_shape=codec.shape)


def check_pairs(module: DiffusionModule, micro_batch: int) -> None:
    """Checks that what compares images has pairs of them, and a contrastive loss conditions.

    Raises:
        UserError: there is one image in each micro-batch, or no condition.
    """
    name = part_with_pairs(module)
    if name and micro_batch < 2:
        raise UserError(
            f"{name}: {type(getattr(module, name)).__name__} compares images, and a micro-batch of a device has"
            f" {micro_batch}; choose a larger batch_size or max_device_batch"
        )
    if isinstance(module.loss, ContrastiveLoss) and module.conditioning is None:
        raise UserError(
            "loss=contrastive: it separates images of different conditions, and there are none; choose"
            " conditioning=class, or loss=denoising"
        )
