"""The base class of callbacks that act every N optimiser steps."""

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class EverySteps(Callback):
    """Calls `act` after each N-th optimiser step, and after the last one.

    Args:
        every: optimiser steps between two calls.

    Raises:
        ValueError: every is below 1.
    """

    def __init__(self, every: int):
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.every = every
        self._acted = -1

    @abstractmethod
    def act(self, trainer: Trainer, module: LightningModule) -> None:
        """Called on all ranks at step trainer.global_step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._acted = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # a micro-batch that only accumulates gradients does not change the step
        if step != self._acted and (step % self.every == 0 or step == trainer.max_steps):
            self._acted = step
            self.act(trainer, pl_module)
