"""What makes the optimiser and its learning-rate schedule, and whether they fit the average."""

import math
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from src.app.build import build, class_of
from src.errors import UserError
from src.training.ema import ScheduleFreeAverage
from src.training.optimizers import ScheduleFreeAdamW


def optimizer_of(config: DictConfig) -> tuple[Any, Any]:
    """What makes the optimiser and its learning-rate schedule, both tried on one parameter.

    Raises:
        UserError: a number or the version of a package does not fit, or the average is another optimiser's.
    """
    free = class_of(config.optimizer) is ScheduleFreeAdamW
    if free != (class_of(config.ema) is ScheduleFreeAverage):
        wrong, fix = (
            ("ema", "ema=schedule_free") if free else ("ema=schedule_free", "optimizer=schedule_free")
        )
        raise UserError(
            f"{wrong}: the average of optimizer=schedule_free is its own, and no other optimiser has it; choose {fix}"
            + ("" if free else ", or another ema")
        )
    for name, value in (config.optimizer or {}).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"optimizer.{name}={value}: give a finite number")
    optimizer = build(config.optimizer, Optimizer, "optimizer")
    lr_schedule = build(config.lr_schedule, LRScheduler, "lr_schedule")
    option = "optimizer"
    try:
        tried = optimizer([nn.Parameter(torch.zeros(1))])
        option = "lr_schedule"
        if lr_schedule is not None:
            lr_schedule(tried)
    except (ValueError, TypeError) as error:
        raise UserError(f"{option}: {str(error).splitlines()[0]}") from None
    return optimizer, lr_schedule
