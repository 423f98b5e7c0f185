"""Previews during training."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from src.data.transforms import to_uint8
from src.generation.pictures import image_grid
from src.generation.recipe import Generation
from src.runs.files import forgiving
from src.training.callbacks.every import EverySteps


class SampleImages(EverySteps):
    """Every N steps a grid of images from always the same noise, with the averaged weights.

    Written to <folder>/step_<k>.png and shown by the loggers that can show pictures, as `samples`.

    Args:
        generation: how the images are made.
        folder: where the grids go.
        every: optimiser steps between two grids.
        n: number of images of a grid.
    """

    def __init__(self, generation: Generation, folder: Path, every: int = 1000, n: int = 64):
        super().__init__(every)
        if n < 1:
            raise ValueError(f"n must be at least 1 image, got {n}")
        self.generation = generation
        self.folder = Path(folder)
        self.n = n

    @rank_zero_only
    def act(self, trainer: Trainer, module: LightningModule) -> None:
        with module.averaged() as denoiser:
            for state in self.generation.trajectory(denoiser, range(self.n)):
                last = state
        grid = image_grid(to_uint8(last.x).cpu())
        with forgiving("preview"):
            self.folder.mkdir(parents=True, exist_ok=True)
            grid.save(self.folder / f"step_{trainer.global_step:08d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [grid], step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                import numpy as np

                logger.experiment.add_image(
                    "samples", np.asarray(grid.convert("RGB")), trainer.global_step, dataformats="HWC"
                )
