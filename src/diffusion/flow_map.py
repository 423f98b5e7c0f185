"""The average velocity u(x_t, t, s), which takes x_t to x_s in one step: the flow map of few-step models.

    x_s = x_t + (s - t) u(x_t, t, s),    u(x_t, t, t) = v(x_t, t) = dx_t/dt

On a straight schedule alpha and sigma are linear in t, with slopes alpha' and sigma'. A denoiser with a second time
represents u by the two ends of the chord from x_t to x_s:

    u = alpha' x0 + sigma' eps,    x_s = alpha_s x0 + sigma_s eps,    (x0, eps) = denoiser(x_t, t, to=s)

This holds for every parameterisation. On the rectified flow with parameterization=velocity the network's output is u.
See docs/few_step.md.
"""

import math

import torch
from torch import Tensor

from src.conditioning import Condition

from .denoiser import BaseDenoiser
from .noise_level import NoiseLevel
from .schedule import Schedule

# Parts of PyTorch's messages of operators without a forward-mode derivative.
NO_FORWARD_MODE = ("forward AD", "forward-mode", "saved tensor hooks", "func.jvp")


class FlowMap:
    """The average velocity of a denoiser.

    Args:
        denoiser: on a straight schedule.
        option: the choice that needs it, for messages.

    Raises:
        ValueError: the schedule is not straight, or the network has no second time.
    """

    def __init__(self, denoiser: BaseDenoiser, option: str):
        self.denoiser = denoiser
        self.of_x0, self.of_eps = slopes(denoiser.schedule, option)
        check_second_time(denoiser, option)

    def __call__(self, x_t: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        """u(x_t, t, s), x_t's shape.

        Args:
            x_t: noisy images, shape (B, C, H, W).
            t: their times, float64, shape (B,), on the CPU.
            s: the times to which u leads, likewise; s <= t.
            condition: the condition of the images, or None.
        """
        schedule = self.denoiser.schedule
        return self.denoiser(x_t, schedule(t), condition, schedule(s)).mix(self.of_x0, self.of_eps)

    def velocity(self, x0: Tensor, eps: Tensor) -> Tensor:
        """alpha' x0 + sigma' eps, the velocity of the line through an image and its noise."""
        return self.of_x0 * x0 + self.of_eps * eps

    def derivative(
        self, x_t: Tensor, t: Tensor, s: Tensor, velocity: Tensor, condition: Condition | None = None
    ) -> tuple[Tensor, Tensor]:
        """u(x_t, t, s) and its derivative along a line of this velocity, (velocity d/dx + d/dt) u, in forward mode.

        Mixed precision is left out on the CPU, where group norms of bfloat16 have float32 derivatives.

        Raises:
            ValueError: a part of the network has no forward-mode derivative; names the option to change.
        """

        def u(x: Tensor, time: Tensor) -> Tensor:
            return self(x, time, s, condition)

        try:
            with torch.autocast("cpu", enabled=False):
                return torch.func.jvp(u, (x_t, t), (velocity, torch.ones_like(t)))
        except (RuntimeError, NotImplementedError) as error:
            if any(words in str(error) for words in NO_FORWARD_MODE):
                raise ValueError(no_forward_mode(self.denoiser, error)) from error
            raise

    def check_derivative(self) -> None:
        """Takes the derivative once, for networks of other packages.

        Raises:
            ValueError: a part of the network has no forward-mode derivative; names the option to change.
        """
        network = getattr(self.denoiser, "network", None)
        shape = getattr(network, "image_shape", None)
        if getattr(network, "checkpointing", False):
            raise ValueError(no_forward_mode(self.denoiser, ""))
        if shape is None or type(network).__module__.startswith("src.model."):
            return
        weight = next(network.parameters(), torch.zeros(()))
        x = torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device)
        t = torch.full((1,), self.denoiser.schedule.t_max, dtype=torch.float64)
        with torch.no_grad():
            self.derivative(x, t, t / 2, x)


def slopes(schedule: Schedule, option: str) -> tuple[float, float]:
    """alpha' and sigma' of a straight schedule.

    Raises:
        ValueError: it is not straight.
    """
    if not schedule.straight:
        raise ValueError(
            f"schedule: {option} is defined for x_t on a straight line, and {type(schedule).__name__} is not straight;"
            " choose schedule=rectified_flow parameterization=velocity, or schedule=edm parameterization=edm"
        )
    clean, noise = schedule([0.0, schedule.t_max]).scalars()
    return (noise.alpha - clean.alpha) / schedule.t_max, (noise.sigma - clean.sigma) / schedule.t_max


def check_second_time(denoiser: BaseDenoiser, option: str) -> None:
    """Raises ValueError if a denoiser cannot represent a step from t to any s."""
    if not denoiser.second_time:
        raise ValueError(
            f"model.second_time=false: {option} needs a network that is given both times; choose"
            " model.second_time=true"
        )
    label = (
        getattr(denoiser, "parameterization", denoiser).label
        if hasattr(denoiser, "parameterization")
        else None
    )
    if label is not None and not math.isfinite(label(denoiser.schedule([0.0]).scalars()[0])):
        raise ValueError(
            f"parameterization: the label of t = 0 on {type(denoiser.schedule).__name__} is not finite; choose"
            " parameterization=edm, or schedule=rectified_flow"
        )


def no_forward_mode(denoiser: BaseDenoiser, error: object) -> str:
    """What to change in a network without a forward-mode derivative, in one line."""
    network = getattr(denoiser, "network", denoiser)
    if getattr(network, "checkpointing", False):
        return (
            "model.checkpointing=true: recomputed activations have no forward-mode derivative; choose"
            " model.checkpointing=false"
        )
    name = type(getattr(network, "module", network)).__name__
    reason = str(error).partition("\n")[0][:120]
    return (
        f"model: an operator of {name} has no forward-mode derivative, e.g. PyTorch's fused attention"
        f" ({reason}); call src.model.attention.attend in it, choose another model, or"
        " loss=shortcut, which needs none"
    )


def step(
    denoiser: BaseDenoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, condition: Condition | None = None
) -> Tensor:
    """x_s from x_t in one evaluation; a denoiser without a second time makes DDIM's step."""
    to = s if denoiser.second_time else None
    return denoiser(x_t, t, condition, to).mix(s.alpha, s.sigma)
