"""The sampling loop, shared by all samplers. A sampler implements one `step` from x_t to x_s."""

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
    """The state after a sampling step.

    Attributes:
        x: the image x_s, shape (B, C, H, W).
        prediction: the prediction at x_t that led to it; None at the start.
        origin: the corrected x_t from which the step was made, if a corrector changed it; else None.
        evaluations: network evaluations per image so far; guidance may use several per step.
    """

    x: Tensor
    prediction: Prediction | None = None
    origin: Tensor | None = None
    evaluations: int = 0


class Visit(NamedTuple):
    """An earlier step, for multi-step methods: the level and image where it started and the prediction there."""

    level: NoiseLevel
    x: Tensor
    prediction: Prediction


@dataclass(frozen=True)
class Path:
    """The position of a step in its trajectory.

    Attributes:
        times: all times of the trajectory, decreasing.
        levels: their levels, of Python floats.
        index: 0-based number of the step, which leads from levels[index] to levels[index + 1].
        past: the earlier visits, the newest last, at most the sampler's `memory`.
        detour: whether the step belongs to a restart outside the requested times.
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
        """Number of remaining steps, including this one."""
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
    """Generates images from noise: sampler(denoiser, x_T, times) -> x_0.

    Attributes:
        memory: the number of earlier visits used by a step.
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
            denoiser: a denoiser with a fixed condition.
            x_t: shape (B, C, H, W).
            t: level of x_t, of Python floats.
            s: level of the result; s.sigma == 0 at the step to clean data.
            noise: called only if the step uses noise.
            path: the whole trajectory and the earlier visits.
        """

    def trajectory(
        self,
        denoiser: BaseDenoiser,
        x_T: Tensor,
        times: Tensor | list[float],
        condition: Condition | None = None,
        noise: NoiseSource = global_noise,
    ) -> Iterator[State]:
        """Yields the initial state and then the state after each step.

        Args:
            denoiser: must be in eval mode.
            x_T: initial noise with standard deviation sigma at times[0], shape (B, C, H, W).
            times: decreasing, the last usually 0 (clean); see `spacing`.
            condition: the condition of the images, or None.
            noise: source of the steps' noise.

        Raises:
            ValueError: the times are not decreasing, or out of the schedule's range.
            UserError: an image is not finite. This is checked after the last step only, to avoid synchronisation.
        """
        times = as_times(times)
        if times.dim() != 1 or len(times) < 2 or not (times.diff() < 0).all():
            raise ValueError(f"times must be at least two decreasing values, got {times.tolist()}")
        levels = denoiser.schedule(times).scalars()
        conditioned = Conditioned(denoiser, condition)
        conditioned.reset()
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
        """The last image of `trajectory`, with the same arguments; nominally in [-1, 1], shape (B, C, H, W)."""
        return last_image(self.trajectory(denoiser, x_T, times, condition, noise))


def last_image(states: Iterator[State]) -> Tensor:
    """The x of the last state, shape (B, C, H, W); each earlier state is freed before the next step."""
    for state in states:
        x = state.x
        del state  # frees its memory for the next step
    return x


def level_between(schedule: Schedule, t: NoiseLevel, s: NoiseLevel, share: float, path: Path) -> NoiseLevel:
    """The level at the fraction `share` of the log-SNR step from t to s, as floats; see `level_near`."""
    return level_near(schedule, t.log_snr + share * (s.log_snr - t.log_snr), path)


def level_near(schedule: Schedule, log_snr: float, path: Path) -> NoiseLevel:
    """The schedule's level at a log-SNR, of Python floats; tables are interpolated.

    The time is clamped to [min(t_min, the path's last noisy time), t_max].
    """
    return schedule(schedule.nearest_time([log_snr], path.lowest)).scalars()[0]


def is_endless(t: NoiseLevel, s: NoiseLevel) -> bool:
    """Whether the log-SNR step is infinite (from pure noise or to clean data), so that only order 1 is defined."""
    return t.alpha == 0 or s.sigma == 0


def ancestral_split(t: NoiseLevel, s: NoiseLevel, eta: float) -> tuple[NoiseLevel, float]:
    """A level below s, and the standard deviation of the noise to add to get from it to s.

        std = eta sigma_{t|s} sigma_s / sigma_t,    sigma_down = sqrt(sigma_s^2 - std^2)

    DDIM's eta (Song et al. 2021, eq. 16); in unscaled coordinates, k-diffusion's ancestral step.
    """
    if eta == 0:
        return s, 0.0
    std = eta * conditional_variance(t, s) ** 0.5 * s.sigma / t.sigma
    # may round below 0 if alpha_t is 0
    return replace(s, sigma=max(s.sigma**2 - std**2, 0.0) ** 0.5), std


def weighted_sum(*terms: tuple[float, Tensor]) -> Tensor:
    """The sum of coefficient * tensor as a new tensor."""
    (first, x), *others = terms
    total = torch.mul(x, first)
    for coefficient, y in others:
        total.add_(y, alpha=coefficient)
    return total


def check_order(order: int, highest: int, lowest: int = 1) -> int:
    """Returns the order.

    Raises:
        ValueError: the order is not in [lowest, highest].
    """
    if not isinstance(order, int) or not lowest <= order <= highest:
        raise ValueError(f"order must be a whole number in [{lowest}, {highest}], got {order}")
    return order


def check_memoryless(sampler: Sampler, name: str) -> Sampler:
    """Returns the sampler.

    Raises:
        ValueError: the sampler is a multi-step method, whose steps cannot start at any level.
    """
    if sampler.memory:
        raise ValueError(f"{name} must be a single-step method, and {type(sampler).__name__} is multi-step")
    return sampler


def check_finite(x: Tensor, what: str) -> None:
    """Checks a final state; synchronises with the device.

    NaN and infinity persist to the end of a trajectory, so one check at the end is enough.

    Raises:
        UserError: x is not finite.
    """
    if not x.isfinite().all():
        raise not_finite(what)


def not_finite(what: str, since: str = "") -> UserError:
    """The error for states that are not finite, e.g. not_finite("sampling: the images", " from t = 0.3 on")."""
    return UserError(
        f"{what} are not finite (NaN or infinite){since}: the network's weights have diverged, or a step is too large"
    )
