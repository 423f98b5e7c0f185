"""The progress bar of a training without epochs."""

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class StepProgressBar(TQDMProgressBar):
    """Counts optimiser steps towards max_steps.

    Args:
        every: optimiser steps between two updates; more where they go to a file, which sees 200 at the most.
    """

    def __init__(self, every: int = 10):
        super().__init__(refresh_rate=every)
        self.every = every

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.set_description("training")
        bar.unit = "step"
        return bar

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The latest loss and score, without the logger's version number."""
        return {name: value for name, value in trainer.progress_bar_metrics.items() if name != "v_num"}

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self.train_progress_bar.reset(trainer.max_steps)
        self.train_progress_bar.initial = self.train_progress_bar.n = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        every = self.every if sys.stderr.isatty() else max(self.every, trainer.max_steps // 200)
        if step % every == 0 or step == trainer.max_steps:
            bar = self.train_progress_bar
            bar.set_postfix(
                {name: f"{value:.4g}" for name, value in self.get_metrics(trainer, pl_module).items()}
            )
            bar.n = step
            bar.refresh()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: there are no epochs."""
