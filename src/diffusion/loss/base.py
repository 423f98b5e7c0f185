"""What a loss promises: it draws what it needs besides the noise, and gives the loss of each image."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from src.conditioning import Condition

from ..denoiser import Denoiser
from ..time_sampling import AdaptiveTimeSampling, TimeSampling


class Loss(nn.Module, ABC):
    """A loss over images x0, its own draws and noise eps. All its parameters are trained.

    The trainer makes the draws of a whole global batch, keyed by the number of the batch, and slices them by place: so
    they do not depend on devices or micro-batches. It calls the loss once for each micro-batch.

    Args:
        denoiser: whose network is trained.
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """The random times of n images: float64, on the CPU, a row for each image.

        Returns:
            Shape (n,) for a loss of one time t; (n, k) for a loss that draws more, e.g. columns t and s.
        """

    def draw_for_validation(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws from the distribution on which losses of different trainings are compared; by default `draw`'s."""
        return self.draw(n, generator)

    @abstractmethod
    def forward(self, x0: Tensor, draws: Tensor, eps: Tensor, condition: Condition | None = None) -> Tensor:
        """The loss of each image.

        Args:
            x0: clean images as the network's codec encodes them, in [-1, 1] for pixels, shape (B, C, H, W).
            draws: rows of `draw`, on the CPU.
            eps: standard normal noise, x0's shape.
            condition: what the images are conditioned on, or None for nothing.

        Returns:
            Shape (B,), x0's dtype: mean over pixels, weighted by noise level.
        """

    def importance(self, draws: Tensor) -> Tensor:
        """Factors that undo a preference of `draw` for some times, float64, shape (B,); multiplied before the mean."""
        return torch.ones(len(draws), dtype=torch.float64)

    def quantile(self, draws: Tensor) -> Tensor:
        """Where the draws lie in the range of noise levels, in [0, 1], shape (B,); curves are split by it."""
        return self.denoiser.schedule.quantile(draws if draws.dim() == 1 else draws[:, 0])

    @property
    def learns_from_losses(self) -> bool:
        """Whether `observe` needs to be called."""
        return False

    def observe(self, draws: Tensor, losses: Tensor) -> None:
        """Learns from the losses of a whole global batch, in the same order on all ranks.

        Args:
            draws: shape (n, ...), on the CPU.
            losses: without `importance`, shape (n,), on the CPU.
        """


class TimedLoss(Loss):
    """A loss of one time, which a `TimeSampling` draws.

    Args:
        denoiser: whose network is trained.
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
