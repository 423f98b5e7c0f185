"""Spacings: which times a sampler visits.

A spacing returns S + 1 falling times, t_S > ... > t_1 > 0: S network evaluations for a one-evaluation
sampler and clean data at the end. The formulas below give the S indices as the published codes write
them, 0-based and rising; index i is time i + 1 of the table, whose row 0 is clean.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .schedule import DiscreteSchedule, Schedule


class Spacing(ABC):
    """A rule that picks S of a schedule's times."""

    def __call__(self, schedule: Schedule, steps: int) -> Tensor:
        """The times to visit.

        Args:
            schedule: a discrete schedule.
            steps: S, the number of steps, in [1, T].

        Returns:
            S + 1 falling times, float64, the last of them 0.

        Raises:
            ValueError: steps is out of range, or the rule would visit a time twice.
        """
        if not isinstance(schedule, DiscreteSchedule):
            raise ValueError(f"{type(self).__name__} spaces the steps of discrete schedules only")
        if not 1 <= steps <= schedule.T:
            raise ValueError(f"steps must be in [1, {schedule.T}], the schedule's T; got {steps}")
        indices = self.indices(schedule.T, steps)
        distinct = len(set(indices))
        if distinct < steps:
            raise ValueError(
                f"steps={steps} with {type(self).__name__.lower()} spacing visits only {distinct} distinct times:"
                f" choose fewer steps or another spacing"
            )
        return torch.tensor([index + 1.0 for index in reversed(indices)] + [0.0], dtype=torch.float64)

    @abstractmethod
    def indices(self, T: int, steps: int) -> list[int]:
        """The rising 0-based indices in [0, T - 1]."""


class Leading(Spacing):
    """i floor(T/S): the "linear" sub-sequence of DDIM (Song et al. 2021, app. D.2) wherever S divides T.

    Starts below pure noise: the largest index is T - T/S. diffusers' "leading" with offset 0.
    """

    def indices(self, T, steps):
        return [i * (T // steps) for i in range(steps)]


class Trailing(Spacing):
    """round(T - i T/S) - 1 from the last step down (Lin et al. 2023, arXiv:2305.08891, table 2): includes T - 1."""

    def indices(self, T, steps):
        return [round(T - i * (T / steps)) - 1 for i in reversed(range(steps))]


class Linspace(Spacing):
    """round(linspace(0, T - 1, S)): includes both the first and the last step (improved DDPM's respacing)."""

    def indices(self, T, steps):
        return [round(v) for v in _linspace(T - 1, steps)]


class Quadratic(Spacing):
    """floor(linspace(0, sqrt(0.8 T), S)^2): DDIM's sub-sequence for CIFAR-10 (Song et al. 2021, app. D.2)."""

    def indices(self, T, steps):
        return [int(v**2) for v in _linspace((T * 0.8) ** 0.5, steps)]


def _linspace(stop: float, num: int) -> list[float]:
    """num values from 0 to stop in numpy's order of operations, since truncation hangs on the last bit."""
    if num == 1:
        return [0.0]
    step = stop / (num - 1)
    return [i * step for i in range(num - 1)] + [stop]
