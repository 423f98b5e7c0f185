"""Parameterisations: how the network's output F determines x0, by three coefficients per noise level.

    x0_hat = c_skip x_t + c_out F(c_in x_t, label),    eps_hat = (x_t - alpha_t x0_hat) / sigma_t

The training target of F is (x0 - c_skip x_t) / c_out (Karras et al. 2022, arXiv:2206.00364, eq. 7).

Each parameterisation was published for one kind of schedule. c_in scales x_t to the coordinates of that kind, where it
is 1, so that every parameterisation is defined on every schedule: at equal SNR, all schedules give the network the
same input and result in the same x0.
"""

from abc import ABC, abstractmethod
from functools import cached_property

from torch import Tensor

from .noise_level import NoiseLevel, as_times, broadcast, clamp, linear_combination
from .schedule import Schedule


class Prediction:
    """A denoiser's estimates of x0 and eps, both computed from one tensor F.

        x0 = c_skip x_t + c_out F,    x_t = alpha_t x0 + sigma_t eps

    Both are computed from F on first use. So they are consistent, and eps has no rounding errors of x0 divided by a
    small sigma.

    Args:
        x_t: the noisy images, shape (B, C, H, W).
        level: the noise level of x_t.
        output: F, x_t's shape.
        c_skip, c_out: coefficients with the level's shape; by default F is x0.
        variance: the network's output for a learned variance, x_t's shape, or None.
    """

    def __init__(
        self,
        x_t: Tensor,
        level: NoiseLevel,
        output: Tensor,
        c_skip: Tensor | float = 0.0,
        c_out: Tensor | float = 1.0,
        variance: Tensor | None = None,
    ):
        self.x_t, self.level, self.variance = x_t, level, variance
        self._output, self._c_skip, self._c_out = output, c_skip, c_out

    @cached_property
    def x0(self) -> Tensor:
        """Estimate of the clean images, nominally in [-1, 1], shape (B, C, H, W)."""
        is_output = isinstance(self._c_out, float) and (self._c_skip, self._c_out) == (0, 1)
        return self._output if is_output else self.mix(1.0, 0.0)

    @cached_property
    def eps(self) -> Tensor:
        """Estimate of the noise, shape (B, C, H, W)."""
        return self.mix(0.0, 1.0)

    def with_variance(self, variance: Tensor) -> "Prediction":
        """A copy with the network's output for the variance."""
        return Prediction(self.x_t, self.level, self._output, self._c_skip, self._c_out, variance)

    def mix(self, of_x0: Tensor | float, of_eps: Tensor | float) -> Tensor:
        """of_x0 x0 + of_eps eps as a new tensor, computed directly from x_t and F."""
        alpha, sigma = self.level.alpha, self.level.sigma
        of_x0 = of_x0 - of_eps * alpha / sigma
        of_x_t = of_eps / sigma + of_x0 * self._c_skip
        return linear_combination(of_x_t, self.x_t, of_x0 * self._c_out, self._output)

    @property
    def output(self) -> Tensor:
        """F, shape (B, C, H, W)."""
        return self._output

    def with_output(self, output: Tensor) -> "Prediction":
        """A copy with another F, whose coefficients are the same."""
        return Prediction(self.x_t, self.level, output, self._c_skip, self._c_out, self.variance)

    def shift_of(self, difference: Tensor) -> Tensor:
        """The change of x0 that belongs to a change of F, shape (B, C, H, W)."""
        return broadcast(self._c_out, difference) * difference

    def with_shift(self, shift: Tensor) -> "Prediction":
        """A copy with x0 + shift and the corresponding eps; shift has x_t's shape, and c_out is not 0."""
        return self.with_output(self._output + shift / broadcast(self._c_out, shift))

    def output_as(self, other: "Prediction") -> Tensor:
        """The F of this x0 and eps in the parameterisation of another prediction of the same x_t and level."""
        if isinstance(self._c_out, float) and (self._c_skip, self._c_out) == (other._c_skip, other._c_out):
            return self._output
        # from x0 = c_skip (alpha x0 + sigma eps) + c_out F
        return self.mix(
            (1 - other._c_skip * self.level.alpha) / other._c_out,
            -other._c_skip * self.level.sigma / other._c_out,
        )

    def detach(self) -> "Prediction":
        """A copy without a graph."""
        variance = None if self.variance is None else self.variance.detach()
        output = self._output.detach()
        return Prediction(self.x_t.detach(), self.level, output, self._c_skip, self._c_out, variance)

    def chunk(self, parts: int) -> list["Prediction"]:
        """The predictions of equal parts of the batch, whose level is one for all images."""
        variances = [None] * parts if self.variance is None else self.variance.chunk(parts)
        pieces = zip(self.x_t.chunk(parts), self._output.chunk(parts), variances, strict=True)
        return [Prediction(x_t, self.level, F, self._c_skip, self._c_out, v) for x_t, F, v in pieces]

    def with_x0(self, x0: Tensor) -> "Prediction":
        """A copy with another x0 and the corresponding eps."""
        return Prediction(self.x_t, self.level, x0, variance=self.variance)


class Parameterization(ABC):
    """Defines how the network's output determines x0.

    Attributes:
        sees_pure_noise: whether the output determines x0 at alpha = 0.
    """

    sees_pure_noise = True

    @abstractmethod
    def coefficients(self, level: NoiseLevel) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """c_in, c_skip and c_out at this level, each with the level's shape."""

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
        """The training target of F for images x0 and noise eps, both (B, C, H, W)."""

    def label(self, level: NoiseLevel) -> Tensor | float:
        """The time passed to the network, with the level's shape; by default the schedule's label."""
        return level.label

    def check(self, schedule: Schedule) -> None:
        """Checks that the parameterisation is defined on a schedule.

        Raises:
            ValueError: the output does not determine x0 at the schedule's end.
        """
        if not self.sees_pure_noise and schedule(as_times([schedule.t_max])).alpha.item() == 0:
            raise ValueError(
                f"parameterization={type(self).__name__.lower()} does not determine x0 where alpha is 0, at the end"
                f" of {type(schedule).__name__}: choose parameterization=v, velocity, x0 or edm"
            )

    def predict(self, x_t: Tensor, output: Tensor, level: NoiseLevel) -> Prediction:
        """The prediction from the network's output at x_t; both (B, C, H, W)."""
        _, c_skip, c_out = self.coefficients(level)
        return Prediction(x_t, level, output, c_skip, c_out)


def _norm(level: NoiseLevel) -> Tensor | float:
    """sqrt(alpha^2 + sigma^2); 1 for variance-preserving schedules."""
    return (level.alpha**2 + level.sigma**2) ** 0.5


class Eps(Parameterization):
    """F is the noise: c_in = 1, c_skip = 1/alpha, c_out = -sigma/alpha (DDPM, Ho et al. 2020, eq. 11).

    On other than variance-preserving schedules c_in = 1/sqrt(alpha^2 + sigma^2).
    """

    sees_pure_noise = False

    def coefficients(self, level):
        return 1 / _norm(level), 1 / level.alpha, -level.sigma / level.alpha

    def target(self, x0, eps, level):
        return eps


class Score(Parameterization):
    """F is the score -eps/sigma of p(x_t): c_in = 1, c_skip = 1/alpha, c_out = sigma^2/alpha.

    Score SDE (Song et al. 2021, arXiv:2011.13456, eq. 7). Its loss weight sigma^2 on the score is `weighting=snr`; with
    `weighting=simple`, the smallest sigma dominates the loss. On other than variance-preserving schedules
    c_in = 1/sqrt(alpha^2 + sigma^2).
    """

    sees_pure_noise = False

    def coefficients(self, level):
        return 1 / _norm(level), 1 / level.alpha, level.sigma**2 / level.alpha

    def target(self, x0, eps, level):
        return -eps / broadcast(level.sigma, eps)


class X0(Parameterization):
    """F is the image: c_in = 1, c_skip = 0, c_out = 1 (Ho et al. 2020, sec. 3.2).

    On other than variance-preserving schedules c_in = 1/sqrt(alpha^2 + sigma^2).
    """

    def coefficients(self, level):
        return 1 / _norm(level), 0 * level.alpha, 0 * level.alpha + 1

    def target(self, x0, eps, level):
        return x0

    def predict(self, x_t, output, level):
        return Prediction(x_t, level, output)


class V(Parameterization):
    """F is v = alpha eps - sigma x0: c_in = 1, c_skip = alpha, c_out = -sigma.

    Progressive distillation (Salimans & Ho 2022, arXiv:2202.00512, app. D), where alpha^2 + sigma^2 = r^2 = 1.
    On other schedules the coordinates are x_t/r: c_in = 1/r, c_skip = alpha/r^2, c_out = -sigma/r, and
    v = (alpha eps - sigma x0)/r.
    """

    def coefficients(self, level):
        r = _norm(level)
        return 1 / r, level.alpha / r**2, -level.sigma / r

    def target(self, x0, eps, level):
        r = _norm(level)
        return broadcast(level.alpha / r, x0) * eps - broadcast(level.sigma / r, x0) * x0


class Velocity(Parameterization):
    """F is the flow's velocity eps - x0 = dx_t/dt: c_in = 1, c_skip = 1, c_out = -sigma.

    Flow matching and rectified flow (Lipman et al. 2023, arXiv:2210.02747, eq. 23; Liu et al. 2023), where
    r = alpha + sigma = 1. On other schedules the coordinates are x_t/r: c_in = c_skip = 1/r, c_out = -sigma/r.
    """

    def coefficients(self, level):
        r = level.alpha + level.sigma
        return 1 / r, 1 / r, -level.sigma / r

    def target(self, x0, eps, level):
        return eps - x0


class EDM(Parameterization):
    """Preconditioning to unit variance of input and target (Karras et al. 2022, arXiv:2206.00364, table 1).

        c_in = 1/r,   c_skip = alpha sigma_data^2/r^2,   c_out = sigma sigma_data/r,
        r^2 = sigma^2 + alpha^2 sigma_data^2,   label = ln(sigma/alpha)/4

    The paper has alpha = 1; other schedules are rescaled by x_t/alpha. In the label |ln(sigma/alpha)| is clamped to 20,
    so that it is finite for pure noise.

    Args:
        sigma_data: standard deviation of the data; 0.5 for CIFAR-10 in [-1, 1].

    Raises:
        ValueError: sigma_data is not positive.
    """

    def __init__(self, sigma_data: float = 0.5):
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.sigma_data = sigma_data

    def coefficients(self, level):
        r = (level.sigma**2 + (level.alpha * self.sigma_data) ** 2) ** 0.5
        return 1 / r, level.alpha * self.sigma_data**2 / r**2, level.sigma * self.sigma_data / r

    def target(self, x0, eps, level):
        # (x0 - c_skip x_t) / c_out, rewritten to avoid cancellation at small sigma
        r = (level.sigma**2 + (level.alpha * self.sigma_data) ** 2) ** 0.5
        of_x0, of_eps = level.sigma / (self.sigma_data * r), level.alpha * self.sigma_data / r
        return broadcast(of_x0, x0) * x0 - broadcast(of_eps, x0) * eps

    def label(self, level):
        return -clamp(level.log_snr, -20.0, 20.0) / 4
