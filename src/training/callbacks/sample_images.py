"""Previews during training."""

import logging
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from src.generation.pictures import image_grid
from src.generation.recipe import Recipe
from src.runs.files import forgiving
from src.training.callbacks.every import EverySteps

log = logging.getLogger(__name__)


class SampleImages(EverySteps):
    """Every N steps a grid of images, always from the same noise, with the averaged weights.

    Written to <folder>/step_<k>.png and, as `samples`, to the loggers that can show pictures. A preview that runs out
    of memory is left out, with one warning; the training continues.

    Args:
        recipe: how the images are made.
        folder: where the grids are written.
        every: optimiser steps between two grids.
        n: number of images of a grid.
        device_batch: images that fit on a device at once.
        batch_size: images made at once; None for `device_batch`.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        device_batch: int = 256,
        every: int = 1000,
        n: int = 64,
        batch_size: int | None = None,
    ):
        super().__init__(every)
        for name, number in (("n", n), ("batch_size", batch_size)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1 image, got {number}")
        self.recipe = recipe
        self.folder = Path(folder)
        self.n = n
        self.batch_size = batch_size or device_batch
        self._warned = False

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        try:
            images = self._images(module)
        except (RuntimeError, MemoryError) as error:
            if not _is_lack_of_memory(error):
                raise
            if not self._warned:
                self._warned = True
                log.warning(
                    "preview: no memory for %d images at once; training continues without. Set "
                    "callbacks.sample_images.batch_size to fewer",
                    min(self.batch_size, self.n),
                )
            return
        grid = image_grid(images)
        with forgiving("preview"):
            self.folder.mkdir(parents=True, exist_ok=True)
            grid.save(self.folder / f"step_{trainer.global_step:08d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [grid], step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                pixels = np.asarray(grid.convert("RGB"))
                logger.experiment.add_image("samples", pixels, trainer.global_step, dataformats="HWC")

    def _images(self, module: LightningModule) -> Tensor:
        with module.averaged() as denoiser:
            made = self.recipe.images(denoiser, range(self.n), self.batch_size)
            return torch.cat([batch.images.cpu() for batch in made])


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether an accelerator, PyTorch's allocator on the CPU or Python has run out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
