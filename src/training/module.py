"""The LightningModule: training and validation steps, and the optimiser.

Every random draw of a step is a function of (seed, purpose, position in the training stream). Draws are made for the
global batch and sliced by position, so resuming, sharding and callbacks do not change them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, MetricCollection

from src.conditioning import Condition, Conditioning, GeometricAugmentation
from src.data.codec import Codec
from src.data.stream import Batch
from src.diffusion.denoiser import Denoiser
from src.diffusion.loss import Loss
from src.randomness import draws_at, generator, key, seed_defaults
from src.training.coupling import Coupling
from src.training.ema import EMA
from src.training.nonfinite import clip_or_skip
from src.training.regularizer import Regularizer

# Validation draws do not depend on the run's seed, so that curves of different seeds can be compared.
VALIDATION_SEED = 0


class DiffusionModule(LightningModule):
    """Trains the network of a `Loss`.

    If the loss or gradient of an optimiser step is not finite on any rank, the step is skipped on all ranks.

    Args:
        loss: contains the denoiser and draws the times; all its parameters are trained.
        optimizer: maps parameters to an optimiser.
        lr_schedule: maps the optimiser to a learning-rate schedule, stepped every optimiser step; None for a constant
            rate.
        ema: average of the network's weights, used for previews, scores and validation; or None.
        seed: the run's seed.
        batch_size: the global batch size.
        codec: encodes the images for the network.
        conditioning: selects the condition passed to the network; None for unconditional training.
        coupling: reorders the noise of a training batch; None for its own order.
        augmentation: transforms the training images, and gives the network its parameters; or None.
        regularizer: a term added to the training loss, whose parameters are trained too; or None.

    Attributes:
        gradient_norm: gradient norm of the latest optimiser step before clipping, shape (), on the device; not finite
            if the step was skipped.
        is_updating: whether an optimiser step has begun to change the state and has not finished.
    """

    def __init__(
        self,
        loss: Loss,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        lr_schedule: Callable[[Optimizer], LRScheduler] | None,
        ema: EMA | None,
        seed: int,
        batch_size: int,
        codec: Codec,
        conditioning: Conditioning | None = None,
        coupling: Coupling | None = None,
        augmentation: GeometricAugmentation | None = None,
        regularizer: Regularizer | None = None,
    ):
        super().__init__()
        self.loss = loss
        self.make_optimizer = optimizer
        self.make_lr_schedule = lr_schedule
        self.ema = ema
        self.seed = seed
        self.batch_size = batch_size
        self.codec = codec
        self.conditioning = conditioning
        self.coupling = coupling
        self.augmentation = augmentation
        self.regularizer = regularizer
        self.gradient_norm = torch.zeros(())
        self.is_updating = False
        self._remembered: list[Tensor] = []
        # means over images; Lightning's reduction weights ranks equally, even with unequal numbers of images
        names = ["val/loss"] if ema is None else ["val/loss", "val/loss_ema"]
        self.validation_losses = MetricCollection(
            {name: MeanMetric(nan_strategy="disable") for name in names}
            | {f"val/{name}": MeanMetric(nan_strategy="ignore") for name in loss.measures}
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if (
            name == "_current_fx_name"
        ):  # set by Lightning 50 times a step; nn.Module's way costs a tenth of a ms there
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def denoiser(self) -> Denoiser:
        return self.loss.denoiser

    def setup(self, stage: str) -> None:
        """Converts the weights to the precision of the training before a checkpoint is loaded into them.

        Lightning does it afterwards, which would round the weights of 64-true.
        """
        self.trainer.precision_plugin.convert_module(self)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Returns `loss` and, for callbacks, detached tensors of shape (b,): `losses`, the loss of each image, on the
        device, and `times`, its time as a quantile of the schedule's range, in [0, 1]; with a regulariser also
        `regularizer`, its term, shape ()."""
        x0, positions = self.encode(batch), batch.positions
        augment = None
        if self.augmentation is not None:
            x0, augment = self.augmentation(x0, positions, self.seed, self.batch_size)
        draws = draws_at(positions, self.batch_size, self._draws)
        eps = draws_at(positions, self.batch_size, lambda k: self._noise(k, x0))
        condition = None
        if self.conditioning is not None:
            condition = self.conditioning.of_training(
                batch.condition, x0, positions, self.seed, self.batch_size
            )
        if augment is not None:
            condition = replace(Condition() if condition is None else condition, augment=augment)
        if self.coupling is not None:
            eps = self.coupling(x0, eps, condition)
        # Dropout uses the default generator, which is therefore seeded by the position in the training stream.
        seed_defaults(key(self.seed, "dropout", int(positions[0])), x0.device)
        network, regularizer = self.denoiser.network, self.regularizer
        with nullcontext() if regularizer is None else regularizer.observing(network) as hidden:
            losses = self.loss(x0, draws, eps, condition)
        self._remember(positions, draws, losses.detach())
        importance = self.loss.importance(draws)
        if importance is not None:
            losses = losses * importance.to(losses, non_blocking=True)
        loss = losses.mean()
        results = {"losses": losses.detach(), "times": self.loss.quantile(draws)}
        if regularizer is not None:
            term = regularizer(hidden, x0)
            loss = loss + term
            results["regularizer"] = term.detach()
        # The factor is 1, or NaN if the loss is not finite. In that case the gradients are NaN too, and the gradient
        # reduction propagates this to all ranks without another collective.
        loss = loss * (1 + 0 * loss.detach())
        return {"loss": loss, **results}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs `val/loss` (raw weights), `val/loss_ema` and the measures of the loss.

        Times and noise of each image are fixed.
        """
        x0 = self.encode(batch)
        keyed = [generator(VALIDATION_SEED, "validation", int(i)) for i in batch.positions]
        draws = torch.cat([self.loss.draw_for_validation(1, g) for g in keyed])
        eps = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in keyed]).to(x0, non_blocking=True)
        condition = None if self.conditioning is None else self.conditioning.of_data(batch.condition, x0)
        self.validation_losses["val/loss"].update(self.loss(x0, draws, eps, condition))
        if self.ema is not None:
            with self.averaged():
                self.validation_losses["val/loss_ema"].update(self.loss(x0, draws, eps, condition))
        if self.loss.measures:
            with self.averaged():
                for name, values in self.loss.measure(x0, draws, eps, condition).items():
                    self.validation_losses[f"val/{name}"].update(values)
        # TrainingCurves passes it to the loggers, since Lightning would log it one step too early
        self.log_dict(dict(self.validation_losses), on_epoch=True, on_step=False, logger=False)

    @contextmanager
    def averaged(self) -> Iterator[Denoiser]:
        """The denoiser with averaged weights in eval mode. Weights and mode are restored at exit, also on errors."""
        network = self.denoiser.network
        was_training = network.training
        network.eval()
        try:
            if self.ema is None:
                yield self.denoiser
            else:
                with self.ema.applied(network):
                    yield self.denoiser
        finally:
            network.train(was_training)

    def _on_before_batch_transfer(self, batch: Batch, dataloader_idx: int = 0) -> Batch:
        """As Lightning's, without looking for three hooks at each step, which neither module nor data have."""
        return batch

    def _apply_batch_transfer_handler(
        self, batch: Batch, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Batch:
        """As Lightning's; see `_on_before_batch_transfer`."""
        return batch.to(device or self.device)

    def encode(self, batch: Batch) -> Tensor:
        """The encoded images of a batch in the precision of the network's weights, shape (b, C, H, W)."""
        with torch.no_grad():
            return self.codec.encode(batch.mirrored()).to(self.dtype)

    def on_fit_start(self) -> None:
        """Moves a codec with weights to the device; it is not part of the module, since it is not trained."""
        self.codec.to(self.device)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Passes the losses of the global batch to `Loss.observe`, before a checkpoint can be written."""
        self.is_updating = True
        if not self._remembered:
            return
        rows = self.all_gather(torch.cat(self._remembered))
        rows = rows.reshape(-1, rows.shape[-1]).cpu().double()
        self._remembered = []
        if not bool(rows.isfinite().all()):
            return
        rows = rows[rows[:, 0].argsort()]
        draws = rows[:, 1:-1]
        self.loss.observe(draws.squeeze(1) if draws.shape[1] == 1 else draws, rows[:, -1])

    def _remember(self, positions: Tensor, draws: Tensor, losses: Tensor) -> None:
        if self.loss.learns_from_losses:
            place = (positions % self.batch_size)[:, None]
            columns = [place, draws.reshape(len(draws), -1), losses[:, None]]
            self._remembered.append(
                torch.cat([column.to(losses, non_blocking=True) for column in columns], dim=1)
            )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the global norm and stores it; a step whose norm is not finite is skipped."""
        limit = float("inf") if gradient_clip_val is None else gradient_clip_val
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # with precision=16-mixed
        self.gradient_norm = clip_or_skip(optimizer, self.parameters(), limit, scaler)

    def optimizer_step(self, *args, **kwargs) -> None:
        """Also lets the network constrain its weights, before averages and checkpoints are made of them."""
        super().optimizer_step(*args, **kwargs)
        after = getattr(self.denoiser.network, "after_optimizer_step", None)
        if after is not None:  # plain modules have none
            after()
        self.is_updating = False

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        if self.make_lr_schedule is None:
            return optimizer
        lr_schedule = self.make_lr_schedule(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_schedule, "interval": "step"}}

    def _draws(self, number: int) -> Tensor:
        return self.loss.draw_at(number, self.batch_size, generator(self.seed, "time", number))

    def _noise(self, number: int, x0: Tensor) -> Tensor:
        draw = generator(self.seed, "noise", number, x0.device)
        shape = (self.batch_size, *x0.shape[1:])
        return torch.randn(shape, generator=draw, device=x0.device, dtype=x0.dtype)
