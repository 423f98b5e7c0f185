"""An adaptive ODE solver.

torchdiffeq's dopri5 is not used because it bounds the error of the whole batch instead of each image's, takes different
steps, and does not report where a derivative is not finite.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]

# Dormand & Prince 1980, RK5(4)7M: nodes, stages, and the difference of the solutions of order 5 and 4.
NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


class NotFinite(ValueError):
    """The derivative is NaN or infinite.

    Attributes:
        x: the start of the step in which it occurs.
    """

    def __init__(self, x: float):
        super().__init__(f"the derivative is not finite (NaN or infinite) at {x:.6g}")
        self.x = x


def integrate(
    f: Callable[[float, Tensors], Tensors],
    y: Tensors,
    start: float,
    end: float,
    tolerance: float,
    max_evaluations: int = 100_000,
) -> tuple[Tensors, int]:
    """Solves dy/dx = f(x, y), y(start) = y, up to `end` by the Dormand-Prince method of order 5.

    Args:
        f: the derivative; returns tensors like y.
        y: tensors whose first dimension is the batch; each image in each tensor must meet the tolerance.
        start: initial x.
        end: final x, above start.
        tolerance: relative and absolute bound of each step's error (root mean square over an image).
        max_evaluations: largest number of evaluations of f.

    Returns:
        y(end) and the number of evaluations.

    Raises:
        ValueError: the tolerance is not reached within max_evaluations.
        NotFinite: f is not finite.
    """
    x, step = start, (end - start) * 1e-3
    slopes, evaluations = [f(x, y)], 1
    while x < end:
        step = min(step, end - x)
        for node, weights in zip(NODES[1:], STAGES, strict=True):
            slopes.append(f(x + node * step, _advance(y, slopes, weights, step)))
        evaluations += len(STAGES)
        candidate = _advance(y, slopes, STAGES[-1], step)
        zero = tuple(torch.zeros_like(part) for part in y)
        error = _advance(zero, slopes, ERROR, step)
        excesses = [_excess(e, a, b, tolerance) for e, a, b in zip(error, y, candidate, strict=True)]
        if any(map(math.isnan, excesses)):
            raise NotFinite(x)
        excess = max(excesses)
        if excess == math.inf or evaluations > max_evaluations:
            raise ValueError(
                f"tolerance={tolerance:g} is not reached at {x:.6g} after {evaluations} evaluations; the error"
                f" exceeds it {excess:.3g} times"
            )
        if excess <= 1:
            x = end if step == end - x else x + step
            y, slopes = candidate, slopes[-1:]  # the last slope is the next step's first
        else:
            slopes = slopes[:1]
        step *= min(max(0.9 * max(excess, 1e-10) ** -0.2, 0.2), 5.0)
    return y, evaluations


def _advance(y: Tensors, slopes: Sequence[Tensors], weights: Sequence[float], step: float) -> Tensors:
    parts = []
    for i, part in enumerate(y):
        for slope, weight in zip(slopes, weights, strict=False):
            if weight:
                part = torch.add(part, slope[i], alpha=step * weight)
        parts.append(part)
    return tuple(parts)


def _excess(error: Tensor, before: Tensor, after: Tensor, tolerance: float) -> float:
    """The largest error of an image, relative to the allowed error."""
    allowed = tolerance * (1 + torch.maximum(before.abs(), after.abs()))
    return (error / allowed).reshape(len(error), -1).square().mean(dim=1).sqrt().max().item()
