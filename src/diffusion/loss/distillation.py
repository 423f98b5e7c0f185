"""Losses of consistency models and of progressive distillation, with or without a frozen teacher.

A teacher gives the point x_r to which the probability-flow ODE leads from x_t. Without one, the line through the image
and its noise does.
"""

import math

import torch
from torch import Tensor, nn

from src.conditioning import Condition
from src.errors import UserError

from ..denoiser import BaseDenoiser, Denoiser
from ..distance import Distance
from ..flow_map import step
from ..forward import diffuse
from ..noise_level import NoiseLevel, broadcast
from ..spacing import Spacing
from ..time_sampling import TimeSampling
from ..weighting import Weighting
from .base import Loss
from .denoising import DenoisingLoss
from .few_step import check_denoiser, check_fixed

# A network of a consistency model has to give x_t back at this time, up to this error.
CLEAN_TIME, CLEAN_ERROR = 1e-6, 1e-3


class Teacher:
    """A frozen denoiser. It is not a module, so that it is neither trained nor saved with the network.

    Args:
        denoiser: in eval mode, without gradients; its `identity` is stored in checkpoints.
    """

    def __init__(self, denoiser: BaseDenoiser):
        self.denoiser = denoiser

    def __call__(
        self, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, condition: Condition | None = None
    ) -> Tensor:
        """x_s from x_t by one step, without a gradient."""
        first = next(self.denoiser.parameters(), x_t)
        if first.device != x_t.device:
            self.denoiser.to(x_t.device)
        with torch.no_grad():
            return step(self.denoiser, x_t, t, s, condition)


class Distilling(Loss):
    """A loss that may have a teacher.

    Args:
        denoiser: the denoiser whose network is trained.
        teacher: a frozen denoiser, or None.
    """

    def __init__(self, denoiser: BaseDenoiser, teacher: BaseDenoiser | None = None):
        nn.Module.__init__(self)
        self.denoiser = denoiser
        self.teacher = None if teacher is None else Teacher(teacher)

    def get_extra_state(self) -> dict[str, Tensor]:
        # checkpoints hold tensors only
        identity = "" if self.teacher is None else self.teacher.denoiser.identity or ""
        return {"teacher": torch.tensor(list(identity.encode()), dtype=torch.uint8)}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        before, now = (_text(each["teacher"]) for each in (state, self.get_extra_state()))
        if before != now:
            raise UserError(
                f"loss.run: this training began with the teacher {before}, and loss.run now is {now}; give the same"
                " checkpoint"
            )


class ConsistencyLoss(Distilling):
    """Consistency training or, with a teacher, distillation: the estimates of x0 at x_t and x_r agree, r < t.

        (sqrt(mean_pixels (x0(x_t, t) - x0(x_r, r))^2 + huber^2) - huber) / (t - r),    r = t (1 - 2^-stage)

    without a gradient of the second term. The stage is 1 at first and grows by one every `every` steps up to `stages`,
    the constant mapping of easy consistency tuning (ECT, Geng et al. 2024, arXiv:2406.14548), whose recipe shortens r
    further at small t and starts from a diffusion model (`init`); distance and weight are those of improved consistency
    training (Song & Dhariwal 2023, arXiv:2310.14189). x_r has the image and noise of x_t; a teacher makes a step of
    DDIM from x_t (consistency distillation, Song et al. 2023, arXiv:2303.01469, alg. 2).

    In the algebra of flow maps this is the target ((t - r) v + r u(x_r, r, 0)) / t of u(x_t, t, 0). A network with a
    second time is given that of clean data.

    Args:
        denoiser: the denoiser whose network is trained; x0 is x_t at t = 0.
        time_sampling: the distribution of t.
        teacher: a frozen denoiser on the same schedule, or None.
        stages: the last stage, at least 1.
        every: optimiser steps of each stage.
        huber: in the distance, in units of the images.

    Raises:
        ValueError: an argument is out of range, or the denoiser is unfit.
    """

    def __init__(
        self,
        denoiser: BaseDenoiser,
        time_sampling: TimeSampling,
        teacher: BaseDenoiser | None = None,
        stages: int = 8,
        every: int = 500,
        huber: float = 0.00054,
    ):
        super().__init__(denoiser, teacher)
        for option, value in (("stages", stages), ("every", every)):
            if value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        if huber <= 0:
            raise ValueError(f"huber must be positive, got {huber}")
        check_denoiser(denoiser, "consistency")
        check_fixed(time_sampling, "consistency")
        _check_boundary(denoiser)
        self.time_sampling, self.stages, self.every, self.huber = time_sampling, stages, every, huber
        self.clean = denoiser.schedule([0.0]).scalars()[0] if denoiser.second_time else None

    def draw(self, n, generator):
        return self._pairs(n, generator, self.stages)

    def draw_at(self, number, n, generator):
        return self._pairs(n, generator, min(1 + number // self.every, self.stages))

    def _pairs(self, n: int, generator: torch.Generator, stage: int) -> Tensor:
        t = self.time_sampling(n, self.denoiser.schedule, generator)
        return torch.stack([t, t * (1 - 2.0**-stage)], dim=1)

    def forward(self, x0, draws, eps, condition=None):
        t, r = draws[:, 0], draws[:, 1]
        x_t = diffuse(x0, eps, self.denoiser.schedule(t))
        if self.teacher is None:
            x_r = diffuse(x0, eps, self.denoiser.schedule(r))
        else:
            x_r = self.teacher(x_t, self.denoiser.schedule(t), self.denoiser.schedule(r), condition)
        with torch.no_grad():
            target = self._x0(x_r, r, condition)
        error = (self._x0(x_t, t, condition) - target).square().flatten(1).mean(dim=1)
        distance = (error + self.huber**2).sqrt() - self.huber
        return distance / (t - r).to(distance.device, distance.dtype, non_blocking=True)

    def _x0(self, x: Tensor, time: Tensor, condition: Condition | None) -> Tensor:
        to = None
        if self.clean is not None:
            zero = torch.zeros_like(time)
            to = self.denoiser.schedule(zero)
        return self.denoiser(x, self.denoiser.schedule(time), condition, to).x0


class ProgressiveLoss(Distilling, DenoisingLoss):
    """Progressive distillation: one step of the student gives what two steps of the teacher give.

    Salimans & Ho 2022, arXiv:2202.00512, alg. 2. The target is the x0 with which DDIM's step from x_t leads to the
    teacher's x_s; weighting, distance and parameterisation apply to it as in the denoising loss. Each round halves the
    number of steps: it is a training of its own, whose teacher is the run of the round before.

    Args:
        denoiser: the denoiser whose network is trained.
        weighting: weight on the error of x0.
        spacing: the times that the sampler visits.
        teacher: a frozen denoiser on the same schedule.
        steps: the student's steps; the teacher makes twice as many.
        distance: between output and target (default: `Squared`).

    Raises:
        ValueError: there is no teacher, or the spacing's times for `steps` are not among those for twice as many.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weighting: Weighting,
        spacing: Spacing,
        teacher: BaseDenoiser | None = None,
        steps: int = 8,
        distance: Distance | None = None,
    ):
        if teacher is None:
            raise ValueError(
                "loss.run is missing: progressive distillation needs a teacher; give its run folder"
            )
        DenoisingLoss.__init__(self, denoiser, weighting, _FromGrid(), distance)
        self.teacher = Teacher(teacher)
        self.steps = steps
        self.grid = spacing(denoiser.schedule, 2 * steps)
        own = spacing(denoiser.schedule, steps)
        if self.grid.shape != (2 * steps + 1,) or not torch.allclose(self.grid[::2], own):
            raise ValueError(
                f"spacing: the times of {steps} steps of {type(spacing).__name__} are not among those of {2 * steps};"
                " choose spacing=trailing"
            )
        self.grid = self.grid.flip(0)

    def get_extra_state(self):
        return super().get_extra_state() | {"times": self.grid}

    def set_extra_state(self, state):
        super().set_extra_state(state)
        if not torch.equal(state["times"].cpu(), self.grid):
            raise UserError("spacing: this training began with other times; give the same spacing")

    def draw(self, n, generator):
        start = 2 * (1 + torch.randint(self.steps, (n,), generator=generator))
        return torch.stack([self.grid[start], self.grid[start - 1], self.grid[start - 2]], dim=1)

    def draw_for_validation(self, n, generator):
        return self.draw(n, generator)

    def importance(self, draws):
        return Loss.importance(self, draws)

    def forward(self, x0, draws, eps, condition=None):
        t, m, s = (self.denoiser.schedule(times) for times in draws.unbind(1))
        x_t = diffuse(x0, eps, t)
        x_s = self.teacher(self.teacher(x_t, t, m, condition), m, s, condition)
        target = implied_x0(x_t, x_s, t, s)
        noise = (x_t - broadcast(t.alpha, x_t) * target) / broadcast(t.sigma, x_t)
        output, _ = self.denoiser.output(x_t, t, condition, s if self.denoiser.second_time else None)
        return self.weighted_error(output, target, noise, t)


class _FromGrid(TimeSampling):
    """Stands for times that a loss draws itself."""

    def __call__(self, n, schedule, generator):
        raise NotImplementedError


def _text(letters: Tensor) -> str:
    """A stored identity, or "none"."""
    return bytes(letters.tolist()).decode(errors="replace") or "none"


def implied_x0(x_t: Tensor, x_s: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """The x0 with which DDIM's step from x_t leads to x_s (Salimans & Ho 2022, app. G)."""
    ratio = s.sigma / t.sigma
    scale = s.alpha - ratio * t.alpha
    return broadcast(1 / scale, x_t) * x_s - broadcast(ratio / scale, x_t) * x_t


def _check_boundary(denoiser: BaseDenoiser) -> None:
    """Raises ValueError unless x0 is x_t at t = 0 for every output; otherwise one x0 for all would be a minimum."""
    parameterization = getattr(denoiser, "parameterization", None)
    if parameterization is None:
        return
    _, c_skip, c_out = parameterization.coefficients(denoiser.schedule([CLEAN_TIME]).scalars()[0])
    if not (math.isclose(c_skip, 1, abs_tol=CLEAN_ERROR) and math.isclose(c_out, 0, abs_tol=CLEAN_ERROR)):
        raise ValueError(
            f"parameterization: loss=consistency needs x0 = x_t at t = 0, which {type(parameterization).__name__} does"
            " not give; choose parameterization=velocity, v or edm"
        )
