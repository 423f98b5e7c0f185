"""Spacings: the times a sampler visits.

A spacing returns decreasing times t_S > ... > t_1 > 0, followed by 0 (clean data): S network evaluations for a sampler
that makes one per step. Index spacings pick rows of a table by 0-based indices, as published code does; index i is
time i + 1 of the table, whose row 0 is clean. The other spacings work on every schedule and may visit times between
two rows of a table.
"""

import math
from abc import ABC, abstractmethod
from itertools import accumulate, repeat

import torch
from torch import Tensor

from .schedule import DiscreteSchedule, Schedule

MOST_STEPS = 1_000_000


class Spacing(ABC):
    """Picks the times to visit on a schedule.

    Attributes:
        whole_rows: whether only rows of a table are visited, which limits the number of steps to T.
    """

    whole_rows = False

    @abstractmethod
    def times(self, schedule: Schedule, steps: int) -> Tensor:
        """The decreasing times before clean data, float64: `steps` of them, or fewer if some would repeat."""

    def __call__(self, schedule: Schedule, steps: int) -> Tensor:
        """The times to visit.

        Args:
            schedule: the noise schedule.
            steps: S, the number of steps, from 1 to `MOST_STEPS`.

        Returns:
            S + 1 decreasing times, float64, the last one 0; fewer if some would repeat.

        Raises:
            ValueError: steps is out of range, the spacing does not support the schedule, or too many times repeat.
        """
        if self.whole_rows and isinstance(schedule, DiscreteSchedule):
            if not 1 <= steps <= schedule.T:
                raise ValueError(f"steps must be in [1, {schedule.T}], the schedule's T; got {steps}")
        elif steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if steps > MOST_STEPS:
            raise ValueError(f"steps must be at most {MOST_STEPS:,}, got {steps}")
        return torch.cat([self.times(schedule, steps), torch.zeros(1, dtype=torch.float64)])


class IndexSpacing(Spacing):
    """A spacing that picks rows of a table.

    Repeated rows are visited once. An error is raised if more than a tenth repeat, since the run would have far fewer
    steps than requested.
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
    """i floor(T/S): the "linear" sub-sequence of DDIM (Song et al. 2021, app. D.2) if S divides T.

    Starts below pure noise: the largest index is T - T/S. diffusers' "leading" with offset 0.
    """

    def indices(self, T, steps):
        return [i * (T // steps) for i in range(steps)]


class Linspace(IndexSpacing):
    """round(linspace(0, T - 1, S)), which includes the first and the last row (diffusers' "linspace").

    Equals improved DDPM with one section, except for some S where a half is rounded differently (`Sections`).
    """

    def indices(self, T, steps):
        return [round(v) for v in _linspace(T - 1, steps)]


class Quadratic(IndexSpacing):
    """floor(linspace(0, sqrt(0.8 T), S)^2): DDIM's sub-sequence for CIFAR-10 (Song et al. 2021, app. D.2).

    At T = 1000 the smallest indices repeat for S >= 50: 49 are distinct at S = 50, 96 at S = 100. DDIM's code evaluates
    the network at each repetition without changing the image; here each index is visited once, with the same result.
    For continuous schedules use `QuadraticTime`.
    """

    def indices(self, T, steps):
        return [int(v**2) for v in _linspace((T * 0.8) ** 0.5, steps)]


class Sections(IndexSpacing):
    """Splits the table into sections with a number of steps each (improved DDPM, Nichol & Dhariwal 2021, sec. 4).

    "10,15,20" splits the table into three nearly equal sections and takes 10, 15 and 20 evenly spaced steps, both
    ends included. "ddim25" takes every k-th row from the first, with the integer k that gives exactly 25 steps.

    Args:
        sections: comma-separated counts whose sum is the number of steps, or "ddim" and the number of steps. None
            means one section; "ddim" alone means one stride with all steps.

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
    """round(T (S - i)/S), i = 0 ... S - 1, which includes T (Lin et al. 2023, arXiv:2305.08891, table 2).

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
    """A grid that is uniform in some variable, from t_max to the last time before clean data, both included.

    Args:
        end: the last time as a fraction of t_max, e.g. 1e-3 in the code of score SDE and DPM-Solver; at least the
            schedule's t_min is used.

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
    """Uniform in time. With one step, the step starts at t_max."""

    def times(self, schedule, steps):
        return torch.linspace(schedule.t_max, self.last(schedule), steps, dtype=torch.float64)


class QuadraticTime(EvenSpacing):
    """Uniform in sqrt(t), denser near the data: "time_quadratic" of DPM-Solver's code.

    DDIM's quadratic sub-sequence without the factor 0.8 and the rounding to rows. With one step, the step starts at
    t_max.
    """

    def times(self, schedule, steps):
        ends = [time**0.5 for time in (schedule.t_max, self.last(schedule))]
        times = torch.linspace(*ends, steps, dtype=torch.float64) ** 2
        return times.clamp(self.last(schedule), schedule.t_max)  # rounding


class UniformLogSNR(EvenSpacing):
    """Uniform in ln(alpha/sigma): DPM-Solver's grid (Lu et al. 2022, arXiv:2206.00927)."""

    def times(self, schedule, steps):
        ends = _log_snr_range(schedule, self.last(schedule))
        return schedule.nearest_time(torch.linspace(*ends, steps, dtype=torch.float64))


class Karras(Spacing):
    """Uniform in (sigma/alpha)^(1/rho) (Karras et al. 2022, arXiv:2206.00364, eq. 5), rho = 7 in the paper.

    Args:
        rho: larger values are denser near the data; rho = 1 is uniform in sigma/alpha.
        sigma_min: the last sigma/alpha before clean data; None for the schedule's smallest.
        sigma_max: the first sigma/alpha; None for the schedule's largest.

    Raises:
        ValueError: an argument is not positive, or the range is empty.
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
    """ln(alpha/sigma) of the first and last time before clean data, checked against the schedule's range."""
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
    """num values from 0 to stop in numpy's order of operations: truncation to rows depends on the last bit."""
    if num == 1:
        return [0.0]
    step = stop / (num - 1)
    return [i * step for i in range(num - 1)] + [stop]
