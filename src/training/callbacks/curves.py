"""Training curves, accumulated on the device and logged every N steps.

Calling `self.log` at every step would double Lightning's overhead; this keeps references to two tensors per step.
"""

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from src.training.callbacks.every import EverySteps
from src.training.callbacks.levels import LossesByLevel

# Quarters of the schedule's range, as in the curves of improved DDPM; quarter 0 has the least noise.
QUARTERS = 4


class TrainingCurves(EverySteps):
    """Logs the training and validation curves.

    - means over the last `every` steps and all devices: `train/loss`, `train/loss_q0` ... `train/loss_q3` (quarters of
      the time range), `train/images_per_second`;
    - values at the last step: `train/gradient_norm` (before clipping), `train/learning_rate`, `train/samples`,
      `train/passes` (samples divided by the size of the training set);
    - with a regulariser, its term in the last micro-batch of the first device: `train/regularizer`;
    - after each validation: `val/loss` (raw weights) and `val/loss_ema`.

    Args:
        every: optimiser steps between two points of the curves.
    """

    def __init__(self, every: int = 50):
        super().__init__(every)
        self._restart(0, torch.device("cpu"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._restart(trainer.global_step, pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.add(outputs["losses"], outputs["times"])
        self._term: Tensor | None = outputs.get("regularizer")
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        losses = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        for logger in trainer.loggers:
            logger.log_metrics(losses, step=trainer.global_step)

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        sums, counts = (trainer.strategy.reduce(each, reduce_op="sum") for each in self.losses.read())
        seconds = time.perf_counter() - self._since
        data = trainer.datamodule
        curves = {
            "train/loss": (sums.sum() / counts.sum()).item(),
            "train/gradient_norm": float(module.gradient_norm),
            "train/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train/images_per_second": (trainer.global_step - self._since_step) * data.batch_size / seconds,
            "train/samples": data.samples,
            "train/passes": data.samples / len(data.source.split("train")),
        }
        for quarter, (total, count) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True)):
            if count:
                curves[f"train/loss_q{quarter}"] = total / count
        if self._term is not None:
            curves["train/regularizer"] = float(self._term)
        for logger in trainer.loggers:
            logger.log_metrics(curves, step=trainer.global_step)
        trainer.progress_bar_metrics["loss"] = curves["train/loss"]
        self._restart(trainer.global_step, module.device)

    def _restart(self, step: int, device: torch.device) -> None:
        self.losses = LossesByLevel(QUARTERS, device)
        self._since = time.perf_counter()
        self._since_step = step
