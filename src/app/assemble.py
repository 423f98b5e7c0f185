"""Joins the parts of a training: configuration -> objects."""

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
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from src.app.automatic import settle
from src.app.bands import bands_of
from src.app.build import build, class_of, resolve
from src.app.conditions import conditioning_of
from src.app.guides import teacher_of
from src.app.initial import initialise
from src.app.lightning import (
    NoProfiler,
    check_callback,
    check_monitors,
    check_sharded,
    check_trainer,
    check_trainer_options,
    joined_arguments,
    skip_idle_work,
)
from src.app.optimizers import optimizer_of
from src.app.options import effect_of
from src.app.parts import (
    codec_of,
    denoiser_of,
    loss_of,
    scores_of,
    source_of,
)
from src.app.recipes import recipe_of
from src.app.regularization import augmentation_of, check_pairs, regularizer_of
from src.app.stored import upgrade
from src.conditioning import Conditioning
from src.data.datamodule import ImageDataModule, per_device_batch
from src.diffusion.autoencoder import Autoencoder
from src.diffusion.denoiser import Denoiser
from src.diffusion.loss import MeanFlowLoss
from src.errors import UserError
from src.generation.recipe import Recipe, describe, warn_of_amplified_errors, warn_of_missing_signal
from src.randomness import key
from src.runs.files import write_atomically
from src.runs.folder import BEST_FILE, CHECKPOINTS, CONFIG_FILE, find_run
from src.runs.machine import keep_freed_memory, skip_driver_search
from src.training.callbacks import SampleImages, TrackFidelity
from src.training.checkpoint import AtomicCheckpointIO, Checkpoints, not_finite
from src.training.coupling import Coupling, OptimalTransport
from src.training.dashboard import CurveFiles, Dashboard, forgiving, needs_package, wandb_settings
from src.training.distributed import launch_by_command_line
from src.training.ema import EMA
from src.training.module import DiffusionModule
from src.training.reading import check_fits, read_checkpoint
from src.training.resume import ResumeCheck
from src.training.signals import StopOnSignal
from src.training.trial import report_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """A training, ready to run. A classifier or autoencoder has no recipe; `init` records the run of its weights."""

    module: DiffusionModule
    data: ImageDataModule
    trainer: Trainer
    recipe: Recipe | None
    checkpoint: Path | None
    summary: str
    init: dict[str, Any] | None = None

    def check_resume(self) -> None:
        """Checks a continued training against its checkpoint; see `ResumeCheck.check` and `check_fits`.

        Raises:
            UserError: it does not fit.
        """
        (check,) = (callback for callback in self.trainer.callbacks if isinstance(callback, ResumeCheck))
        check.check(self.trainer, self.module, self.data)
        if self.checkpoint is not None:
            check_fits(read_checkpoint(self.checkpoint), self.trainer, self.module)

    @property
    def tracker(self) -> TrackFidelity | None:
        """The callback that scores, if there is one."""
        return next((c for c in self.trainer.callbacks if isinstance(c, TrackFidelity)), None)

    def scores(self) -> dict[str, float]:
        """The latest scores and validation losses by name, the monitored score first."""
        losses = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        latest = self.tracker.latest if self.tracker else None
        return {**(latest.scores if latest else {}), **losses}

    def publish(self, folder: Path) -> None:
        """Adds the protocol, the table of scores and, online, the report of the run to the dashboard."""
        latest = self.tracker.latest if self.tracker else None
        for logger in self.trainer.loggers:
            if isinstance(logger, Dashboard) and latest is not None:
                logger.publish(latest, folder)


def assemble(config: DictConfig, folder: Path) -> Experiment:
    """The objects of a training. Everything is checked here, before any image is read.

    Args:
        config: conf/train.yaml, composed; its single options are checked.
        folder: the run's folder.

    Raises:
        UserError: a choice that is impossible or does not fit another.
    """
    check_names_and_folders(config)
    check_trainer_options(config)
    automatic = settle(config)
    source = source_of(config)
    source.check()
    codec = codec_of(config, source)
    for name, value in codec.pinned().items():
        config.codec[name] = value  # stored with the run
    conditioning = conditioning_of(config, source, codec)
    torch.manual_seed(key(config.seed, "initial weights", 0))
    denoiser = denoiser_of(config, codec, conditioning)
    init = initialise(denoiser.network, config) if config.init and not config.ckpt else None
    loss = loss_of(config, denoiser, teacher_of(config.loss, denoiser, codec, conditioning))
    ema = build(config.ema, EMA, "ema")
    optimizer, lr_schedule = optimizer_of(config)
    module = DiffusionModule(
        loss,
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        ema=ema,
        seed=config.seed,
        batch_size=config.batch_size,
        codec=codec,
        conditioning=conditioning,
        coupling=coupling_of(config, conditioning),
        augmentation=augmentation_of(config, loss, codec),
        regularizer=regularizer_of(config, loss, codec),
    )
    recipe = None
    if denoiser.makes_images:
        recipe = recipe_of(config, config.generation.seed, denoiser, codec, conditioning)
        warn_of_amplified_errors(denoiser, recipe)
        warn_of_missing_signal(denoiser, recipe)
    checkpoint = checkpoint_of(config)
    callbacks = callbacks_of(config, folder, source, recipe, denoiser, ema)
    bands = bands_of(config, folder)
    callbacks += [] if bands is None else [bands]
    # after all others: they save and exit once the others have finished their step
    resume = ResumeCheck(
        resolve(config, "config"),
        checkpoint,
        config.allow_changes,
        effects=effect_of,
        upgrade=upgrade,
        packages=("src", *config.trust),
        assembly=tuple(
            f"src.app.{name}"
            for name in (
                "assemble",
                "parts",
                "conditions",
                "recipes",
                "guides",
                "optimizers",
                "initial",
                "regularization",
            )
        ),
    )
    trainer = trainer_of(config, folder, [*callbacks, resume, StopOnSignal()])
    check_sharded(trainer, module, config.compile)
    accumulation = accumulation_of(config, trainer.world_size)
    trainer.accumulate_grad_batches = accumulation
    check_pairs(module, config.batch_size // (trainer.world_size * accumulation))
    # validate_every counts optimiser steps, Lightning counts batches
    trainer.val_check_interval = config.validate_every * accumulation
    data = ImageDataModule(source, config.batch_size, config.seed, config.workers, accumulation, codec)
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
        skip_driver_search()
    if config.compile:
        if isinstance(loss, MeanFlowLoss):
            raise UserError(
                "compile=true: a compiled network has no forward-mode derivative, which this loss takes; choose"
                " compile=false, or loss=shortcut"
            )
        denoiser.network.compile()  # in place: the checkpoint's names stay as they are
    summary = "\n".join([summary_of(config, denoiser, trainer, accumulation), *automatic])
    tracker = next((c for c in callbacks if isinstance(c, TrackFidelity)), None)
    if tracker is not None:
        summary += f"\nscore       {tracker.cost(config.trainer.max_steps)}"
    if module.regularizer is not None:
        summary += f"\nregularizer {module.regularizer.describe()}"
    if init is not None:
        summary += (
            f"\ninit        {init['checkpoint']}, step {init['training_steps']:,}, {init['weights']} weights"
        )
    if bands is not None:
        summary += f"\nband        {bands.summary}"
    return Experiment(module, data, trainer, recipe, checkpoint, summary, init)


def coupling_of(config: DictConfig, conditioning: Conditioning | None) -> Coupling | None:
    """What reorders the noise of a batch.

    Raises:
        UserError: it would make the noise depend on the condition, or needs classes that there are not.
    """
    coupling = build(config.coupling, Coupling, "coupling")
    if isinstance(coupling, OptimalTransport):
        kinds = conditioning.kinds if conditioning else frozenset()
        if coupling.per_class and kinds != {"labels"}:
            raise UserError(
                "coupling.per_class=true needs a network that is conditioned on classes alone; choose"
                " conditioning=class, or coupling=optimal_transport"
            )
        if kinds and not coupling.per_class:
            raise UserError(
                "coupling=optimal_transport makes the noise depend on the condition, which it does not in sampling;"
                " choose coupling=optimal_transport_per_class with conditioning=class, or coupling=independent"
            )
    return coupling


def check_names_and_folders(config: DictConfig) -> None:
    """Refuses folders that would store a secret, and a name that is a path.

    Raises:
        UserError: one of them.
    """
    for option in ("cache", "runs"):
        if "${oc.env:" in config[option]:
            raise UserError(
                f"{option}={config[option]}: a folder cannot be read from an environment variable, which may be secret;"
                " let the shell fill it in ($NAME), or name the variable DIFFUSION_LAB_..."
            )
    if config.name and (set(config.name) & set("/\\\0") or config.name.startswith(".")):
        raise UserError(f"name={config.name!r}: give a name, not a path: no slashes, no dot in front")


def checkpoint_of(config: DictConfig) -> Path | None:
    """The checkpoint from which the training continues, if it does.

    Raises:
        UserError: there is none, it is no checkpoint, or nothing is left to train.
    """
    if not config.ckpt:
        return None
    checkpoint = find_run(config.ckpt, option="ckpt").checkpoint
    content = read_checkpoint(checkpoint)
    step = content["global_step"]
    if step >= config.trainer.max_steps:
        raise UserError(
            f"trainer.max_steps={config.trainer.max_steps}: {checkpoint} is at step {step} already; choose more"
        )
    started_from = content["config"].get("init")
    if config.init not in (None, started_from):
        raise UserError(
            f"init={config.init}: ckpt continues a run, and this one started from {started_from or 'nothing'};"
            " leave init out, or leave ckpt out to start a new run"
        )
    if broken := not_finite(content):
        raise UserError(f"ckpt={checkpoint}: {broken} is not finite; choose another checkpoint")
    return checkpoint


def callbacks_of(
    config: DictConfig, folder: Path, source: Any, recipe: Recipe | None, denoiser: Denoiser, ema: EMA | None
) -> list[Callback]:
    """The callbacks in the order in which they act: the average first, since the others use it up to date.

    Without a recipe there are no scores, and no previews but the reconstructions of an autoencoder.
    """
    scores = scores_of(config, recipe, config.per_class) if recipe else None

    def record(step: int, evaluations: int) -> dict[str, Any]:
        weights = ema.name if ema else "raw"
        return {
            "training_steps": step,
            "weights": weights,
            "ema_decay": ema.decay if weights == "ema" else None,
            **recipe.record(denoiser.variance, evaluations),
        }

    # a bound that training keeps, sampling keeps too
    fits = {"device_batch": limit_of(config) or 256}
    joined: dict[str, dict[str, Any]] = {
        "sample_images": {"recipe": recipe, "folder": folder / "samples", "source": source, **fits},
        "checkpoints": {"folder": folder / CHECKPOINTS, "config": resolve(config, "config")},
        "track_fidelity": {
            "scores": scores,
            "recipe": recipe,
            "source": source,
            "cache": config.cache,
            "best": folder / CHECKPOINTS / BEST_FILE,
            "record": record,
            **fits,
        },
    }
    kinds = {"sample_images": SampleImages, "checkpoints": Checkpoints, "track_fidelity": TrackFidelity}
    callbacks: list[Callback] = [] if ema is None else [ema]
    added: dict[str, Callback] = {}
    for name, node in (config.callbacks or {}).items():
        chosen = "_target_" in node  # a debug preset may set numbers of a callback that was not chosen
        if not chosen or (name == "track_fidelity" and scores is None):
            continue
        if name == "sample_images" and recipe is None and not isinstance(denoiser, Autoencoder):
            continue
        option = f"callbacks.{name}"
        given = joined.get(name) or joined_arguments(node, class_of(node), folder / CHECKPOINTS)
        added[option] = build(node, kinds.get(name, Callback), option, **given)
        check_callback(added[option], option)
    check_monitors(added, ["val/loss"] if ema is None else ["val/loss", "val/loss_ema"])
    report = report_of(folder)  # after the scores
    return [*callbacks, *added.values(), *([] if report is None else [report])]


def trainer_of(config: DictConfig, folder: Path, callbacks: list[Callback]) -> Trainer:
    """Lightning's Trainer for an endless stream: steps are counted, epochs are not."""
    silence_lightning()
    launch_by_command_line()
    profiler = {} if "profiler" in config.trainer else {"profiler": NoProfiler()}
    make = partial(
        build,
        config.trainer,
        Trainer,
        "trainer",
        logger=loggers_of(config, folder),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), *([] if has_several_processes(config) else [LightningEnvironment()])],
        default_root_dir=str(folder),
        use_distributed_sampler=False,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        max_epochs=-1,
        enable_progress_bar="progress" in (config.callbacks or {}),
        enable_model_summary=False,
        # StopOnSignal is one too; True without any would add Lightning's
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        **profiler,
    )
    try:
        trainer = make()
    except (MisconfigurationException, TypeError, ModuleNotFoundError) as error:
        raise UserError(f"trainer: {str(error).splitlines()[0]}") from None
    check_trainer(trainer, config)
    skip_idle_work(trainer)
    return trainer


def has_several_processes(config: DictConfig) -> bool:
    """Whether a training may have several processes; one of a single process ignores SLURM's ranks."""
    return (config.trainer.devices, config.trainer.num_nodes) != (1, 1)


def loggers_of(config: DictConfig, folder: Path) -> list[Logger]:
    """CSV always, and the chosen ones."""
    loggers: list[Logger] = [CurveFiles(folder)]
    for name, node in (config.logger or {}).items():
        joined = {}
        if name == "wandb":
            with needs_package("logger=wandb"):
                joined = wandb_settings(folder, config.name)
            node = OmegaConf.merge(node, {"tags": [*(node.get("tags") or []), *joined.pop("tags")]})
        joined = {key: value for key, value in joined.items() if key not in node or key == "settings"}
        with needs_package(f"logger.{name}"):
            logger = build(node, Logger, f"logger.{name}", save_dir=str(folder), **joined)
        loggers.append(logger if name == "wandb" else forgiving(logger, name))
    return loggers


def limit_of(config: DictConfig) -> int | None:
    """The largest batch of a device; None if there is no limit, or it is not known yet (see `app.device_batch`)."""
    return None if config.max_device_batch == "auto" else config.max_device_batch


def accumulation_of(config: DictConfig, world_size: int) -> int:
    """The smallest number of micro-batches that keeps to max_device_batch."""
    try:
        largest = per_device_batch(config.batch_size, world_size, 1)
        limit = limit_of(config) or largest
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
    process = f"{describe(denoiser.parameterization)} on {type(denoiser.schedule).__name__}"
    if isinstance(denoiser, Autoencoder):
        process = f"latents of {' x '.join(map(str, denoiser.network.latent_shape))}"
    hardware = f"{trainer.accelerator.__class__.__name__}, {trainer.precision}"
    return (
        f"network     {type(denoiser.network).__name__}, {parameters:,} parameters\n"
        f"process     {process}\n"
        f"batch       {config.batch_size} = {devices} devices x {accumulation} micro-batches x {per_device}\n"
        f"training    {config.trainer.max_steps:,} steps on {hardware}"
    )


def write_config(config: DictConfig, folder: Path) -> None:
    """Keeps the composed configuration, interpolations resolved, as <folder>/config.yaml."""
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
