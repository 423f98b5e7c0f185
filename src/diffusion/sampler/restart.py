"""Restart sampling."""

from itertools import pairwise

import torch

from src.errors import UserError

from ..noise_level import NoiseLevel, conditional_variance
from ..schedule import Schedule
from .base import Path, Sampler, check_memoryless, weighted_sum


class Restart(Sampler):
    """Adds noise and solves the ODE again over one interval (Xu et al. 2023, arXiv:2306.14878, alg. 1 and 2).

    After the step to the level nearest to sigma_min, forward noise raises the images to sigma_max, and
    `restart_steps` solver steps on a Karras grid lead back. This is repeated `repeats` times. For several intervals,
    use a Restart as the solver of another; restarts of one interval are not repeated within those of the other.

    Args:
        solver: a single-step sampler, Heun in the paper.
        sigma_min, sigma_max: the interval, in sigma/alpha (0.06 to 0.30 for CIFAR-10 at 43 evaluations).
        restart_steps: solver steps per restart, one less than the paper's number of grid points.
        repeats: K, the number of restarts.
        rho: rho of the Karras grid.

    Raises:
        ValueError: an argument is out of range, or the solver is a multi-step method.
        UserError: when sampling, the steps are too coarse for the interval, or it leaves the schedule's range.
    """

    def __init__(
        self,
        solver: Sampler,
        sigma_min: float = 0.06,
        sigma_max: float = 0.30,
        restart_steps: int = 2,
        repeats: int = 2,
        rho: float = 7.0,
    ):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min must be in (0, sigma_max), got {sigma_min} and {sigma_max}")
        for name, value in (("restart_steps", restart_steps), ("repeats", repeats)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.solver = check_memoryless(solver, "solver")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.restart_steps, self.repeats, self.rho = restart_steps, repeats, rho

    def step(self, denoiser, x_t, t, s, noise, path):
        state = self.solver.step(denoiser, x_t, t, s, noise, path)
        if path.detour or path.index + 1 != self._bottom(path):
            return state
        if s.sigma / s.alpha >= self.sigma_max:
            raise UserError(
                f"sampler.sigma_max={self.sigma_max:g} is below {s.sigma / s.alpha:.3g}, the visited level nearest to"
                " sigma_min: choose more sampler.steps, or another spacing"
            )
        interval = self._interval(denoiser.schedule, s, path.times[path.index + 1])
        top = interval.levels[0]
        x = state.x
        for _ in range(self.repeats):
            std = conditional_variance(top, s) ** 0.5
            x = weighted_sum((top.alpha / s.alpha, x), (std, noise(x)))
            for index, (high, low) in enumerate(pairwise(interval.levels)):
                place = Path(interval.times, interval.levels, index, detour=True)
                state = self.solver.step(denoiser, x, high, low, noise, place)
                x = state.x
        return state

    def _bottom(self, path: Path) -> int:
        """Index of the interval's lower level: the nearest to sigma_min, excluding the first and the clean one."""
        distance = {
            i: abs(level.sigma / level.alpha - self.sigma_min)
            for i, level in enumerate(path.levels)
            if i > 0 and level.sigma > 0
        }
        return min(distance, key=distance.get, default=0)

    def _interval(self, schedule: Schedule, bottom: NoiseLevel, time: float) -> Path:
        """The Karras grid from sigma_max down to `bottom`, the level at `time`."""
        (noisiest,) = schedule([schedule.t_max]).scalars()
        if self.sigma_max * noisiest.alpha > noisiest.sigma * (1 + 1e-6):
            raise UserError(
                f"sampler.sigma_max={self.sigma_max:g} is above {noisiest.sigma / noisiest.alpha:.4g}, the schedule's"
                " largest sigma/alpha: lower it"
            )
        ends = [sigma ** (1 / self.rho) for sigma in (self.sigma_max, bottom.sigma / bottom.alpha)]
        grid = torch.linspace(*ends, self.restart_steps + 1, dtype=torch.float64)[:-1]
        times = [*schedule.nearest_time(-self.rho * grid.log(), time).tolist(), time]
        return Path(times, schedule(times).scalars())
