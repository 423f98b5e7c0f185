"""The only sampling loop. A sampler is one `step` from x_t to x_s."""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from src.conditioning import Condition
from src.errors import UserError

from ..denoiser import BaseDenoiser, Conditioned
from ..noise_level import NoiseLevel, as_times, conditional_variance
from ..parameterization import Prediction
from ..schedule import Schedule
from .noise import NoiseSource, global_noise

# All pixels are looked at for NaN after every step of a trajectory of so many steps, and so often in a longer one, of
# which one pixel of each image is looked at after every step.
CHECKED_THROUGHOUT, CHECKS = 16, 8


class State(NamedTuple):
    """A point of a sampling trajectory.

    Attributes:
        x: the image x_s, shape (B, C, H, W).
        prediction: the prediction at x_t that led to it; None at the start.
        origin: the x_t from which the step was made, where a corrector had moved it; else None.
        evaluations: of the network for each image, on the way here; guidance may take several in a step.
    """

    x: Tensor
    prediction: Prediction | None = None
    origin: Tensor | None = None
    evaluations: int = 0


class Visit(NamedTuple):
    """What a multi-step method remembers of an earlier step: its level, the point it started from, the prediction."""

    level: NoiseLevel
    x: Tensor
    prediction: Prediction


@dataclass(frozen=True)
class Path:
    """Where a step stands in its trajectory.

    Attributes:
        times: all times of the trajectory, falling.
        levels: their levels, of Python floats.
        index: number of the step, from 0: it goes from levels[index] to levels[index + 1].
        past: the visits before it, the newest last, as many as the sampler's `memory` at most.
        detour: whether a sampler has left the trajectory asked for and comes back to it.
    """

    times: Sequence[float]
    levels: Sequence[NoiseLevel]
    index: int = 0
    past: Sequence[Visit] = ()
    detour: bool = False

    @property
    def steps(self) -> int:
        """Number of steps of the trajectory."""
        return len(self.levels) - 1

    @property
    def remaining(self) -> int:
        """Number of steps from here to the end, this one included."""
        return self.steps - self.index


class Sampler(ABC):
    """Takes noise to images: sampler(denoiser, x_T, times) -> x_0.

    Attributes:
        memory: how many earlier visits a step wants to see.
    """

    memory = 0

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({numbers})"

    @abstractmethod
    def step(
        self,
        denoiser: BaseDenoiser,
        x_t: Tensor,
        t: NoiseLevel,
        s: NoiseLevel,
        noise: NoiseSource,
        path: Path,
    ) -> State:
        """From x_t to x_s, s < t.

        Args:
            denoiser: has its condition filled in.
            x_t: shape (B, C, H, W).
            t: level of x_t, of Python floats.
            s: level to go to; s.sigma == 0 at the step to clean data.
            noise: called only where noise is used.
            path: the whole trajectory and the visits so far.
        """

    def trajectory(
        self,
        denoiser: BaseDenoiser,
        x_T: Tensor,
        times: Tensor | list[float],
        condition: Condition | None = None,
        noise: NoiseSource = global_noise,
    ) -> Iterator[State]:
        """Yields the start and then the state after each step; progress bars and pictures are the caller's affair.

        Args:
            denoiser: asked for predictions; put it into eval mode first.
            x_T: the start, noise of standard deviation sigma at times[0], shape (B, C, H, W).
            times: falling, the last usually 0 (clean); see `spacing`.
            condition: what the images are conditioned on; None for nothing.
            noise: source of the steps' noise.

        Raises:
            ValueError: the times do not fall.
            UserError: an image is not finite; names the step. Told at the end, so that no step waits for the device.
        """
        times = as_times(times)
        if times.dim() != 1 or len(times) < 2 or not (times.diff() < 0).all():
            raise ValueError(f"times must be at least two falling values, got {times.tolist()}")
        levels = denoiser.schedule(times).scalars()
        conditioned = Conditioned(denoiser, condition)
        before = conditioned.evaluated_images
        times, past = times.tolist(), deque(maxlen=self.memory)
        x_t = x_T
        finite = FiniteCheck("sampling: the images", times[:-1])
        yield State(x_T)
        for index, (t, s) in enumerate(pairwise(levels)):
            with torch.no_grad():
                state = self.step(conditioned, x_t, t, s, noise, Path(times, levels, index, past))
                finite.after_step(state.x)
            if self.memory:
                past.append(Visit(t, x_t if state.origin is None else state.origin, state.prediction))
            x_t = state.x
            evaluations = (conditioned.evaluated_images - before) // len(x_T)
            yield State(x_t, state.prediction, state.origin, evaluations)
            del state  # whoever wants it has it; the memory of earlier images can serve the next step
        finite.tell()

    def __call__(
        self,
        denoiser: BaseDenoiser,
        x_T: Tensor,
        times: Tensor | list[float],
        condition: Condition | None = None,
        noise: NoiseSource = global_noise,
    ) -> Tensor:
        """The last state of `trajectory`, same arguments: images, nominally in [-1, 1], shape (B, C, H, W)."""
        return last_image(self.trajectory(denoiser, x_T, times, condition, noise))


def last_image(states: Iterator[State]) -> Tensor:
    """The x of the last of at least one state, shape (B, C, H, W); the earlier ones are let go of on the way."""
    for state in states:
        x = state.x
        del state  # its memory can serve the next step
    return x


def level_between(schedule: Schedule, t: NoiseLevel, s: NoiseLevel, share: float) -> NoiseLevel:
    """The level that lies this share of the log-SNR step away from t, towards s; of Python floats."""
    return level_at(schedule, t.log_snr + share * (s.log_snr - t.log_snr))


def level_at(schedule: Schedule, log_snr: float) -> NoiseLevel:
    """The schedule's level at a log-SNR, of Python floats; a table's rows are interpolated."""
    return schedule(schedule.time_of_log_snr(as_times([log_snr]))).scalars()[0]


def is_endless(t: NoiseLevel, s: NoiseLevel) -> bool:
    """Whether the log-SNR step is infinite (from pure noise, to clean data): only the first-order step exists there."""
    return t.alpha == 0 or s.sigma == 0


def ancestral_split(t: NoiseLevel, s: NoiseLevel, eta: float) -> tuple[NoiseLevel, float]:
    """A level below s, and the standard deviation of the noise that leads from there to s.

        std = eta sigma_{t|s} sigma_s / sigma_t,    sigma_down = sqrt(sigma_s^2 - std^2)

    DDIM's eta (Song et al. 2021, eq. 16), in unscaled coordinates k-diffusion's ancestral step.
    """
    if eta == 0:
        return s, 0.0
    std = eta * conditional_variance(t, s) ** 0.5 * s.sigma / t.sigma
    # rounding may fall below 0 where alpha_t is 0
    return replace(s, sigma=max(s.sigma**2 - std**2, 0.0) ** 0.5), std


def weighted_sum(*terms: tuple[float, Tensor]) -> Tensor:
    """The sum of coefficient times tensor, in one new tensor."""
    (first, x), *others = terms
    total = torch.mul(x, first)
    for coefficient, y in others:
        total.add_(y, alpha=coefficient)
    return total


def check_order(order: int, highest: int, lowest: int = 1) -> int:
    """The order, if the solver has it.

    Raises:
        ValueError: it has not.
    """
    if not isinstance(order, int) or not lowest <= order <= highest:
        raise ValueError(f"order must be a whole number in [{lowest}, {highest}], got {order}")
    return order


def check_memoryless(sampler: Sampler, name: str) -> Sampler:
    """The sampler, if its steps need no earlier visits and can so be taken from anywhere.

    Raises:
        ValueError: they do.
    """
    if sampler.memory:
        raise ValueError(f"{name} must be a single-step method, and {type(sampler).__name__} is multi-step")
    return sampler


class FiniteCheck:
    """Whether the states of a trajectory are finite: asked of the device after each step, read at the end alone.

    Args:
        what: whose states, e.g. "sampling: the images".
        times: from which the network is asked, one for each step.
    """

    def __init__(self, what: str, times: Sequence[float]):
        self.what, self.times = what, times
        # after every step one pixel of each image (in one block: many small ones would break up freed images' memory);
        # after some the sum of all pixels, not finite if a summand is not
        self.pixels: tuple[Tensor, ...] = ()
        self.images: dict[int, Tensor] = {}
        self._index = 0
        self._every = 1 if len(times) <= CHECKED_THROUGHOUT else math.ceil(len(times) / CHECKS)
        self._corners: Tensor | None = None  # the places of those pixels among all

    def after_step(self, x: Tensor) -> None:
        """Takes the next state, shape (B, C, H, W)."""
        index = self._index
        self._index += 1
        if self._corners is None:
            self._corners = torch.arange(0, x.numel(), x[0].numel(), device=x.device)
            with torch.inference_mode(False):  # a later step may be made outside of it
                self.pixels = x.new_empty(len(self.times), len(x)).unbind()
        torch.take(x, self._corners, out=self.pixels[index])
        if (index + 1) % self._every == 0 or index == len(self.times) - 1:
            self.images[index] = x.sum()

    def tell(self) -> None:
        """Waits for the device.

        Raises:
            UserError: a state is not finite; names the first such step, as nearly as it is known.
        """
        finite = torch.stack([*self.images.values()]).isfinite().tolist()
        if all(finite):
            return
        checked = [-1, *self.images]
        first, last = checked[finite.index(False)] + 1, checked[finite.index(False) + 1]
        # a network spreads what one pixel has: the one looked at may have been lost later than another, not earlier
        last = next((index for index in range(first, last) if not self.pixels[index].isfinite().all()), last)
        steps = f"step {last + 1}" if first == last else f"one of the steps {first + 1} to {last + 1}"
        raise not_finite(self.what, f"{steps} of {len(self.times)}", self.times[first])


def not_finite(what: str, step: str, time: float) -> UserError:
    """The error that names the step after which something is not finite, and from which time the network was asked."""
    return UserError(
        f"{what} are not finite (NaN or infinite) after {step}, where the network was asked from t = {time:g}: its"
        " weights have diverged or the step is too large"
    )
