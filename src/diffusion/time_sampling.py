"""Which times to train on."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .schedule import Schedule


class TimeSampling(ABC):
    """A distribution of training times."""

    @abstractmethod
    def __call__(self, n: int, schedule: Schedule, generator: torch.Generator) -> Tensor:
        """The times of a whole global batch, shape (n,), float64, from a CPU generator."""


class Uniform(TimeSampling):
    """Uniform over the schedule's times: t in {1, ..., T} for a discrete one (Ho et al. 2020, alg. 1)."""

    def __call__(self, n, schedule, generator):
        return schedule.time_at(torch.rand(n, dtype=torch.float64, generator=generator))
