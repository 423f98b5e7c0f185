"""A loaded run, as used by the tasks of `src.sample` and by `src.evaluate`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.conditioning import Condition
from src.data.source import ImageSet, ImageSource, Split
from src.diffusion.denoiser import Denoiser
from src.errors import UserError
from src.generation.recipe import Recipe
from src.runs.folder import FoundRun


@dataclass(frozen=True)
class Numerics:
    """How sampling computes its numbers. With the defaults, images are the same on every device, up to rounding.

    Attributes:
        precision: of the network: "32-true", "bf16-mixed" (float32 weights, operations in bfloat16 as by
            torch.autocast) or "bf16-true" (bfloat16 weights). All other arithmetic is float32.
        compiled: whether the network is compiled.
        noise: where noise is drawn: "cpu", or "device" for the network's device.
    """

    precision: str = "32-true"
    compiled: bool = False
    noise: str = "cpu"

    def record(self, device: torch.device) -> dict[str, Any]:
        """What is not as usual, for records."""
        found: dict[str, Any] = {}
        if self.precision != "32-true":
            found["precision"] = self.precision
        if self.compiled:
            found["compiled"] = True
        if self.noise == "device" and device.type != "cpu":
            found["noise"] = f"drawn on {device.type}"
        return found


USUAL = Numerics()


@dataclass(frozen=True)
class LoadedRun:
    """A trained denoiser in eval mode, with its sampling recipe and its run folder.

    Attributes:
        denoiser: the denoiser with the chosen weights, on its device.
        recipe: the sampling recipe.
        source: the training data; read lazily.
        found: the run folder and the checkpoint.
        step: training step of the checkpoint.
        weights: name of the weights for records: "ema", "raw", "ema std=0.1".
        ema_decay: decay of the average, if it has one; else None.
        numerics: how its numbers are computed.
    """

    denoiser: Denoiser
    recipe: Recipe
    source: ImageSource
    found: FoundRun
    step: int
    weights: str
    ema_decay: float | None
    numerics: Numerics = USUAL

    @property
    def device(self) -> torch.device:
        """The device of the denoiser."""
        return next(self.denoiser.parameters()).device

    @property
    def class_names(self) -> list[str]:
        """The names of the classes; their numbers if the data, which know the names, are not available."""
        try:
            return self.source.class_names
        except UserError:
            return [str(label) for label in range(self.source.num_classes)]

    def record(self, evaluations: int) -> dict[str, Any]:
        """The weights and the recipe, for records; see `Recipe.record`."""
        return {
            "training_steps": self.step,
            "weights": self.weights,
            "ema_decay": self.ema_decay,
            **self.recipe.record(self.denoiser.variance, evaluations),
            **self.numerics.record(self.device),
        }

    def images(self, split: Split, indices: range) -> ImageSet:
        """A split of the run's data, which has images with these indices.

        Raises:
            UserError: the split has fewer images.
        """
        self.source.prepare()
        images = self.source.split(split)
        if len(indices) and indices[-1] >= len(images):
            raise UserError(f"n={len(indices)}: the {split} split has {len(images)} images; choose fewer")
        return images

    def data(self, split: Split, indices: range) -> tuple[Tensor, Condition | None]:
        """Images of the run's data, encoded by the codec, and their conditions, on the denoiser's device.

        Raises:
            UserError: the split has fewer images.
        """
        images = self.images(split, indices)
        x0 = self.recipe.codec.encode(images.images(indices).to(self.device))
        return x0, self.condition_of(images.condition(indices), x0)

    def condition_of(self, condition: Condition, x0: Tensor) -> Condition | None:
        """What the network reads for encoded images of the data with this condition, on the denoiser's device."""
        if self.recipe.conditioning is None:
            return None
        return self.recipe.conditioning.of_data(condition, x0).to(self.device)
