"""The interface of schedules, and the table that all discrete schedules share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..noise_level import NoiseLevel, as_times


class Schedule(ABC):
    """Maps times to noise levels. The noise increases with t; t = 0 is clean data.

    Attributes:
        t_min: the smallest time used in training and by the spacings.
        t_max: the largest time.
        straight: whether alpha and sigma are both linear in t, so that x_t moves along a straight line.
    """

    t_min: float
    t_max: float
    straight = False

    @abstractmethod
    def __call__(self, t: Tensor | Sequence[float]) -> NoiseLevel:
        """The noise levels at times t.

        Args:
            t: any shape; 0 (clean) or in [t_min, t_max]. Continuous schedules also accept times in (0, t_min).

        Returns:
            float64 tensors of t's shape, on the CPU.

        Raises:
            ValueError: a time is out of range.
        """

    @abstractmethod
    def time_of_log_snr(self, log_snr: Tensor | Sequence[float]) -> Tensor:
        """The inverse of `self(t).log_snr`, float64, with the argument's shape, not clamped.

        For continuous schedules the result may be below t_min or above t_max.

        Raises:
            ValueError: the value is outside the range of a table.
        """

    def nearest_time(self, log_snr: Tensor | Sequence[float], lowest: float = math.inf) -> Tensor:
        """The time in [min(lowest, t_min), t_max] whose ln(alpha / sigma) is nearest to the argument, float64."""
        return self.time_of_log_snr(log_snr).clamp(min(lowest, self.t_min), self.t_max)

    @abstractmethod
    def drift_and_diffusion(self, t: float) -> tuple[float, float]:
        """f and g^2 of the forward SDE dx = f x dt + g dw at a time with alpha > 0.

            f = d ln(alpha)/dt,    g^2 = d sigma^2/dt - 2 f sigma^2

        Score SDE (Song et al. 2021, arXiv:2011.13456, eq. 5), written for any alpha and sigma.
        """

    @abstractmethod
    def time_at(self, u: Tensor) -> Tensor:
        """The quantile function of the uniform distribution over the training times: u in [0, 1) -> t."""

    @abstractmethod
    def quantile(self, t: Tensor) -> Tensor:
        """The inverse of `time_at`: t -> u in [0, 1].

        A time between two rows of a table is rounded to the nearest row: time_at(quantile(t)) is the training time
        nearest to t.
        """


class DiscreteSchedule(Schedule):
    """A variance-preserving table: alpha_t = sqrt(alphabar_t), sigma_t = sqrt(1 - alphabar_t), t = 0, 1, ..., T.

    Row 0 is the clean image (alphabar 1); rows 1..T are DDPM's x_1..x_T (Ho et al. 2020, arXiv:2006.11239, eq. 4).
    The network's label is t - 1, the index used by published checkpoints. Between two rows, where higher-order
    solvers evaluate the network, the log-SNR is interpolated linearly.

    Args:
        alphabar: alphabar_1 ... alphabar_T, shape (T,), float64, strictly decreasing, in [0, 1).

    Raises:
        ValueError: the table is empty or not strictly decreasing.
    """

    def __init__(self, alphabar: Tensor):
        alphabar = torch.cat([torch.ones(1, dtype=torch.float64), alphabar.double()])
        if alphabar.numel() < 2 or not (alphabar.diff() < 0).all() or alphabar[-1] < 0:
            raise ValueError(
                "T and the noise range must give an alphabar that decreases strictly from 1 towards 0"
            )
        self.alphabar = alphabar
        self._alpha, self._sigma = alphabar.sqrt(), (1 - alphabar).sqrt()
        self.T = alphabar.numel() - 1
        self.t_min, self.t_max = 1.0, float(self.T)
        self.log_snr = (alphabar.log() - (1 - alphabar).log()) / 2
        if alphabar[-1] == 0 and self.T > 1:
            # pure noise: a finite value, to interpolate between the last two rows
            self.log_snr[-1] = self.log_snr[-2] - 10

    @property
    def beta(self) -> Tensor:
        """beta_1 ... beta_T of q(x_t | x_{t-1}), shape (T,)."""
        return 1 - self.alphabar[1:] / self.alphabar[:-1]

    def __call__(self, t: Tensor | Sequence[float]) -> NoiseLevel:
        t = as_times(t)
        low, high = (bound.item() for bound in t.aminmax()) if t.numel() else (1.0, 1.0)
        # the elements are compared only if some are below 1
        if high > self.T or low < 0 or (low < 1 and ((t > 0) & (t < 1)).any()):
            raise ValueError(f"times must be 0 (clean) or in [1, {self.T}], got {t.min():g} to {t.max():g}")
        row = t.long()
        between = t - row
        if not between.any():  # as in training
            return NoiseLevel(self._alpha[row], self._sigma[row], t - 1)
        log_snr = torch.lerp(self.log_snr[row], self.log_snr[(row + 1).clamp(max=self.T)], between)
        alphabar = torch.where(between > 0, torch.sigmoid(2 * log_snr), self.alphabar[row])
        return NoiseLevel(alphabar.sqrt(), (1 - alphabar).sqrt(), t - 1)

    def time_of_log_snr(self, log_snr: Tensor | Sequence[float]) -> Tensor:
        log_snr = as_times(log_snr)
        low, high = -math.inf if self.alphabar[-1] == 0 else self.log_snr[-1].item(), self.log_snr[1].item()
        if ((log_snr < low - 1e-6) | (log_snr > high + 1e-6)).any():  # 1e-6 for rounding
            raise ValueError(
                f"log_snr must be in [{low:.4g}, {high:.4g}], the range of {type(self).__name__}'s table, got"
                f" {log_snr.min():.4g} to {log_snr.max():.4g}"
            )
        return self.nearest_time(log_snr)

    def nearest_time(self, log_snr: Tensor | Sequence[float], lowest: float = math.inf) -> Tensor:
        rising = -self.log_snr[1:]
        wanted = -as_times(log_snr)
        if self.T == 1:
            return torch.ones_like(wanted)
        above = torch.searchsorted(rising, wanted).clamp(1, self.T - 1)
        low, high = rising[above - 1], rising[above]
        return above + ((wanted - low) / (high - low)).clamp(0, 1)

    def drift_and_diffusion(self, t: float) -> tuple[float, float]:
        # central differences between the neighbours of a row, or between the two rows around t
        low, high = max(math.ceil(t) - 1, 0), min(math.floor(t) + 1, self.T)
        below, level, above = self([low, t, high]).scalars()
        f = (above.alpha - below.alpha) / (high - low) / level.alpha
        return f, (above.sigma**2 - below.sigma**2) / (high - low) - 2 * f * level.sigma**2

    def time_at(self, u: Tensor) -> Tensor:
        return (u * self.T).floor() + 1

    def quantile(self, t: Tensor) -> Tensor:
        return (t - 0.5) / self.T
