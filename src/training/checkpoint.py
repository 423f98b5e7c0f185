"""Checkpoints: written so that a killed process never harms a good one, and found again by step."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from src.run_folder import checkpoints_by_step


class AtomicCheckpointIO(TorchCheckpointIO):
    """Streams to a file beside the target, flushes it to the disk and renames it.

    Lightning's own way goes through a copy in memory and one in $TMPDIR; where that is another filesystem,
    a kill during the move leaves the good checkpoint truncated.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)


class Checkpoints(Checkpoint):
    """Saves every `every` optimiser steps and at the end of training; keeps the newest `keep` files.

    Args:
        folder: where to write step_<k>.ckpt.
        every: optimiser steps between two checkpoints.
        keep: how many to keep, at least 1 (2 survive a bad disk block).
        config: the composed configuration, primitives only, stored in each file so that it explains itself.

    Raises:
        ValueError: every or keep below 1.
    """

    def __init__(self, folder: Path, config: dict[str, Any], every: int = 1000, keep: int = 2):
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        if keep < 1:
            raise ValueError(f"keep must be at least 1 file, got {keep}")
        self.folder = Path(folder)
        self.config = config
        self.every = every
        self.keep = keep
        self._saved = -1

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == self._saved:
            return
        trainer.save_checkpoint(self.folder / f"step_{step:08d}.ckpt", weights_only=False)
        self._saved = step
        if trainer.is_global_zero:
            for old in checkpoints_by_step(self.folder)[: -self.keep]:
                old.unlink()
