"""Distributions of training times."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from .schedule import Schedule


class TimeSampling(ABC):
    """A distribution of training times."""

    @abstractmethod
    def __call__(self, n: int, schedule: Schedule, generator: torch.Generator) -> Tensor:
        """The times of a global batch, shape (n,), float64, from a CPU generator."""

    def weights(self, t: Tensor, schedule: Schedule) -> Tensor | None:
        """Importance weights of the losses at times t, shape (B,), relative to `expected`; None if all are 1."""
        return None

    def expected(self) -> "TimeSampling":
        """The fixed distribution under which the expected loss is minimised; validation uses it."""
        return self


class AdaptiveTimeSampling(TimeSampling):
    """A distribution that adapts to the losses."""

    @abstractmethod
    def update(self, t: Tensor, losses: Tensor, schedule: Schedule) -> None:
        """Updates the distribution from a global batch, which must be in the same order on all ranks.

        Args:
            t: times, shape (n,), on the CPU.
            losses: losses at these times, without importance weights, shape (n,), on the CPU.
            schedule: the schedule of the times.
        """


class Uniform(TimeSampling):
    """Uniform over the schedule's times: t in {1, ..., T} for a discrete one (Ho et al. 2020, alg. 1)."""

    def __call__(self, n, schedule, generator):
        return schedule.time_at(torch.rand(n, dtype=torch.float64, generator=generator))


class Stratified(TimeSampling):
    """Uniform, with one draw in each of n equal bins: the same expected loss with less variance.

    The low-discrepancy sampler of variational diffusion models (Kingma et al. 2021, arXiv:2107.00630, app. I.1)
    uses one draw for all bins. The bins are shuffled, so that each device gets all noise levels.
    """

    def __call__(self, n, schedule, generator):
        bins = torch.randperm(n, generator=generator)
        return schedule.time_at((bins + torch.rand(n, dtype=torch.float64, generator=generator)) / n)


class LogNormal(TimeSampling):
    """ln(sigma/alpha) ~ N(mean, std^2), EDM's choice (Karras et al. 2022, arXiv:2206.00364, table 1).

    Draws outside the schedule's range are clamped; on a table the nearest row is used.

    Args:
        mean: mean of ln(sigma/alpha); -1.2 in the paper.
        std: standard deviation of ln(sigma/alpha); 1.2 in the paper.

    Raises:
        ValueError: std is not positive.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2):
        _check_std(std)
        self.mean, self.std = mean, std

    def __call__(self, n, schedule, generator):
        log_sigma = self.mean + self.std * torch.randn(n, dtype=torch.float64, generator=generator)
        return schedule.time_at(schedule.quantile(schedule.nearest_time(-log_sigma)))


class LogitNormal(TimeSampling):
    """logit(u) ~ N(mean, std^2), where u is the quantile of t among the schedule's times.

    Stable Diffusion 3's choice for rectified flow (Esser et al. 2024, arXiv:2403.03206, eq. 19).

    Args:
        mean: mean of logit(u), 0 in the paper; positive values favour noise.
        std: standard deviation of logit(u); 1 in the paper.

    Raises:
        ValueError: std is not positive.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        _check_std(std)
        self.mean, self.std = mean, std

    def __call__(self, n, schedule, generator):
        logit = self.mean + self.std * torch.randn(n, dtype=torch.float64, generator=generator)
        return schedule.time_at(torch.sigmoid(logit).clamp(max=1 - 1e-12))


class Importance(AdaptiveTimeSampling, nn.Module):
    """p_t ~ sqrt(E[L_t^2]) over the last losses of each time: minimises the variance of the variational bound.

    Improved DDPM (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 18). Uniform until every bin has a full history. The
    state is the same on all ranks, since `update` gets the losses of the global batch, and is saved in checkpoints.

    Args:
        bins: number of equal bins of the time range, each with one probability; T for a discrete schedule.
        history: number of losses kept per bin.
        uniform: fraction of the uniform distribution that is mixed in.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, bins: int = 1000, history: int = 10, uniform: float = 0.001):
        super().__init__()
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        if history < 1:
            raise ValueError(f"history must be at least 1, got {history}")
        if not 0 < uniform <= 1:
            raise ValueError(f"uniform must be in (0, 1], got {uniform}")
        self.bins, self.uniform = bins, uniform
        # no buffers: these stay on the CPU, where the times are drawn
        self.losses = torch.zeros(bins, history, dtype=torch.float64)
        self.seen = torch.zeros(bins, dtype=torch.long)

    def __call__(self, n, schedule, generator):
        chosen = torch.multinomial(self.probabilities(), n, replacement=True, generator=generator)
        within = torch.rand(n, dtype=torch.float64, generator=generator)
        return schedule.time_at((chosen + within) / self.bins)

    def probabilities(self) -> Tensor:
        """The probability of each bin, shape (bins,), float64."""
        uniform = torch.full((self.bins,), 1 / self.bins, dtype=torch.float64)
        if (self.seen < self.losses.shape[1]).any():
            return uniform
        p = self.losses.square().mean(dim=1).sqrt()
        return torch.lerp(p / p.sum(), uniform, self.uniform)

    def weights(self, t, schedule):
        return 1 / (self.bins * self.probabilities()[self._bin(t, schedule)])

    def update(self, t, losses, schedule):
        history = self.losses.shape[1]
        for place, loss in zip(self._bin(t, schedule).tolist(), losses.tolist(), strict=True):
            self.losses[place, int(self.seen[place]) % history] = loss
            self.seen[place] += 1

    def expected(self):
        return Uniform()

    def get_extra_state(self) -> dict[str, Any]:
        return {"losses": self.losses, "seen": self.seen}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.losses, self.seen = state["losses"].cpu(), state["seen"].cpu()

    def _bin(self, t: Tensor, schedule: Schedule) -> Tensor:
        return (schedule.quantile(t) * self.bins).long().clamp(0, self.bins - 1)


def _check_std(std: float) -> None:
    if std <= 0:
        raise ValueError(f"std must be positive, got {std}")
