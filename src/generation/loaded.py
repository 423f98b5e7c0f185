"""A trained run, loaded: what the tasks of `src.sample` and the evaluations of `src.evaluate` work on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.conditioning import Condition
from src.data.source import ImageSource, Split
from src.diffusion.denoiser import Denoiser
from src.errors import UserError
from src.generation.recipe import Recipe
from src.runs.folder import FoundRun


@dataclass(frozen=True)
class LoadedRun:
    """A trained denoiser in eval mode, how it is sampled, and where it is from.

    Attributes:
        denoiser: with the chosen weights, on its device.
        recipe: how its images are made.
        source: the data that it was trained on; nothing is read before it is used.
        found: its folder and checkpoint.
        step: training step of the checkpoint.
        weights: which weights, in the words of a record: "ema", "raw", "ema std=0.1".
        ema_decay: of the average, where it has one.
    """

    denoiser: Denoiser
    recipe: Recipe
    source: ImageSource
    found: FoundRun
    step: int
    weights: str
    ema_decay: float | None

    @property
    def device(self) -> torch.device:
        """The denoiser's."""
        return next(self.denoiser.parameters()).device

    def record(self, evaluations: int) -> dict[str, Any]:
        """How its images are made, for records; see `Recipe.record`."""
        return {
            "training_steps": self.step,
            "weights": self.weights,
            "ema_decay": self.ema_decay,
            **self.recipe.record(self.denoiser.variance, evaluations),
        }

    def data(self, split: Split, indices: range) -> tuple[Tensor, Condition | None]:
        """Images of the run's data as the network sees them, on its device, and their conditions.

        Raises:
            UserError: the split has fewer images.
        """
        self.source.prepare()
        images = self.source.split(split)
        if len(indices) and indices[-1] >= len(images):
            raise UserError(f"n={len(indices)}: the {split} split has {len(images)} images; choose fewer")
        condition = None
        if self.recipe.conditioning is not None:
            condition = self.recipe.conditioning.of_data(images.condition(indices)).to(self.device)
        x0 = self.recipe.codec.encode(images.images(indices).to(self.device))
        return x0, condition
