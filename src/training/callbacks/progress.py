"""The progress bar of a training without epochs."""

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class StepProgressBar(TQDMProgressBar):
    """Shows the optimiser steps out of max_steps.

    Args:
        every: optimiser steps between two updates; larger if the output is not a terminal, for at most 200 updates.
    """

    def __init__(self, every: int = 10):
        super().__init__(refresh_rate=every)
        self.every = every

    def init_train_tqdm(self) -> Tqdm:
        return self._bar("training", position=0, leave=True, unit="step", smoothing=0)

    def init_validation_tqdm(self) -> Tqdm:
        return self._bar(self.validation_description, position=1, leave=False)

    def _bar(self, description: str, **settings: Any) -> Tqdm:
        return Tqdm(
            desc=description,
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=self.BAR_FORMAT,
            **settings,
        )

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The progress bar metrics without the logger's version number."""
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
        """Does nothing, since there are no epochs."""
