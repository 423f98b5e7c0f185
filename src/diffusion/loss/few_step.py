"""Losses of few-step models: targets of the average velocity u(x_t, t, s). The algebra is in docs/few_step.md.

mean flow    u - (t - s) (v d/dx + d/dt) u ...  solved for u: target = v - (t - s) (v d/dx + d/dt) u
shortcut     the mean of two half steps
flow matching is the part of both with s = t, whose target is v
"""

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from src.conditioning import Condition

from ..denoiser import BaseDenoiser
from ..flow_map import FlowMap
from ..forward import diffuse
from ..schedule import ContinuousSchedule
from ..spacing import Trailing
from ..time_sampling import AdaptiveTimeSampling, TimeSampling
from .base import Loss


class AverageVelocityLoss(Loss):
    """The error of u(x_t, t, s) of its target, for a share of the images; the target of the others is v at s = t.

        d = mean_pixels (u - target)^2,    gradient of the loss = gradient of d / (D d + constant)^power

    where D is the number of pixels and channels, and the divisor has no gradient. The value is d, so that curves of
    different targets can be compared. With power 0 the loss is the squared error.

    Args:
        denoiser: the denoiser whose network is trained; with a second time.
        time_sampling: the distribution of times.
        share: the expected share of images with s < t, in (0, 1].
        power, constant: of the adaptive weight (Geng et al. 2025, arXiv:2505.13447, eq. 22).

    Raises:
        ValueError: an argument is out of range, or the denoiser is unfit for few-step training.
    """

    name: str

    def __init__(
        self, denoiser: BaseDenoiser, time_sampling: TimeSampling, share: float, power: float, constant: float
    ):
        super().__init__(denoiser)
        check_share(share)
        if power < 0:
            raise ValueError(f"power must be at least 0, got {power}")
        if constant <= 0:
            raise ValueError(f"constant must be positive, got {constant}")
        check_denoiser(denoiser, self.name)
        check_fixed(time_sampling, self.name)
        self.time_sampling, self.share, self.power, self.constant = time_sampling, share, power, constant
        self.flow_map = FlowMap(denoiser, f"loss={self.name}")

    def forward(self, x0, draws, eps, condition=None):
        t, s = draws[:, 0], draws[:, 1]
        x_t = diffuse(x0, eps, self.denoiser.schedule(t))
        v = self.flow_map.velocity(x0, eps)
        errors, order = [], []
        for part, moves in ((self._still, False), (self.pair, True)):
            rows = torch.nonzero((t > s) == moves)[:, 0]  # on the CPU, where the times are
            if len(rows) == 0:
                continue
            on = rows.to(x_t.device, non_blocking=True)
            of_part = None if condition is None else condition.index(on)
            output, target = part(x_t[on], t[rows], s[rows], v[on], of_part)
            errors.append((output - target).square().flatten(1).mean(dim=1))
            order.append(rows)
        order = torch.cat(order).argsort().to(x_t.device, non_blocking=True)
        error = torch.cat(errors)[order]
        weight = 1 / (error.detach() * x0[0].numel() + self.constant) ** self.power
        # the value stays the error: weighted by its own inverse it would be nearly constant
        return error.detach() + weight * (error - error.detach())

    def _still(self, x_t, t, s, velocity, condition) -> tuple[Tensor, Tensor]:
        return self.flow_map(x_t, t, t, condition), velocity

    @abstractmethod
    def pair(
        self, x_t: Tensor, t: Tensor, s: Tensor, velocity: Tensor, condition: Condition | None
    ) -> tuple[Tensor, Tensor]:
        """u and its target, without a gradient, for images with s < t.

        Args:
            x_t: noisy images, shape (B, C, H, W).
            t, s: their times, float64, shape (B,), on the CPU.
            velocity: alpha' x0 + sigma' eps, x_t's shape.
            condition: their condition, or None.
        """


class MeanFlowLoss(AverageVelocityLoss):
    """MeanFlow: target = v - (t - s) (v d/dx + d/dt) u (Geng et al. 2025, arXiv:2505.13447, eq. 9 to 11).

    t and s are the larger and the smaller of two drawn times. The derivative is one Jacobian-vector product in forward
    mode. The target is affine in v, so the velocity of the data may replace the marginal one: the conditional mean of
    the target is the same. The images with s = t are at the first of two times; in the authors' code, at the larger.

    Args:
        denoiser: the denoiser whose network is trained; with a second time.
        time_sampling: the distribution of both times; logit-normal with mean -0.4 and std 1 in the paper for ImageNet,
            -2 and 2 for CIFAR-10.
        share: the expected share of images with s < t; 0.25 in the paper for ImageNet, 0.75 for CIFAR-10, and 0.5 in
            improved MeanFlow.
        power, constant: of the adaptive weight; power 1 in the paper for ImageNet, 0.75 for CIFAR-10.
        tangent: the velocity along which u is derived: "data" (alpha' x0 + sigma' eps, the paper), or "network",
            u(x_t, t, t) of the network (improved MeanFlow, Geng et al. 2025, arXiv:2512.02012, alg. 1), which has no
            noise and costs one more evaluation.
    """

    name = "mean_flow"

    def __init__(
        self,
        denoiser: BaseDenoiser,
        time_sampling: TimeSampling,
        share: float = 0.25,
        power: float = 1.0,
        constant: float = 1e-3,
        tangent: Literal["data", "network"] = "data",
    ):
        super().__init__(denoiser, time_sampling, share, power, constant)
        self.tangent = tangent
        self.flow_map.check_derivative()

    def draw(self, n, generator):
        schedule = self.denoiser.schedule
        a, b = (self.time_sampling(n, schedule, generator) for _ in range(2))
        t, s = torch.maximum(a, b), torch.minimum(a, b)
        # the still images are at the first time, which has the chosen distribution
        moves = moving(n, self.share, generator) & (t > s)
        return torch.stack([t.where(moves, a), s.where(moves, a)], dim=1)

    def pair(self, x_t, t, s, velocity, condition):
        tangent = velocity
        if self.tangent == "network":
            with torch.no_grad():
                tangent = self.flow_map(x_t, t, t, condition)
        u, du = self.flow_map.derivative(x_t, t, s, tangent, condition)
        return u, velocity - per_image(t - s, x_t) * du.detach()


class ContinuousConsistencyLoss(MeanFlowLoss):
    """Continuous-time consistency training (sCM, Lu & Song 2024, arXiv:2410.11081): mean flow with s = 0.

        target = v - t (v d/dx + d/dt) u(x_t, t, 0)

    With x0(x_t, t) = x_t - t u(x_t, t, 0), u - target is the derivative of x0(x_t, t) along the path, negated: the
    tangent of the paper, whose loss has this gradient up to a weight by t. power = 1/2 is its normalisation by the
    tangent's norm. Its noise schedule (here straight), learned weight and warm-up of the tangent are left out.

    Args:
        denoiser, time_sampling, constant, tangent: see `MeanFlowLoss`; the times are those of t.
        share: the expected share of images with s = 0, the others are flow matching; 1 in the paper.
        power: of the adaptive weight; 1/2 is the paper's normalisation.

    Raises:
        ValueError: see `MeanFlowLoss`.
    """

    name = "continuous_consistency"

    def __init__(
        self,
        denoiser: BaseDenoiser,
        time_sampling: TimeSampling,
        share: float = 1.0,
        power: float = 0.5,
        constant: float = 1e-3,
        tangent: Literal["data", "network"] = "data",
    ):
        super().__init__(denoiser, time_sampling, share, power, constant, tangent)

    def draw(self, n, generator):
        t = self.time_sampling(n, self.denoiser.schedule, generator)
        return torch.stack([t, t.where(~moving(n, self.share, generator), torch.zeros_like(t))], dim=1)


class ShortcutLoss(AverageVelocityLoss):
    """Shortcut models: the target of a step is the mean of its two halves (Frans et al. 2024, arXiv:2410.12557).

        target = ((t - m) u(x_t, t, m) + (m - s) u(x_m, m, s)) / (t - s),    x_m = x_t + (m - t) u(x_t, t, m)

    The steps start on a grid of `steps` equal ones and have the length of 2, 4, ... or all of them. The halves of the
    shortest are single steps of the grid. These are Euler steps, as in the paper: u(x_t, t, t) replaces u(x_t, t, m).
    The target is computed with the weights that are trained; the authors' code takes their average by default.

    Args:
        denoiser: the denoiser whose network is trained; with a second time.
        time_sampling: the distribution of times of the images with s = t.
        share: the expected share of images with s < t.
        power, constant: of the adaptive weight; the paper has none (power 0).
        steps: steps of the grid, a power of 2; 128 in the paper.

    Raises:
        ValueError: steps is no power of 2.
    """

    name = "shortcut"

    def __init__(
        self,
        denoiser: BaseDenoiser,
        time_sampling: TimeSampling,
        share: float = 0.25,
        power: float = 0.0,
        constant: float = 1e-3,
        steps: int = 128,
    ):
        super().__init__(denoiser, time_sampling, share, power, constant)
        if steps < 2 or steps & (steps - 1):
            raise ValueError(f"steps must be a power of 2, at least 2, got {steps}")
        self.steps = steps
        self.grid = Trailing()(denoiser.schedule, steps).flip(0)

    def draw(self, n, generator):
        t = self.time_sampling(n, self.denoiser.schedule, generator)
        largest = self.steps.bit_length() - 1
        length = 2 ** torch.randint(1, largest + 1, (n,), generator=generator)
        chosen = torch.rand(n, dtype=torch.float64, generator=generator)
        start = ((chosen * (self.steps // length)).long() + 1) * length
        moves = moving(n, self.share, generator)
        return torch.stack(
            [self.grid[start].where(moves, t), self.grid[start - length].where(moves, t)], dim=1
        )

    def pair(self, x_t, t, s, velocity, condition):
        return self.flow_map(x_t, t, s, condition), self.target(x_t, t, s, condition)

    @torch.no_grad()
    def target(self, x_t: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        """The mean of u over two half steps, shape (B, C, H, W); the arguments are those of `pair`."""
        start, end = (self._index(time) for time in (t, s))
        m = self.grid[(start + end) // 2]
        euler = start - end == 2
        first = self.flow_map(x_t, t, t.where(euler, m), condition)
        x_m = x_t - per_image(t - m, x_t) * first
        second = self.flow_map(x_m, m, m.where(euler, s), condition)
        share = per_image((t - m) / (t - s), x_t)
        return share * first + (1 - share) * second

    def _index(self, times: Tensor) -> Tensor:
        return torch.searchsorted(self.grid, times - 1e-9)


def per_image(value: Tensor, x: Tensor) -> Tensor:
    """A value of each image, float64, shape (B,), on the CPU, as a tensor that multiplies images."""
    return value.view(-1, 1, 1, 1).to(x.device, x.dtype, non_blocking=True)


def moving(n: int, share: float, generator: torch.Generator) -> Tensor:
    """The images with s < t, bool, shape (n,): each with probability `share`, spread evenly over the batch.

    Their number differs from share n by less than 1, in every slice too, so that processes have equal work.
    """
    at = torch.arange(n + 1, dtype=torch.float64) * share + torch.rand(
        (), dtype=torch.float64, generator=generator
    )
    return at.floor().diff() > 0


def check_share(share: float) -> None:
    """Raises ValueError if a share of images is not in (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")


def check_fixed(time_sampling: TimeSampling, name: str) -> None:
    """Raises ValueError for times that adapt to the losses, which have no meaning for losses of two times."""
    if isinstance(time_sampling, AdaptiveTimeSampling):
        raise ValueError(
            f"time_sampling=importance is for losses of one time, and loss={name} has two: choose"
            " time_sampling=uniform or logit_normal"
        )


def check_denoiser(denoiser: BaseDenoiser, name: str) -> None:
    """Raises ValueError for a learned variance, or a table of times."""
    if denoiser.variance.outputs > 1:
        raise ValueError(f"variance is learned, which loss={name} does not train: choose variance=small")
    if not isinstance(denoiser.schedule, ContinuousSchedule):
        raise ValueError(
            f"schedule: loss={name} needs continuous times, and {type(denoiser.schedule).__name__} is a table; choose"
            " schedule=rectified_flow parameterization=velocity, or schedule=edm parameterization=edm"
        )
