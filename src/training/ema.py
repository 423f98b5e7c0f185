"""Averages of the network's weights, used for sampling and scoring.

Lightning's weight averaging is not used: it breaks resuming with torch.compile, saves swapped weights if an exception
interrupts validation, and is several times slower.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from src.runs.output import tolerated
from src.training import post_hoc
from src.training.divided import divided, parts, whole
from src.training.nonfinite import is_finite, is_free_to_read
from src.training.optimizers import ScheduleFreeAdamW

Weights = dict[str, Tensor]


class EMA(Callback):
    """average <- decay average + (1 - decay) weights, once per optimiser step.

    Averages are stored in float32, or in the weights' dtype if that is wider, since relative increments of (1 - decay)
    are below the resolution of bfloat16.

    The callback reads two attributes of the module: `denoiser.network`, and `gradient_norm`, which is not finite after
    a skipped step. A skipped step does not change the averages.

    Args:
        decay: in [0, 1); 0.9999 in DDPM (Ho et al. 2020, app. B).
        warmup: use min(decay, (1 + n) / (10 + n)) at update n, so that the influence of the initial weights decays
            quickly; without warmup their share is still 61 % after 5,000 updates at 0.9999.
        device: "cpu" to keep the averages of an accelerator's weights in main memory, bit for bit the same. Each step
            then waits for a copy of the weights. None for the weights' device.

    Attributes:
        averages: the averages by parameter name; the first is used for sampling and scoring.
        updates: number of optimiser steps so far.

    Raises:
        ValueError: decay is out of range, or another device is given.
    """

    # the same for all subclasses, since averages are looked up in checkpoints by this name
    state_key = "EMA"

    def __init__(self, decay: float = 0.9999, warmup: bool = True, device: str | None = None):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if device not in (None, "cpu"):
            raise ValueError(f"device must be cpu, or null for the device of the weights, got {device}")
        self.device = device
        self.decay: float | None = decay
        self.warmup = warmup
        self.updates = 0
        self.averages: list[Weights] = [{}]

    @property
    def weights(self) -> Weights:
        """The average used for sampling and scoring; empty before the training starts."""
        return self.averages[0]

    @property
    def name(self) -> str:
        """Its name in protocols, without the decay."""
        return "ema"

    def decays_at(self, update: int) -> list[float]:
        """The decay of each average at the update with this 0-based number."""
        return [min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay]

    def start(self, network: nn.Module) -> None:
        """Initialises the averages with the network's weights, or moves loaded averages to their device."""
        weights = {name: weight.detach() for name, weight in network.named_parameters()}
        averages = self.averages
        if len(averages) != len(self.decays_at(0)) or self.weights.keys() != weights.keys():
            averages = [{n: w.clone() for n, w in weights.items()} for _ in self.decays_at(0)]
        self.averages = [
            {
                n: divided(a, weights[n]).to(
                    self.device or weights[n].device, _at_least_float32(weights[n].dtype)
                )
                for n, a in average.items()
            }
            for average in averages
        ]

    @torch.no_grad()
    def update(self, network: nn.Module, finite: bool | Tensor) -> None:
        """Updates the averages.

        Args:
            network: the network whose weights are averaged.
            finite: whether the optimiser step was not skipped; see `is_finite`.
        """
        on_host = isinstance(finite, bool) or is_free_to_read(finite)
        parameters = parts(network.parameters())
        if not on_host and self.device is not None:  # not with `lerp`, which rounds differently
            finite, parameters = finite.cpu(), [parameter.cpu() for parameter in parameters]
        elif on_host and not finite:
            return
        for average, decay in zip(self.averages, self.decays_at(self.updates), strict=True):
            averages = parts(average.values())
            weights = [w.to(a.dtype) for w, a in zip(parameters, averages, strict=True)]
            if on_host:
                torch._foreach_lerp_(averages, weights, 1 - decay)
            else:  # with a factor that is 0 for a skipped step, to avoid a synchronisation
                increments = torch._foreach_sub(weights, averages)
                torch._foreach_mul_(increments, (1 - decay) * finite.to(averages[0].dtype))
                torch._foreach_add_(averages, increments)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start(pl_module.denoiser.network)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self.updates:  # not after a micro-batch that only accumulated gradients
            self.update(pl_module.denoiser.network, is_finite(pl_module.gradient_norm))
            self.updates = trainer.global_step

    @contextmanager
    @torch.no_grad()
    def applied(self, network: nn.Module) -> Iterator[None]:
        """Copies the averages into the network, in its dtype, and restores its weights at exit, also on errors."""
        if not self.weights:
            yield
            return
        parameters = parts(network.parameters())
        own = [parameter.clone() for parameter in parameters]
        torch._foreach_copy_(parameters, parts(self.weights.values()))
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, own)

    def state_dict(self) -> dict[str, Any]:
        averages = whole(self.averages)
        return {"weights": averages[0], "others": averages[1:], "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.averages = [state_dict["weights"], *state_dict["others"]]
        self.updates = state_dict["updates"]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class HalfLifeEMA(EMA):
    """decay = 2^(-batch_size/h), h = min(half_life, ramp times the number of images seen so far): EDM's average.

    As in the code of Karras et al. 2022, with half_life 500,000 and ramp 0.05 for CIFAR-10.

    Args:
        half_life: number of images after which the share of past weights has halved.
        ramp: bounds the half-life by this fraction of the images seen so far.
        batch_size: images per optimiser step.
        device: see `EMA`.

    Raises:
        ValueError: an argument is not positive.
    """

    def __init__(
        self,
        half_life: float = 500_000,
        ramp: float = 0.05,
        batch_size: int = 512,
        device: str | None = None,
    ):
        for name, value in (("half_life", half_life), ("ramp", ramp), ("batch_size", batch_size)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        super().__init__(decay=0.5 ** (batch_size / half_life), warmup=False, device=device)
        self.half_life, self.ramp, self.batch_size = half_life, ramp, batch_size

    def decays_at(self, update):
        half_life = min(self.half_life, self.ramp * update * self.batch_size)
        return [0.5 ** (self.batch_size / half_life) if half_life else 0.0]


class PowerEMA(EMA):
    """decay = (1 - 1/n)^(gamma + 1) at update n = 1, 2, ...: the weight of update t in the average is ~ t^gamma.

    EDM2 (Karras et al. 2024, arXiv:2312.02696, sec. 3.1). The length of an average is given by `std`, the relative
    standard deviation of that profile: 0.10 averages over about the last tenth of the run, at any time. From snapshots
    of several lengths, averages of other lengths can be computed after training, e.g. with `weights=0.07` when sampling
    (`post_hoc`).

    Args:
        stds: lengths, each in (0, 0.28]; the first is used for sampling and scoring.
        snapshot_every: optimiser steps between two snapshots of all averages, in <run folder>/ema; 0 for none.
        device: see `EMA`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, stds: Sequence[float] = (0.05, 0.10), snapshot_every: int = 1000, device: str | None = None
    ):
        super().__init__(decay=0.0, warmup=False, device=device)
        if not stds:
            raise ValueError("stds must name at least one length")
        self.exponents = [post_hoc.exponent(std) for std in stds]
        if snapshot_every < 0:
            raise ValueError(f"snapshot_every must be at least 0, got {snapshot_every}")
        self.decay = None  # not constant
        self.stds, self.snapshot_every = list(stds), snapshot_every

    @property
    def name(self):
        return f"ema std={self.stds[0]:g}"

    def decays_at(self, update):
        return [(1 - 1 / (update + 1)) ** (gamma + 1) for gamma in self.exponents]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        before = self.updates
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        due = self.snapshot_every and (
            self.updates % self.snapshot_every == 0 or self.updates == trainer.max_steps
        )
        if due and self.updates != before:
            averages = whole(self.averages)
            if trainer.is_global_zero:
                with tolerated("snapshot of the averages"):
                    folder = Path(trainer.default_root_dir) / post_hoc.FOLDER
                    post_hoc.save(folder, self.updates, self.stds, averages)


class ScheduleFreeAverage(EMA):
    """The average x of optimizer=schedule_free (Defazio et al. 2024, arXiv:2405.15682).

    It is computed from the weights and the optimiser's state when it is needed: for validation, previews, scores and
    checkpoints.
    """

    def __init__(self) -> None:
        self._optimizer: ScheduleFreeAdamW | None = None
        self._names: dict[nn.Parameter, str] = {}
        super().__init__(decay=0.0, warmup=False)
        self.decay = None

    @property
    def name(self):
        return "schedule-free average"

    @property
    def averages(self) -> list[Weights]:
        """The average by parameter name, in a list of one."""
        if self._optimizer is not None and self._stale:
            found = self._optimizer.averages()
            self._averages = [
                {name: found[p].to(_at_least_float32(p.dtype)) for p, name in self._names.items()}
            ]
            self._stale = False
        return self._averages

    @averages.setter
    def averages(self, averages: list[Weights]) -> None:
        self._averages, self._stale = averages, False

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self._names = {p: name for name, p in pl_module.denoiser.network.named_parameters()}
        self._optimizer = trainer.optimizers[0]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step != self.updates:
            self._stale = True
            self.updates = trainer.global_step
