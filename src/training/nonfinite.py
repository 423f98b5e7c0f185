"""Steps whose loss or gradient is not finite: counted, and not more than a few in a row."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from src.errors import UserError


class SkipNonFinite(Callback):
    """Counts the optimiser steps that the module has skipped, and ends a training that does not recover.

    A step whose loss or gradient is not finite on any rank updates nothing (see `DiffusionModule`); weights,
    averages and optimiser stay as they were, and the stream goes on. Logged as `train/skipped_steps`.

    Args:
        stop_after: skipped steps in a row after which the training is stopped. Loss scaling of
            precision=16-mixed skips a few steps by design, while it looks for its scale.

    Raises:
        ValueError: stop_after is below 1.
    """

    def __init__(self, stop_after: int = 10):
        if stop_after < 1:
            raise ValueError(f"stop_after must be at least 1 step, got {stop_after}")
        self.stop_after = stop_after
        self.skipped = 0
        self.in_a_row = 0
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # a micro-batch that has only accumulated gradients
            return
        self._step = trainer.global_step
        if not pl_module.skipped:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        for logger in trainer.loggers:
            logger.log_metrics({"train/skipped_steps": self.skipped}, step=self._step)
        if self.in_a_row >= self.stop_after:
            raise UserError(
                f"stopped at step {self._step}: loss or gradient not finite {self.in_a_row} times in a row; the "
                "last checkpoint is from before. Lower optimizer.lr, or choose trainer.precision=32-true"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
        self.in_a_row = state_dict["in_a_row"]
