"""Learning-rate schedules: factors of the optimiser's learning rate at step k = 0, 1, 2, ..."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmUp(LambdaLR):
    """min(1, (k + 1) / warmup_steps): linear warmup, then constant (Ho et al. 2020, app. B: 5,000 steps).

    Args:
        optimizer: the optimiser.
        warmup_steps: length of the warmup; 0 for none.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int):
        _check(warmup_steps=warmup_steps)
        super().__init__(optimizer, lambda k: min(1.0, (k + 1) / max(warmup_steps, 1)))


class WarmUpCosine(LambdaLR):
    """Linear warmup, then cosine decay to `final` at total_steps (Loshchilov & Hutter 2017).

    Args:
        optimizer: the optimiser.
        warmup_steps: length of the warmup; 0 for none.
        total_steps: length of the training.
        final: factor at the end, in [0, 1].
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, total_steps: int, final: float = 0.0):
        _check(warmup_steps=warmup_steps)
        if total_steps <= warmup_steps:
            raise ValueError(f"total_steps={total_steps} must be above warmup_steps={warmup_steps}")

        def factor(k: int) -> float:
            if k < warmup_steps:
                return (k + 1) / warmup_steps
            progress = min(1.0, (k - warmup_steps) / (total_steps - warmup_steps))
            return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

        super().__init__(optimizer, factor)


class InverseSquareRoot(LambdaLR):
    """Linear warmup, then constant up to reference_steps, then 1/sqrt(k / reference_steps) (EDM2, eq. 67).

    The schedule of Karras et al. 2024 (arXiv:2312.02696, sec. 2.3, table 6), which keeps the training from stalling
    when weights have a fixed magnitude; the length of the training need not be known.

    Args:
        optimizer: the optimiser.
        warmup_steps: length of the warmup; 0 for none.
        reference_steps: steps until the decay starts, at least 1; 70,000 in the paper for ImageNet 512, 35,000 for 64.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, reference_steps: int):
        _check(warmup_steps=warmup_steps)
        if reference_steps < 1:
            raise ValueError(f"reference_steps must be at least 1, got {reference_steps}")

        def factor(k: int) -> float:
            return min(1.0, (k + 1) / max(warmup_steps, 1)) / math.sqrt(max(1.0, k / reference_steps))

        super().__init__(optimizer, factor)


def _check(warmup_steps: int) -> None:
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
