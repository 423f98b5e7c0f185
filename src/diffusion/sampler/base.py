"""The only sampling loop. A sampler is one `step` from x_t to x_s."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..denoiser import BaseDenoiser, Conditioned
from ..noise_level import NoiseLevel, as_times
from ..parameterization import Prediction
from .noise import NoiseSource, global_noise


@dataclass(frozen=True)
class State:
    """A point of a sampling trajectory.

    Attributes:
        x: the image x_s, shape (B, C, H, W).
        prediction: the prediction at x_t that led to it; None at the start.
    """

    x: Tensor
    prediction: Prediction | None = None


class Sampler(ABC):
    """Takes noise to images: sampler(denoiser, x_T, times) -> x_0.

    Attributes:
        evaluations_per_step: network evaluations of one step.
    """

    evaluations_per_step = 1

    @abstractmethod
    def step(
        self, denoiser: BaseDenoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, noise: NoiseSource
    ) -> State:
        """From x_t to x_s, s < t.

        Args:
            denoiser: has its condition filled in.
            x_t: shape (B, C, H, W).
            t: level of x_t, of Python floats.
            s: level to go to; s.sigma == 0 at the step to clean data.
            noise: called only where noise is used.
        """

    def trajectory(
        self,
        denoiser: BaseDenoiser,
        x_T: Tensor,
        times: Tensor | list[float],
        condition: Tensor | None = None,
        noise: NoiseSource = global_noise,
    ) -> Iterator[State]:
        """Yields the start and then the state after each step; progress bars and pictures are the caller's affair.

        Args:
            denoiser: asked for predictions; put it into eval mode first.
            x_T: the start, noise of standard deviation sigma at times[0], shape (B, C, H, W).
            times: falling, the last usually 0 (clean); see `spacing`.
            condition: e.g. class labels of shape (B,); None for none.
            noise: source of the steps' noise.

        Raises:
            ValueError: the times do not fall.
        """
        times = as_times(times)
        if times.dim() != 1 or len(times) < 2 or not (times.diff() < 0).all():
            raise ValueError(f"times must be at least two falling values, got {times.tolist()}")
        levels = denoiser.schedule(times).scalars()
        denoiser = Conditioned(denoiser, condition)
        state = State(x_T)
        yield state
        for t, s in pairwise(levels):
            with torch.no_grad():
                state = self.step(denoiser, state.x, t, s, noise)
            yield state

    def __call__(
        self,
        denoiser: BaseDenoiser,
        x_T: Tensor,
        times: Tensor | list[float],
        condition: Tensor | None = None,
        noise: NoiseSource = global_noise,
    ) -> Tensor:
        """The last state of `trajectory`, same arguments: images, nominally in [-1, 1], shape (B, C, H, W)."""
        for state in self.trajectory(denoiser, x_T, times, condition, noise):
            last = state
        return last.x
