"""Scores during training, and the best checkpoint."""

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.memory import is_oom_error
from tqdm import tqdm

from src.data.source import ImageSource
from src.errors import UserError
from src.evaluation.record import Record
from src.evaluation.scores import ScoreSet
from src.generation.recipe import Recipe
from src.runs.output import tolerated
from src.training.callbacks.every import EverySteps

log = logging.getLogger(__name__)


class TrackFidelity(EverySteps):
    """Generates images with the averaged weights and scores them every N steps, on all ranks.

    Scores are logged under their names. The checkpoint with the best value of the first score is written to `best`,
    with its `Record` in a .json file. A score that fails, e.g. for lack of memory, does not end the training
    (`tolerated`); with several ranks this holds for the generation of images and for results that are not finite.

    Args:
        scores: the scores; the first selects the best checkpoint.
        recipe: the sampling recipe.
        source: the data with the reference sets.
        best: file of the best checkpoint.
        record: maps the number of training steps and the network evaluations per image to the recipe's record.
        cache: folder of the cached reference statistics; None for no cache.
        device_batch: number of images that fit on a device, e.g. the micro-batch of training.
        every: optimiser steps between two scores.
        n: number of generated images, over all ranks.
        batch_size: images generated at once on each device; None for `device_batch`.
        at_end: also score after the last step if `every` does not divide it.

    Attributes:
        latest: the latest scores and their protocol; None before the first scoring.
        best_value: the best value of the first score so far.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        scores: ScoreSet,
        recipe: Recipe,
        source: ImageSource,
        best: Path,
        record: Callable[[int, int], dict[str, Any]],
        cache: str | Path | None = None,
        device_batch: int = 256,
        every: int = 2000,
        n: int = 1000,
        batch_size: int | None = None,
        at_end: bool = True,
    ):
        super().__init__(every)
        if n < 2:
            raise ValueError(f"n must be at least 2 images, got {n}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 image or null, got {batch_size}")
        self.scores = scores
        self.recipe = recipe
        self.source = source
        self.best = Path(best)
        self.record = record
        self.cache = cache
        self.n = n
        self.batch_size = batch_size or device_batch
        self.at_end = at_end
        self.best_value: float | None = None
        self.latest: Record | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that the generated and the reference set are large enough."""
        try:
            labels = self.recipe.labels(range(self.n)) if self.scores.of_classes else None
            self.scores.check_counts(self.n, self.source, labels)
        except UserError as error:
            raise UserError(
                f"{error}; change callbacks.track_fidelity.n={self.n} or metrics (metrics=none for no score)"
            ) from None

    def cost(self, max_steps: int) -> str:
        """What scoring costs in a training of so many steps, and how to spend less, in one line."""
        times = max_steps // self.every + (self.at_end and max_steps % self.every > 0)
        return (
            f"{self.scores.names} of {self.n:,} images of {self.recipe.steps} steps, {times} times"
            " (fewer: callbacks.track_fidelity.n, at_end=false; none: metrics=none)"
        )

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.at_end and trainer.global_step % self.every:
            return
        # with several ranks, one that left out a collective would make the others wait
        with tolerated("score") if trainer.world_size == 1 else nullcontext():
            self._score(trainer, module)

    def _score(self, trainer: Trainer, module: LightningModule) -> None:
        scores = self.scores.to(module.device)
        if scores.needs_reference:
            scores.set_references(self.source, trainer.global_rank, trainer.world_size, self.cache)
        evaluations = self._generate(trainer, module)
        if evaluations is None:
            return
        try:
            found = scores.compute(self.n)
        except UserError as error:  # raised on all ranks
            with tolerated("score"):
                raise error
            return
        made = self.record(trainer.global_step, evaluations)
        self.latest = scores.record(found, made, self.recipe.codec.describe())
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)
        name = scores.monitored.name
        trainer.progress_bar_metrics[name] = found[name]
        if not trainer.strategy.broadcast(self.best.is_file()):
            self.best_value = None  # the file was renamed, since the training continues from an earlier step
        if self._is_best(found[name]):
            self._keep(trainer, self.latest, found[name])

    def _generate(self, trainer: Trainer, module: LightningModule) -> int | None:
        """Generates this rank's images and adds them to the scores.

        Returns:
            The network evaluations per image; None if a rank has failed.
        """
        is_main = trainer.is_global_zero
        if is_main:
            steps = self.recipe.steps
            log.info(
                "score       %s of %s images, %d sampler steps each", self.scores.names, f"{self.n:,}", steps
            )
        mine = range(trainer.global_rank, self.n, trainer.world_size)
        self.scores.reset()
        bar = tqdm(desc="score", total=len(mine), unit="image", delay=2, leave=False, disable=not is_main)
        evaluations, failed, left = 0, None, mine
        try:
            with module.averaged() as denoiser, bar:
                for made in self.recipe.images(denoiser, mine, self.batch_size):
                    numbers, left = left[: len(made.images)], left[len(made.images) :]
                    self.scores.update(made.images, made.labels, numbers)
                    bar.update(len(made.images))
                    evaluations = max(evaluations, made.evaluations)
        except Exception as error:
            failed = error
            if isinstance(error, RuntimeError) and is_oom_error(error):
                failed = UserError(
                    f"out of memory with {self.batch_size} images per batch; lower"
                    " callbacks.track_fidelity.batch_size"
                )
        if not trainer.strategy.reduce_boolean_decision(failed is None):
            with tolerated("score"):
                raise failed or UserError("another process could not generate its images")
            return None
        # with an adaptive solver the number differs between batches and ranks
        return int(trainer.strategy.reduce(torch.tensor(evaluations, device=module.device), reduce_op="max"))

    def _keep(self, trainer: Trainer, record: Record, value: float) -> None:
        before, self.best_value = self.best_value, value
        trainer.save_checkpoint(self.best, weights_only=False)
        if trainer.strategy.broadcast(trainer.strategy.checkpoint_io.failures):
            self.best_value = before  # the file still holds the previous best
        elif trainer.is_global_zero:
            with tolerated("record of the best score"):
                record.write(self.best.with_suffix(".json"))

    def _is_best(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best_value is None:
            return True
        higher = self.scores.monitored.higher_is_better
        return value > self.best_value if higher else value < self.best_value

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value, "score": self.scores.monitored.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # the best value of another score is not comparable
        if state_dict.get("score", self.scores.monitored.name) == self.scores.monitored.name:
            self.best_value = state_dict["best_value"]
