"""Scores during training, and the best checkpoint by them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from src.evaluation.record import Protocol, Recipe
from src.generation.recipe import Generation
from src.metrics.fidelity import FidelityScore
from src.runs.files import forgiving, write_json
from src.training.callbacks.every import EverySteps


class TrackFidelity(EverySteps):
    """Every N steps, on all ranks: generates images with the averaged weights and scores them.

    The score is logged under its own name; the checkpoint of the best one so far is kept, with the score and
    its protocol beside it. The reference statistics are computed once and cached.

    Args:
        score: what is measured.
        generation: how the images are made.
        set_reference: gives the score this rank's share of the reference set.
        best: file of the best checkpoint.
        recipe: the record of how the images are made, given the number of training steps.
        every: optimiser steps between two scores.
        n: number of generated images, over all ranks.
        batch_size: images generated at once on each device.
    """

    def __init__(
        self,
        score: FidelityScore,
        generation: Generation,
        set_reference: Callable[[FidelityScore, int, int], None],
        best: Path,
        recipe: Callable[[int], Recipe],
        every: int = 5000,
        n: int = 1000,
        batch_size: int = 256,
    ):
        super().__init__(every)
        if n < 2:
            raise ValueError(f"n must be at least 2 images, got {n}")
        self.score = score
        self.generation = generation
        self.set_reference = set_reference
        self.best = Path(best)
        self.recipe = recipe
        self.n = n
        self.batch_size = batch_size
        self.best_value: float | None = None
        self.latest: dict[str, float] = {}

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        score = self.score.to(module.device)
        if score.needs_reference and score.reference is None:
            self.set_reference(score, trainer.global_rank, trainer.world_size)
        score.reset()
        mine = range(trainer.global_rank, self.n, trainer.world_size)
        with module.averaged() as denoiser:
            for images in self.generation.images(denoiser, mine, self.batch_size):
                score.update(images)
        if not trainer.strategy.broadcast(self.best.is_file()):
            self.best_value = None  # of a file that was set aside
        self.latest = scores = score.compute()
        for logger in trainer.loggers:
            logger.log_metrics(scores, step=trainer.global_step)
        value = scores[score.name]
        trainer.progress_bar_metrics[score.name] = value
        if self._is_best(value):
            before, self.best_value = self.best_value, value
            trainer.save_checkpoint(self.best, weights_only=False)
            if trainer.strategy.broadcast(trainer.strategy.checkpoint_io.failures):
                self.best_value = before  # the file is still that of the old one
            elif trainer.is_global_zero:
                protocol = Protocol.of(score, self.recipe(trainer.global_step))
                record = {"scores": scores, "protocol": protocol.as_dict()}
                with forgiving("record of the best score"):
                    write_json(self.best.with_suffix(".json"), record)

    def _is_best(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best_value is None:
            return True
        return value > self.best_value if self.score.higher_is_better else value < self.best_value

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value = state_dict["best_value"]
