"""The interface of losses."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from src.conditioning import Condition

from ..denoiser import Denoiser
from ..time_sampling import AdaptiveTimeSampling, TimeSampling


class Loss(nn.Module, ABC):
    """A loss of images x0, random times and noise eps. All its parameters are trained.

    The trainer draws the times of a whole global batch, keyed by the batch number, and slices them by position, so that
    they do not depend on devices or micro-batches. It calls the loss once per micro-batch.

    Args:
        denoiser: the denoiser whose network is trained.

    Attributes:
        measures: names of the further values that validation reports; see `measure`.
        needs_pairs: whether the loss of an image depends on the other images of its micro-batch.
    """

    measures: tuple[str, ...] = ()
    needs_pairs = False

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """The random times of n images, float64, on the CPU, one row per image.

        Returns:
            Shape (n,) for a loss of one time t; (n, k) for a loss of several, e.g. columns t and s.
        """

    def draw_at(self, number: int, n: int, generator: torch.Generator) -> Tensor:
        """The draws of batch `number`, counted in optimiser steps, for losses that change with it."""
        return self.draw(n, generator)

    def draw_for_validation(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws for validation, from a fixed distribution so that runs can be compared; by default `draw`."""
        return self.draw(n, generator)

    @abstractmethod
    def forward(self, x0: Tensor, draws: Tensor, eps: Tensor, condition: Condition | None = None) -> Tensor:
        """The loss of each image.

        Args:
            x0: clean images as encoded by the codec, in [-1, 1] for pixels, shape (B, C, H, W).
            draws: rows of `draw`, on the CPU.
            eps: standard normal noise, x0's shape.
            condition: the condition of the images, or None.

        Returns:
            The mean over pixels, weighted by noise level; shape (B,), x0's dtype.
        """

    def measure(
        self, x0: Tensor, draws: Tensor, eps: Tensor, condition: Condition | None = None
    ) -> dict[str, Tensor]:
        """Further values of validation images by name, each (B,); NaN for images that do not count.

        The names are `measures`, the arguments those of `forward`. Validation reports the means, with the averaged
        weights if there are some.
        """
        return {}

    def importance(self, draws: Tensor) -> Tensor | None:
        """Importance weights of the draws, float64, shape (B,); the losses are multiplied by them before the mean.

        None if all are 1.
        """
        return None

    def quantile(self, draws: Tensor) -> Tensor:
        """Position of the draws in the range of noise levels, in [0, 1], shape (B,); used to split loss curves."""
        return self.denoiser.schedule.quantile(draws if draws.dim() == 1 else draws[:, 0])

    @property
    def learns_from_losses(self) -> bool:
        """Whether `observe` needs to be called."""
        return False

    def observe(self, draws: Tensor, losses: Tensor) -> None:
        """Updates the distribution of times from the losses of a global batch, in the same order on all ranks.

        Args:
            draws: shape (n, ...), on the CPU.
            losses: without importance weights, shape (n,), on the CPU.
        """


class TimedLoss(Loss):
    """A loss of one time, drawn by a `TimeSampling`.

    Args:
        denoiser: the denoiser whose network is trained.
        time_sampling: the distribution of times.
    """

    def __init__(self, denoiser: Denoiser, time_sampling: TimeSampling):
        super().__init__(denoiser)
        self.time_sampling = time_sampling

    def draw(self, n, generator):
        return self.time_sampling(n, self.denoiser.schedule, generator)

    def draw_for_validation(self, n, generator):
        return self.time_sampling.expected()(n, self.denoiser.schedule, generator)

    def importance(self, draws):
        return self.time_sampling.weights(draws, self.denoiser.schedule)

    @property
    def learns_from_losses(self):
        return isinstance(self.time_sampling, AdaptiveTimeSampling)

    def observe(self, draws, losses):
        self.time_sampling.update(draws, losses, self.denoiser.schedule)
