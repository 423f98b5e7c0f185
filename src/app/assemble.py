"""Joins the parts: configuration -> objects, run folder -> denoiser.

Hydra picks the leaves; the arrows between them are the plain lines of `denoiser_of` and `assemble`.
"""

import logging
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from src.app.build import build, check_scalars, check_value, resolve
from src.data.datamodule import ImageDataModule, per_device_batch
from src.data.source import ImageSource
from src.diffusion.denoiser import Denoiser, WrappedDenoiser
from src.diffusion.distance import Distance
from src.diffusion.loss import DenoisingLoss
from src.diffusion.parameterization import Parameterization
from src.diffusion.sampler import Sampler
from src.diffusion.schedule import Schedule
from src.diffusion.spacing import Spacing
from src.diffusion.time_sampling import TimeSampling
from src.diffusion.variance import Variance
from src.diffusion.weighting import Weighting
from src.errors import UserError
from src.evaluation.record import Recipe
from src.generation.recipe import Generation, describe, warn_of_amplified_errors, warn_of_missing_signal
from src.metrics.fidelity import FidelityScore, Reference, shares
from src.randomness import key
from src.runs.files import write_atomically
from src.runs.folder import BEST_FILE, CHECKPOINTS, CONFIG_FILE, find_run
from src.runs.machine import keep_freed_memory
from src.training.callbacks import SampleImages, TrackFidelity
from src.training.checkpoint import AtomicCheckpointIO, Checkpoints, read_checkpoint
from src.training.dashboard import CurveFiles, wandb_settings
from src.training.distributed import launch_by_command_line
from src.training.ema import EMA
from src.training.module import DiffusionModule
from src.training.resume import ResumeCheck
from src.training.signals import StopOnSignal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """A training, ready to run."""

    module: DiffusionModule
    data: ImageDataModule
    trainer: Trainer
    score: FidelityScore | None
    generation: Generation
    checkpoint: Path | None
    summary: str

    def check_resume(self) -> None:
        """Holds a continued training against its checkpoint; see `ResumeCheck.check`."""
        (check,) = (callback for callback in self.trainer.callbacks if isinstance(callback, ResumeCheck))
        check.check(self.trainer, self.module, self.data)

    def scores(self) -> dict[str, float]:
        """The latest scores and validation losses by name, the score to be monitored first."""
        tracked = [
            callback.latest for callback in self.trainer.callbacks if isinstance(callback, TrackFidelity)
        ]
        losses = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        return {name: value for scores in [*tracked, losses] for name, value in scores.items()}


def assemble(config: DictConfig, folder: Path) -> Experiment:
    """The objects of a training.

    Everything is checked here, before any image is read.

    Args:
        config: conf/train.yaml, composed.
        folder: the run's folder.

    Raises:
        UserError: a choice that is impossible or does not fit another.
    """
    check_scalars(config, TRAINING_SCALARS)
    for option in ("cache", "runs"):
        if "${oc.env:" in config[option]:
            raise UserError(
                f"{option}={config[option]}: folders do not take variables as possible secrets; let the shell fill it "
                "in ($NAME), or call the variable DIFFUSION_LAB_..."
            )
    if config.name and (set(config.name) & set("/\\\0") or config.name.startswith(".")):
        raise UserError(f"name={config.name!r}: a name, not a path: no slashes, no dot in front")
    source = source_of(config)
    torch.manual_seed(key(config.seed, "initial weights", 0))
    denoiser = denoiser_of(config, source)
    loss = loss_of(config, denoiser)
    ema = build(config.ema, EMA, "ema")
    optimizer, lr_schedule = optimizer_of(config)
    module = DiffusionModule(
        loss,
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        ema=ema,
        seed=config.seed,
        batch_size=config.batch_size,
        conditional=config.class_conditional,
    )
    generation = generation_of(config, config.generation.seed, denoiser)
    warn_of_amplified_errors(denoiser, generation)
    warn_of_missing_signal(denoiser, generation)
    score = fidelity_of(config)
    checkpoint = checkpoint_of(config)
    callbacks = callbacks_of(config, folder, source, generation, denoiser.variance, score, checkpoint, ema)
    trainer = trainer_of(config, folder, callbacks)
    accumulation = accumulation_of(config, trainer.world_size)
    trainer.accumulate_grad_batches = accumulation
    # validate_every counts optimiser steps, Lightning counts batches
    trainer.val_check_interval = config.validate_every * accumulation
    data = ImageDataModule(source, config.batch_size, config.seed, config.workers, accumulation)
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    if config.compile:
        denoiser.network.compile()  # in place: the checkpoint's names stay as they are
    summary = summary_of(config, denoiser, trainer, accumulation)
    return Experiment(module, data, trainer, score, generation, checkpoint, summary)


def checkpoint_of(config: DictConfig) -> Path | None:
    """The checkpoint from which the training goes on, if it does.

    Raises:
        UserError: there is none, it is no checkpoint, or nothing is left to train.
    """
    if not config.ckpt:
        return None
    checkpoint = find_run(config.ckpt, option="ckpt").checkpoint
    step = read_checkpoint(checkpoint)["global_step"]
    if step >= config.trainer.max_steps:
        raise UserError(
            f"trainer.max_steps={config.trainer.max_steps}: {checkpoint} is at step {step} already; choose more"
        )
    return checkpoint


def optimizer_of(config: DictConfig) -> tuple[Any, Any]:
    """What makes the optimiser and its learning-rate schedule, both tried out on one parameter."""
    optimizer = build(config.optimizer, Optimizer, "optimizer")
    lr_schedule = build(config.lr_schedule, LRScheduler, "lr_schedule")
    option = "optimizer"
    try:
        tried = optimizer([nn.Parameter(torch.zeros(1))])
        option = "lr_schedule"
        if lr_schedule is not None:
            lr_schedule(tried)
    except (ValueError, TypeError) as error:
        raise UserError(f"{option}: {str(error).splitlines()[0]}") from None
    return optimizer, lr_schedule


TRAINING_SCALARS = {
    "seed": NonNegativeInt,
    "batch_size": PositiveInt,
    "max_device_batch": PositiveInt | None,
    "workers": NonNegativeInt,
    "class_conditional": bool,
    "compile": bool,
    "validate_every": PositiveInt,
    "ckpt": str | None,
    "allow_changes": bool,
    "trainer.max_steps": PositiveInt,
    "trainer.gradient_clip_val": PositiveFloat | None,
    "name": str | None,
}


def source_of(config: DictConfig) -> ImageSource:
    """The data set, found on disk but not read."""
    source = build(config.data, ImageSource, "data")
    if config.class_conditional and source.num_classes == 0:
        raise UserError("class_conditional=true: these data have no labels; choose class_conditional=false")
    source.check()
    return source


def denoiser_of(config: DictConfig, source: ImageSource | None = None) -> Denoiser:
    """The network with its schedule and the meaning of its output, freshly initialised."""
    schedule = build(config.schedule, Schedule, "schedule")
    parameterization = build(config.parameterization, Parameterization, "parameterization")
    variance = build(config.variance, Variance, "variance")
    num_classes = config.data.num_classes if config.class_conditional else 0
    if variance.outputs > 1 and "out_channels" not in config.model:
        OmegaConf.update(
            config.model, "out_channels", config.data.channels * variance.outputs, force_add=True
        )
    network = build(config.model, nn.Module, "model", num_classes=num_classes)
    for what in ("channels", "image_size"):
        given, needed = getattr(network, what), config.data[what]
        if given != needed:
            raise UserError(
                f"model.{what}={given}: the images have {needed}; leave model.{what} out, it follows the data"
            )
    try:
        return Denoiser(network, schedule, parameterization, variance)
    except ValueError as error:
        raise UserError(str(error)) from None


def loss_of(config: DictConfig, denoiser: Denoiser) -> DenoisingLoss:
    """What is minimised."""
    return build(
        config.loss,
        DenoisingLoss,
        "loss",
        denoiser=denoiser,
        weighting=build(config.weighting, Weighting, "weighting"),
        time_sampling=build(config.time_sampling, TimeSampling, "time_sampling"),
        distance=build(config.distance, Distance, "distance"),
    )


def generation_of(config: DictConfig, seed: int, denoiser: Denoiser) -> Generation:
    """The recipe by which images are made; its times and its clipping are tried on the denoiser at once."""
    numbers = resolve(config.sampler, "sampler")
    # the number of steps is the spacing's affair, but it is at the sampler that everyone looks for it
    steps = numbers.pop("steps")
    check_value(int, steps, "sampler.steps")
    generation = Generation(
        sampler=build(OmegaConf.create(numbers), Sampler, "sampler"),
        spacing=build(config.spacing, Spacing, "spacing"),
        steps=steps,
        clipping=build(config.clipping, WrappedDenoiser, "clipping"),
        image_shape=(config.data.channels, config.data.image_size, config.data.image_size),
        num_classes=config.data.num_classes if config.class_conditional else 0,
        seed=seed,
    )
    option = "sampler"
    try:
        generation.times(denoiser.schedule)
        option = "clipping"
        generation.around(denoiser)
    except ValueError as error:
        raise UserError(f"{option}.{error}") from None
    return generation


def fidelity_of(config: DictConfig) -> FidelityScore | None:
    """The score, tried on a black image: does its feature space take images of this shape?"""
    if config.metrics and str(config.metrics.get("_target_")).startswith("src.evaluation.likelihood."):
        raise UserError(
            "metrics: bits per dimension are for src.evaluate (metrics=nll or nll_flow), not for training; choose a"
            " score of images, or metrics=none"
        )
    score = build(config.metrics, FidelityScore, "metrics")
    if score is not None:
        image = torch.zeros(
            1, config.data.channels, config.data.image_size, config.data.image_size, dtype=torch.uint8
        )
        try:
            score.features(image)
        except ValueError as error:
            raise UserError(f"metrics: {error}") from None
    return score


def callbacks_of(
    config: DictConfig,
    folder: Path,
    source: ImageSource,
    generation: Generation,
    variance: Variance,
    score: FidelityScore | None,
    checkpoint: Path | None,
    ema: EMA | None,
) -> list[Callback]:
    """The callbacks in the order in which they act: the average first, for the others see it up to date."""
    stored = resolve(config, "config")
    joined: dict[str, dict[str, Any]] = {
        "sample_images": {"generation": generation, "folder": folder / "samples"},
        "checkpoints": {"folder": folder / CHECKPOINTS, "config": stored},
        "track_fidelity": {
            "score": score,
            "generation": generation,
            "set_reference": partial(set_reference, source=source, cache=config.cache),
            "best": folder / CHECKPOINTS / BEST_FILE,
            "recipe": partial(
                recipe,
                generation,
                variance,
                weights=ema.name if ema else "raw",
                ema_decay=ema.decay if ema else None,
            ),
        },
    }
    kinds = {"sample_images": SampleImages, "checkpoints": Checkpoints, "track_fidelity": TrackFidelity}
    callbacks: list[Callback] = [] if ema is None else [ema]
    for name, node in (config.callbacks or {}).items():
        chosen = "_target_" in node  # a debug preset may set numbers of a callback that was not chosen
        if not chosen or (name == "track_fidelity" and score is None):
            continue
        option = f"callbacks.{name}"
        callbacks.append(build(node, kinds.get(name, Callback), option, **joined.get(name, {})))
    # after all others: they save and leave what the others have brought to its end
    return [*callbacks, ResumeCheck(stored, checkpoint, config.allow_changes), StopOnSignal()]


def trainer_of(config: DictConfig, folder: Path, callbacks: list[Callback]) -> Trainer:
    """Lightning's Trainer for an endless stream: steps are counted, epochs are not."""
    silence_lightning()
    launch_by_command_line()
    make = partial(
        build,
        config.trainer,
        Trainer,
        "trainer",
        logger=loggers_of(config, folder),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(folder),
        use_distributed_sampler=False,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        max_epochs=-1,
        enable_progress_bar="progress" in (config.callbacks or {}),
        enable_model_summary=False,
        # StopOnSignal is one too; True without any would add Lightning's
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
    )
    try:
        return make()
    except (MisconfigurationException, TypeError) as error:
        raise UserError(f"trainer: {str(error).splitlines()[0]}") from None


def loggers_of(config: DictConfig, folder: Path) -> list[Logger]:
    """CSV always, and the chosen ones."""
    loggers: list[Logger] = [CurveFiles(folder)]
    for name, node in (config.logger or {}).items():
        joined = wandb_settings(folder, config.name) if name == "wandb" else {}
        loggers.append(build(node, Logger, f"logger.{name}", save_dir=str(folder), **joined))
    return loggers


def accumulation_of(config: DictConfig, world_size: int) -> int:
    """The fewest micro-batches by which max_device_batch is kept."""
    try:
        largest = per_device_batch(config.batch_size, world_size, 1)
        limit = config.max_device_batch or largest
        for accumulation in range(1, largest + 1):
            if largest % accumulation == 0 and largest // accumulation <= limit:
                return accumulation
    except ValueError as error:
        raise UserError(str(error)) from None
    raise UserError(f"max_device_batch={config.max_device_batch} must be at least 1")


def summary_of(config: DictConfig, denoiser: Denoiser, trainer: Trainer, accumulation: int) -> str:
    """What is about to be trained, in a few lines."""
    parameters = sum(p.numel() for p in denoiser.network.parameters())
    devices = trainer.world_size
    per_device = config.batch_size // (devices * accumulation)
    hardware = f"{trainer.accelerator.__class__.__name__}, {trainer.precision}"
    return (
        f"network     {type(denoiser.network).__name__}, {parameters:,} parameters\n"
        f"process     {describe(denoiser.parameterization)} on {type(denoiser.schedule).__name__}\n"
        f"batch       {config.batch_size} = {devices} devices x {accumulation} micro-batches x {per_device}\n"
        f"training    {config.trainer.max_steps:,} steps on {hardware}"
    )


def set_reference(score: FidelityScore, rank: int, world_size: int, source: ImageSource, cache: str) -> None:
    """Gives a score its reference set: the split that it asks for, shared out over the ranks."""
    split = score.reference_split
    images = source.split(split)
    reference = Reference(source.name, split, len(images), source.fingerprint(split))
    score.set_reference(shares(images, 512, rank, world_size), reference, cache)


def recipe(
    generation: Generation, variance: Variance, step: int, weights: str, ema_decay: float | None
) -> Recipe:
    """How images were made, in words and numbers."""
    return Recipe(
        training_steps=step,
        weights=weights,
        ema_decay=ema_decay if weights == "ema" else None,
        sampler=describe(generation.sampler),
        spacing=describe(generation.spacing),
        variance=describe(variance),
        guidance="none",
        clipping=describe(generation.clipping),
        labels=f"image i has label i mod {generation.num_classes}" if generation.num_classes else "none",
        steps=generation.steps,
        network_evaluations=generation.network_evaluations,
        seed=generation.seed,
    )


def write_config(config: DictConfig, folder: Path) -> None:
    """Keeps the composed configuration, interpolations filled in, as <folder>/config.yaml."""
    text = OmegaConf.to_yaml(OmegaConf.create(resolve(config, "config")))
    write_atomically(folder / CONFIG_FILE, text.encode())


def silence_lightning() -> None:
    """Drops hints that do not apply to a stream without epochs, or that only advertise."""
    for message in (
        ".*does not have many workers.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*ended before the epoch ended and your dataloader is not resumable.*",
        ".*`max_epochs` was not set.*",
        ".*Checkpoint directory .* exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
