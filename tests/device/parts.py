"""The parts of a training on a small network, from conf/, as the command line joins them."""

from dataclasses import dataclass

import torch
from hydra import compose, initialize_config_dir

from src.app import jobs
from src.app.conditions import conditioning_of
from src.app.options import CONF
from src.app.parts import codec_of, denoiser_of, loss_of, source_of
from src.app.recipes import recipe_of
from src.app.regularization import augmentation_of, regularizer_of
from src.conditioning import Condition
from src.data.stream import Batch
from src.diffusion.loss import Loss
from src.generation.recipe import Recipe
from src.training.module import DiffusionModule

BATCH = 4
SMALL = (
    "model.base_channels=16",
    "model.channel_multipliers=[1]",
    "model.attention_factors=[1]",
    "conditioning=class",
    "conditioning.dropout=0.5",
)


@dataclass(frozen=True)
class Parts:
    loss: Loss
    recipe: Recipe
    module: DiffusionModule


def choices(group: str) -> list[str]:
    """The names of a group's files."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def parts(*overrides: str) -> Parts:
    """The parts of conf/train.yaml with these overrides, on the CPU."""
    jobs.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [*SMALL, *overrides])
    source = source_of(config)
    codec = codec_of(config, source)
    conditioning = conditioning_of(config, source, codec)
    denoiser = denoiser_of(config, codec, conditioning)
    loss = loss_of(config, denoiser)
    module = DiffusionModule(
        *(loss, torch.optim.Adam, None, None, 0, BATCH, codec, conditioning),
        augmentation=augmentation_of(config, loss, codec),
        regularizer=regularizer_of(config, loss, codec),
    )
    return Parts(loss, recipe_of(config, 0, denoiser, codec, conditioning), module)


def batch_on(device: str) -> Batch:
    """A batch of black digits."""
    images = torch.zeros(BATCH, 1, 8, 8, dtype=torch.uint8)
    return Batch(images, Condition(labels=torch.arange(BATCH)), torch.arange(BATCH)).to(device)
