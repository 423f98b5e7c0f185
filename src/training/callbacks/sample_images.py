"""Previews during training."""

from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL.Image import Image
from torch import Tensor

from src.data.source import ImageSource
from src.diffusion.autoencoder import Autoencoder
from src.errors import UserError
from src.generation.pictures import captioned_grid, image_rows
from src.generation.recipe import Recipe
from src.runs.output import tolerated
from src.training.callbacks.every import EverySteps


class SampleImages(EverySteps):
    """Generates a grid of images every N steps, always from the same noise, with the averaged weights.

    The grid is written to <folder>/step_<k>.png and logged as `samples` to W&B, with the names of the classes as its
    caption, and to TensorBoard. A preview that fails does not end the training (`tolerated`). Of an autoencoder, n
    images of the validation split are shown above their reconstructions.

    Args:
        recipe: the sampling recipe; None for an autoencoder.
        folder: the output folder.
        source: the data, for the names of the classes and the images of an autoencoder.
        every: optimiser steps between two grids.
        n: number of images in a grid; where each column shows one class, the rows are full and the grid may have fewer.
        device_batch: number of images that fit on a device.
        batch_size: images per batch; None for `device_batch`.

    Raises:
        ValueError: an argument is below 1.
    """

    def __init__(
        self,
        recipe: Recipe | None,
        folder: Path,
        source: ImageSource,
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
        self.source = source
        self.columns = None if recipe is None else recipe.columns(n)
        self.n = n - n % (self.columns or 1)
        self.batch_size = batch_size or device_batch

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            with tolerated("preview"):
                self._show(trainer, self._grid(module))

    def _show(self, trainer: Trainer, grid: Image) -> None:
        with tolerated("preview file"):
            self.folder.mkdir(parents=True, exist_ok=True)
            grid.save(self.folder / f"step_{trainer.global_step:08d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                caption = "images above their reconstructions"
                if self.recipe is not None:
                    caption = self.recipe.caption(self.n, self.source.class_names)
                logger.log_image("samples", [grid], step=trainer.global_step, caption=[caption])
            elif isinstance(logger, TensorBoardLogger):
                pixels = np.asarray(grid.convert("RGB"))
                logger.experiment.add_image("samples", pixels, trainer.global_step, dataformats="HWC")

    def _grid(self, module: LightningModule) -> Image:
        images = self._images(module)
        if self.recipe is None:
            return image_rows(*images.chunk(2))
        return captioned_grid(images, self.recipe.texts(range(self.n)), self.columns)

    def _images(self, module: LightningModule) -> Tensor:
        """The images of the grid, uint8; of an autoencoder originals, then as many reconstructions."""
        try:
            with module.averaged() as denoiser:
                if self.recipe is None:
                    return self._reconstructions(denoiser, module)
                made = self.recipe.images(denoiser, range(self.n), self.batch_size)
                return torch.cat([batch.images.cpu() for batch in made])
        except (RuntimeError, MemoryError) as error:
            if not _is_lack_of_memory(error):
                raise
            size = min(self.batch_size, self.n)
            raise UserError(
                f"out of memory with {size} images per batch; lower callbacks.sample_images.batch_size"
            ) from None

    @torch.no_grad()
    def _reconstructions(self, autoencoder: Autoencoder, module: LightningModule) -> Tensor:
        held_out = self.source.split("validation")
        images = held_out if len(held_out) else self.source.split("train")
        originals = images.images(range(min(self.n, len(images))))
        x = module.codec.encode(originals.to(module.device)).to(module.dtype)
        made = [autoencoder.reconstruct(part)[0] for part in x.split(self.batch_size)]
        return torch.cat([originals, module.codec.decode(torch.cat(made)).cpu()])


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether the error means out of memory on an accelerator, in PyTorch's CPU allocator or in Python."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
