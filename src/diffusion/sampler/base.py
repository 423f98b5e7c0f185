"""The only sampling loop. A sampler is one `step` from x_t to x_s."""

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
    """An earlier step as multi-step methods use it: its level, its starting point and the prediction there."""

    level: NoiseLevel
    x: Tensor
    prediction: Prediction


@dataclass(frozen=True)
class Path:
    """The position of a step in its trajectory.

    Attributes:
        times: all times of the trajectory, falling.
        levels: their levels, of Python floats.
        index: number of the step, from 0: it goes from levels[index] to levels[index + 1].
        past: the visits before it, the newest last, at most the sampler's `memory`.
        detour: whether a sampler has left the requested trajectory and will return to it.
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

    @property
    def ends_clean(self) -> bool:
        """Whether the last step leads to clean data."""
        return self.levels[-1].sigma == 0

    @property
    def lowest(self) -> float:
        """The smallest time above 0."""
        return self.times[-2 if self.ends_clean else -1]


class Sampler(ABC):
    """Turns noise into images: sampler(denoiser, x_T, times) -> x_0.

    Attributes:
        memory: the number of earlier visits that a step uses.
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
            s: level of the result; s.sigma == 0 at the step to clean data.
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
        """Yields the start and then the state after each step; progress bars and pictures are left to the caller.

        Args:
            denoiser: makes the predictions; must be in eval mode.
            x_T: the start, noise of standard deviation sigma at times[0], shape (B, C, H, W).
            times: falling, the last usually 0 (clean); see `spacing`.
            condition: what the images are conditioned on; None for nothing.
            noise: source of the steps' noise.

        Raises:
            ValueError: the times do not fall, or are out of the schedule's range.
            UserError: an image is not finite. Checked after the last step, so that no step waits for the device.
        """
        times = as_times(times)
        if times.dim() != 1 or len(times) < 2 or not (times.diff() < 0).all():
            raise ValueError(f"times must be at least two falling values, got {times.tolist()}")
        levels = denoiser.schedule(times).scalars()
        conditioned = Conditioned(denoiser, condition)
        before = conditioned.evaluated_images
        times, past = times.tolist(), deque(maxlen=self.memory)
        x_t = x_T
        yield State(x_T)
        for index, (t, s) in enumerate(pairwise(levels)):
            with torch.no_grad():
                state = self.step(conditioned, x_t, t, s, noise, Path(times, levels, index, past))
            if self.memory:
                past.append(Visit(t, x_t if state.origin is None else state.origin, state.prediction))
            x_t = state.x
            evaluations = (conditioned.evaluated_images - before) // len(x_T)
            yield State(x_t, state.prediction, state.origin, evaluations)
            del state  # frees its memory for the next step, unless the caller keeps it
        check_finite(x_t, "sampling: the images")

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
    """The x of the last of at least one state, shape (B, C, H, W); earlier states are freed on the way."""
    for state in states:
        x = state.x
        del state  # frees its memory for the next step
    return x


def level_between(schedule: Schedule, t: NoiseLevel, s: NoiseLevel, share: float, path: Path) -> NoiseLevel:
    """The level at this share of the log-SNR step from t to s, as floats; see `level_near`."""
    return level_near(schedule, t.log_snr + share * (s.log_snr - t.log_snr), path)


def level_near(schedule: Schedule, log_snr: float, path: Path) -> NoiseLevel:
    """The schedule's level at a log-SNR, of Python floats; a table's rows are interpolated.

    Never below both the schedule's t_min and the path's last noisy time, nor above t_max: the nearest level is taken.
    """
    return schedule(schedule.nearest_time([log_snr], path.lowest)).scalars()[0]


def is_endless(t: NoiseLevel, s: NoiseLevel) -> bool:
    """Whether the log-SNR step is infinite (from pure noise or to clean data): only the first-order step is defined."""
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
    """The order, if it is in [lowest, highest].

    Raises:
        ValueError: it is not.
    """
    if not isinstance(order, int) or not lowest <= order <= highest:
        raise ValueError(f"order must be a whole number in [{lowest}, {highest}], got {order}")
    return order


def check_memoryless(sampler: Sampler, name: str) -> Sampler:
    """The sampler, if it is a single-step method, whose steps can start anywhere.

    Raises:
        ValueError: it is a multi-step method.
    """
    if sampler.memory:
        raise ValueError(f"{name} must be a single-step method, and {type(sampler).__name__} is multi-step")
    return sampler


def check_finite(x: Tensor, what: str) -> None:
    """Waits for the device; NaN and infinity persist to the end of a trajectory, so that one look there is enough.

    Raises:
        UserError: x is not finite.
    """
    if not x.isfinite().all():
        raise not_finite(what)


def not_finite(what: str, since: str = "") -> UserError:
    """The error for states that are not finite, e.g. "sampling: the images", " from t = 0.3 on"."""
    return UserError(
        f"{what} are not finite (NaN or infinite){since}: the network's weights have diverged, or a step is too large"
    )
