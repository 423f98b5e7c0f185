"""Skips, counts and limits optimiser steps whose loss or gradient is not finite.

Reading a tensor of an accelerator on the host synchronises with the device, which is too slow for every step. So on an
accelerator the decision is made on the device; on the CPU reading is free.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from src.errors import UserError
from src.training.divided import norm_of


def is_free_to_read(number: Tensor) -> bool:
    """Whether the host can read a tensor without synchronising with a device."""
    return number.device.type == "cpu"


def is_finite(number: Tensor) -> bool | Tensor:
    """Whether a tensor of shape () is finite: a bool where reading is free, else a bool tensor on its device."""
    return math.isfinite(number.item()) if is_free_to_read(number) else number.isfinite()


def clip_or_skip(
    optimizer: Optimizer,
    parameters: Iterable[nn.Parameter],
    limit: float,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Clips the gradient norm; if it is not finite, the next `optimizer.step()` changes neither weights nor state.

    A fused optimiser on an accelerator reads the flag `found_inf` on the device, the protocol of
    `torch.amp.GradScaler`. Otherwise the host reads the norm and synchronises with the device: for optimisers that are
    not fused, for weights that are divided among processes, and with a scaler (precision=16-mixed), which sets the flag
    itself.

    Args:
        optimizer: the optimiser.
        parameters: all parameters it updates, with gradients.
        limit: largest global norm; infinite for no clipping.
        scaler: the scaler of the loss, if any.

    Returns:
        The norm before clipping, shape (), on the device of the gradients.
    """
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    if scaler is not None and fused:
        scaler.unscale_(
            optimizer
        )  # Lightning leaves this to fused optimisers, which unscale only after the clipping
    found = nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
    norm = norm_of(found)
    if fused and norm is found and scaler is None and not is_free_to_read(norm):
        optimizer.found_inf = (~norm.isfinite()).float()
    elif not is_finite(norm):
        # without gradients, an optimiser changes neither weights nor state
        optimizer.zero_grad(set_to_none=True)
    return norm


class SkipNonFinite(Callback):
    """Counts skipped optimiser steps, and stops a training that does not recover.

    A step whose loss or gradient is not finite on any rank is skipped (see `DiffusionModule`): weights, averages and
    optimiser state do not change, and training continues with the next batch. The number of skipped steps is logged as
    `train/skipped_steps`. On an accelerator the counts are read only every `stop_after` steps, so the training may stop
    up to that many steps later.

    Args:
        stop_after: number of consecutive skipped steps after which the training is stopped. The loss scaling of
            precision=16-mixed skips a few steps by design, until it finds its scale.

    Raises:
        ValueError: stop_after is below 1.
    """

    def __init__(self, stop_after: int = 10):
        if stop_after < 1:
            raise ValueError(f"stop_after must be at least 1 step, got {stop_after}")
        self.stop_after = stop_after
        self.skipped = 0
        self.in_a_row = 0
        self._longest = 0
        self._logged = 0
        self._step = 0
        self._unread: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._logged = self.skipped
        self._longest = 0
        self._unread = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # a micro-batch that only accumulated gradients
            return
        self._step = trainer.global_step
        self._unread.append(pl_module.gradient_norm)
        if is_free_to_read(pl_module.gradient_norm) or len(self._unread) >= self.stop_after:
            self._report(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        self._read()
        if self.skipped != self._logged:
            self._logged = self.skipped
            for logger in trainer.loggers:
                logger.log_metrics({"train/skipped_steps": self.skipped}, step=self._step)
        if self._longest >= self.stop_after:
            raise UserError(
                f"stopped at step {self._step}: loss or gradient not finite {self._longest} times in a row;"
                " lower optimizer.lr, or choose trainer.precision=32-true"
            )

    def _read(self) -> None:
        norms, self._unread = self._unread, []
        if not norms:
            return
        found = norms if is_free_to_read(norms[0]) else torch.stack(norms).cpu()
        for updated in (math.isfinite(norm.item()) for norm in found):
            self.skipped += not updated
            self.in_a_row = 0 if updated else self.in_a_row + 1
            self._longest = max(self._longest, self.in_a_row)

    def state_dict(self) -> dict[str, Any]:
        self._read()
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
        self.in_a_row = state_dict["in_a_row"]
