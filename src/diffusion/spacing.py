"""Spacings: which times a sampler visits.

A spacing returns falling times, t_S > ... > t_1 > 0, and 0 (clean data) at the end: S network evaluations for a
sampler that makes one per step. Spacings of a table are rising 0-based indices, as in the published codes; index i is
time i + 1 of the table, whose row 0 is clean. The other spacings work on every schedule, and on a table may visit
times between two rows.
"""

import math
from abc import ABC, abstractmethod
from itertools import accumulate, repeat

import torch
from torch import Tensor

from .schedule import DiscreteSchedule, Schedule


class Spacing(ABC):
    """A rule that picks a schedule's times.

    Attributes:
        whole_rows: whether it visits only the rows of a table, which limits the steps to T.
    """

    whole_rows = False

    @abstractmethod
    def times(self, schedule: Schedule, steps: int) -> Tensor:
        """The falling times before clean data, float64: `steps` of them, or fewer where the rule repeats some."""

    def __call__(self, schedule: Schedule, steps: int) -> Tensor:
        """The times to visit.

        Args:
            schedule: the noise schedule.
            steps: S, the number of steps, at least 1.

        Returns:
            S + 1 falling times, float64, the last of them 0; fewer where the rule repeats some.

        Raises:
            ValueError: steps is out of range, or the rule does not fit the schedule or would repeat many times.
        """
        if self.whole_rows and isinstance(schedule, DiscreteSchedule):
            if not 1 <= steps <= schedule.T:
                raise ValueError(f"steps must be in [1, {schedule.T}], the schedule's T; got {steps}")
        elif steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return torch.cat([self.times(schedule, steps), torch.zeros(1, dtype=torch.float64)])


class IndexSpacing(Spacing):
    """A rule for the rows of a table.

    Rows that the rule repeats are visited once. Where more than a tenth are repeated it is refused, since the run would
    have far fewer steps than requested.
    """

    whole_rows = True

    def times(self, schedule, steps):
        name = type(self).__name__.lower()
        if not isinstance(schedule, DiscreteSchedule):
            raise ValueError(
                f"steps of a continuous schedule cannot be spaced by {name}, which picks rows of a table: choose"
                " spacing=trailing, uniform_time, quadratic_time, uniform_log_snr or karras"
            )
        distinct = sorted(set(self.indices(schedule.T, steps)), reverse=True)
        if len(distinct) < 0.9 * steps:
            raise ValueError(
                f"steps={steps} with {name} spacing visits only {len(distinct)} distinct times: choose fewer steps"
                " or another spacing"
            )
        return torch.tensor(distinct).double() + 1

    @abstractmethod
    def indices(self, T: int, steps: int) -> list[int]:
        """0-based indices in [0, T - 1]."""


class Leading(IndexSpacing):
    """i floor(T/S): the "linear" sub-sequence of DDIM (Song et al. 2021, app. D.2) wherever S divides T.

    Starts below pure noise: the largest index is T - T/S. diffusers' "leading" with offset 0.
    """

    def indices(self, T, steps):
        return [i * (T // steps) for i in range(steps)]


class Linspace(IndexSpacing):
    """round(linspace(0, T - 1, S)): both the first and the last step (diffusers' "linspace").

    The same as improved DDPM with one section, except for some S where a half is rounded differently (`Sections`).
    """

    def indices(self, T, steps):
        return [round(v) for v in _linspace(T - 1, steps)]


class Quadratic(IndexSpacing):
    """floor(linspace(0, sqrt(0.8 T), S)^2): DDIM's sub-sequence for CIFAR-10 (Song et al. 2021, app. D.2).

    From S = 50 at T = 1000 the smallest indices repeat: 49 are distinct there, 96 at S = 100. DDIM's code evaluates
    the network again at each repetition, without moving; here they are visited once, with the same images.
    `QuadraticTime` is the grid of continuous schedules.
    """

    def indices(self, T, steps):
        return [int(v**2) for v in _linspace((T * 0.8) ** 0.5, steps)]


class Sections(IndexSpacing):
    """Sections of the table with a number of steps each (improved DDPM, Nichol & Dhariwal 2021, sec. 4).

    "10,15,20" splits the table into three parts, nearly equal, and takes that many steps of each, evenly with
    both ends. "ddim25" takes every k-th step from the first, with the whole number k that gives exactly 25.

    Args:
        sections: the numbers, or "ddim" and one number, which add up to the number of steps; None for one section, or
            "ddim" alone for one stride, of all the steps.

    Raises:
        ValueError: sections is malformed.
    """

    def __init__(self, sections: str | int | None = None):
        text = str(sections)
        self.strided = text.startswith("ddim")
        self.counts: list[int] = []
        if sections is None or text == "ddim":
            return
        try:
            self.counts = [int(count) for count in text.removeprefix("ddim").split(",")]
        except ValueError:
            self.counts = [0]
        if min(self.counts) < 1 or (self.strided and len(self.counts) > 1):
            raise ValueError(
                f'sections must read like "10,15,20" or "ddim25" (null or "ddim" for all steps), got "{text}"'
            )

    def indices(self, T, steps):
        counts = self.counts or [steps]
        if steps != sum(counts):
            raise ValueError(f"steps must be {sum(counts)}, the sum of spacing.sections; got {steps}")
        if self.strided:
            return self._strided(T, steps)
        indices, start = [], 0
        for part, count in enumerate(counts):
            size = T // len(counts) + (part < T % len(counts))
            if count > size:
                raise ValueError(f"steps of section {part + 1} must be at most its {size} times, got {count}")
            # running sums, as in the published code: the rounding of halves depends on the last bit
            stride = (size - 1) / (count - 1) if count > 1 else 0.0
            indices += [start + round(place) for place in accumulate(repeat(stride, count - 1), initial=0.0)]
            start += size
        return indices

    def _strided(self, T: int, steps: int) -> list[int]:
        strides = {len(range(0, T, k)): k for k in range(T, 0, -1)}
        if steps not in strides:
            near = sorted(strides, key=lambda count: (abs(count - steps), count))[:2]
            raise ValueError(
                f"steps={steps}: no whole stride visits that many of {T} times; choose {min(near)} or {max(near)}"
            )
        return list(range(0, T, strides[steps]))


class Trailing(Spacing):
    """round(T (S - i)/S) from the last step down (Lin et al. 2023, arXiv:2305.08891, table 2): includes T.

    On a continuous schedule t_max (1 - i/S), the usual grid of flow models.
    """

    whole_rows = True

    def times(self, schedule, steps):
        if isinstance(schedule, DiscreteSchedule):
            T = schedule.T
            return torch.tensor([round(T * (steps - i) / steps) for i in range(steps)]).double()
        if schedule.t_max / steps < schedule.t_min:
            raise ValueError(
                f"steps={steps} of trailing spacing end at {schedule.t_max / steps:.3g}, below the schedule's t_min"
                f" {schedule.t_min:g}: choose spacing=uniform_time"
            )
        return schedule.t_max * torch.arange(steps, 0, -1).double() / steps


class EvenSpacing(Spacing):
    """A grid that is even in something, from t_max to the last time before clean data, both included.

    Args:
        end: the last time as a share of t_max, e.g. the 1e-3 of score SDE's and DPM-Solver's codes; where it is below
            the schedule's t_min, t_min is taken.

    Raises:
        ValueError: end is not in [0, 1).
    """

    def __init__(self, end: float = 0.0):
        if not 0 <= end < 1:
            raise ValueError(f"end must be in [0, 1), got {end}")
        self.end = end

    def last(self, schedule: Schedule) -> float:
        """The last time before clean data."""
        return max(schedule.t_min, self.end * schedule.t_max)


class UniformTime(EvenSpacing):
    """Evenly in time; one step starts at t_max."""

    def times(self, schedule, steps):
        return torch.linspace(schedule.t_max, self.last(schedule), steps, dtype=torch.float64)


class QuadraticTime(EvenSpacing):
    """Evenly in sqrt(t), denser near the data: "time_quadratic" of DPM-Solver's code; one step starts at t_max.

    DDIM's quadratic sub-sequence without its factor 0.8 and its rounding to rows.
    """

    def times(self, schedule, steps):
        ends = [time**0.5 for time in (schedule.t_max, self.last(schedule))]
        times = torch.linspace(*ends, steps, dtype=torch.float64) ** 2
        return times.clamp(self.last(schedule), schedule.t_max)  # rounding


class UniformLogSNR(EvenSpacing):
    """Evenly in ln(alpha/sigma): DPM-Solver's grid (Lu et al. 2022, arXiv:2206.00927)."""

    def times(self, schedule, steps):
        ends = _log_snr_range(schedule, self.last(schedule))
        return schedule.nearest_time(torch.linspace(*ends, steps, dtype=torch.float64))


class Karras(Spacing):
    """Evenly in (sigma/alpha)^(1/rho) (Karras et al. 2022, arXiv:2206.00364, eq. 5), rho = 7 in the paper.

    Args:
        rho: larger means denser near the data; rho = 1 is even in sigma/alpha.
        sigma_min: the last sigma/alpha before clean data; None for the schedule's smallest.
        sigma_max: the first; None for the schedule's largest.

    Raises:
        ValueError: a number is not positive, or the range is empty.
    """

    def __init__(self, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None):
        if rho <= 0:
            raise ValueError(f"rho must be positive, got {rho}")
        if sigma_min is not None and sigma_min <= 0:
            raise ValueError(f"sigma_min must be positive, got {sigma_min}")
        if sigma_max is not None and sigma_max <= (sigma_min or 0):
            raise ValueError(f"sigma_max must be above sigma_min and 0, got {sigma_max}")
        self.rho, self.sigma_min, self.sigma_max = rho, sigma_min, sigma_max

    def times(self, schedule, steps):
        first, last = _log_snr_range(schedule, schedule.t_min, self.sigma_max, self.sigma_min)
        ends = torch.tensor([-first, -last], dtype=torch.float64).div(self.rho).exp().tolist()
        return schedule.nearest_time(-self.rho * torch.linspace(*ends, steps, dtype=torch.float64).log())


def _log_snr_range(
    schedule: Schedule, last_time: float, sigma_max: float | None = None, sigma_min: float | None = None
) -> tuple[float, float]:
    """ln(alpha/sigma) of the first and the last time before clean data; checked, so that rounding alone leaves it."""
    first, last = schedule(torch.tensor([schedule.t_max, last_time], dtype=torch.float64)).scalars()
    slack = 1e-6
    for name, value in (("sigma_max", sigma_max), ("sigma_min", sigma_min)):
        if value is not None and not last.log_snr + slack >= -math.log(value) >= first.log_snr - slack:
            raise ValueError(
                f"steps need spacing.{name} in [{math.exp(-last.log_snr):.4g}, {math.exp(-first.log_snr):.4g}],"
                f" the schedule's range of sigma/alpha; got {value:g}"
            )
    start = first.log_snr if sigma_max is None else -math.log(sigma_max)
    if math.isinf(start):
        raise ValueError(
            "steps cannot be spaced in log-SNR from pure noise (alpha 0): choose spacing=trailing or uniform_time"
        )
    return start, last.log_snr if sigma_min is None else -math.log(sigma_min)


def _linspace(stop: float, num: int) -> list[float]:
    """num values from 0 to stop in numpy's order of operations, since truncation depends on the last bit."""
    if num == 1:
        return [0.0]
    step = stop / (num - 1)
    return [i * step for i in range(num - 1)] + [stop]
