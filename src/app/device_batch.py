"""`max_device_batch=auto`: replaced by a number before a training is assembled."""

import logging
import os
from pathlib import Path

from omegaconf import DictConfig

from src.app.assemble import assemble
from src.errors import UserError
from src.runs.output import silent
from src.training.device_batch import fitting_batch
from src.training.reading import read_checkpoint
from src.training.sharded import NAME as SHARDED

log = logging.getLogger(__name__)

# Names the number that the first process has chosen, for the other ranks.
CHOSEN = "DIFFUSION_LAB_DEVICE_BATCH"


def with_fitting_batch(config: DictConfig, folder: Path) -> DictConfig:
    """The configuration with a number in place of `max_device_batch=auto`, which is logged.

    A training that is continued keeps its number, since others round differently. Further ranks take that of the first
    process, which starts them.

    Args:
        config: conf/train.yaml, composed.
        folder: the run's folder.

    Raises:
        UserError: not even one image fits; there are several machines, which might choose differently; or the network
            is divided among the devices, which the trial does not do.
    """
    if config.max_device_batch != "auto":
        return config
    if config.trainer.get("strategy") == SHARDED:
        raise UserError("max_device_batch=auto: trainer=fsdp divides the network; give a number")
    if config.trainer.num_nodes != 1:
        raise UserError("max_device_batch=auto: several machines need the same number; give it")
    fixed = config.copy()
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        if CHOSEN not in os.environ:
            raise UserError("max_device_batch=auto: the processes were started from outside; give a number")
        fixed.max_device_batch = int(os.environ[CHOSEN])
        return fixed
    if config.ckpt and isinstance(before := _stored(config), int):
        fixed.max_device_batch = before
        log.info("memory      max_device_batch=%d, as before", before)
    else:
        trial = config.copy()
        trial.compile, trial.logger, trial.callbacks, trial.metrics = False, {}, {}, {}
        trial.init = None  # the memory does not depend on the weights
        with silent():  # the training is assembled again, with all its messages
            experiment = assemble(trial, folder)
        size = fitting_batch(experiment.module, experiment.trainer, experiment.data.source)
        fixed.max_device_batch = size
        whole = config.batch_size // experiment.trainer.world_size
        parts = f"{whole // size} micro-batches of {size}" if size < whole else f"all {whole} images at once"
        log.info("memory      max_device_batch=auto: %s on each device", parts)
    os.environ[CHOSEN] = str(fixed.max_device_batch)
    return fixed


def _stored(config: DictConfig) -> object:
    return read_checkpoint(Path(config.ckpt))["config"].get("max_device_batch")
