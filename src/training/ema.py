"""Averages of the network's weights: what is sampled from and scored.

Lightning's own weight averaging is not used: it breaks resuming with torch.compile, stores exchanged
weights when an exception meets validation, and costs several times as much.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from src.runs.files import forgiving
from src.training import post_hoc
from src.training.checkpoint import set_aside

Weights = dict[str, Tensor]


class EMA(Callback):
    """average <- decay average + (1 - decay) weights, once each optimiser step.

    Args:
        decay: in [0, 1); 0.9999 is DDPM's (Ho et al. 2020, app. B).
        warmup: use min(decay, (1 + n) / (10 + n)) at update n, so that the initial weights are forgotten
            quickly; without it 61 % of them remain after 5,000 updates at 0.9999.

    Attributes:
        averages: the averages by parameter name; the first is the one that is judged.
        updates: optimiser steps that they have seen.

    Raises:
        ValueError: decay is out of range.
    """

    # subclasses keep the name, by which a checkpoint's average is found
    state_key = "EMA"

    def __init__(self, decay: float = 0.9999, warmup: bool = True):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay: float | None = decay
        self.warmup = warmup
        self.updates = 0
        self.averages: list[Weights] = [{}]

    @property
    def weights(self) -> Weights:
        """The average that is judged."""
        return self.averages[0]

    @property
    def name(self) -> str:
        """What protocols call it, besides its decay."""
        return "ema"

    def decays_at(self, update: int) -> list[float]:
        """The decay of each average at the update with this number, from 0."""
        return [min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = dict(pl_module.denoiser.network.named_parameters())
        number = len(self.decays_at(0))
        if len(self.averages) != number or self.weights.keys() != weights.keys():
            self.averages = [{n: w.detach().clone() for n, w in weights.items()} for _ in range(number)]
        else:
            self.averages = [{n: a.to(weights[n]) for n, a in average.items()} for average in self.averages]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.updates:  # a micro-batch that has only accumulated gradients
            return
        if not pl_module.skipped:
            weights = list(pl_module.denoiser.network.parameters())
            for average, decay in zip(self.averages, self.decays_at(self.updates), strict=True):
                torch._foreach_lerp_(list(average.values()), weights, 1 - decay)
        self.updates = trainer.global_step

    @contextmanager
    @torch.no_grad()
    def applied(self, network: nn.Module) -> Iterator[None]:
        """Puts the average in the weights' place, and the weights back at the end, whatever happens."""
        if not self.weights:
            yield
            return
        parameters = list(network.parameters())
        own = [parameter.clone() for parameter in parameters]
        torch._foreach_copy_(parameters, list(self.weights.values()))
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, own)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "others": self.averages[1:], "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.averages = [state_dict["weights"], *state_dict["others"]]
        self.updates = state_dict["updates"]


class HalfLifeEMA(EMA):
    """decay = 2^(-batch_size/h), h = min(half_life, ramp times the images seen so far): EDM's.

    Karras et al. 2022's code, with half_life 500,000 and ramp 0.05 for CIFAR-10.

    Args:
        half_life: images after which a weight's share has halved.
        ramp: bounds the half-life by this share of the images seen.
        batch_size: images of one optimiser step.

    Raises:
        ValueError: a number is not positive.
    """

    def __init__(self, half_life: float = 500_000, ramp: float = 0.05, batch_size: int = 512):
        for name, value in (("half_life", half_life), ("ramp", ramp), ("batch_size", batch_size)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        super().__init__(decay=0.5 ** (batch_size / half_life), warmup=False)
        self.half_life, self.ramp, self.batch_size = half_life, ramp, batch_size

    def decays_at(self, update):
        half_life = min(self.half_life, self.ramp * update * self.batch_size)
        return [0.5 ** (self.batch_size / half_life) if half_life else 0.0]


class PowerEMA(EMA):
    """decay = (1 - 1/n)^(gamma + 1) at update n = 1, 2, ...: the weight of update t in the average is ~ t^gamma.

    EDM2 (Karras et al. 2024, arXiv:2312.02696, sec. 3.1). The length is told by `std`, the relative standard
    deviation of that profile: 0.10 averages over about the last tenth of the run, however long it gets.
    Snapshots of several lengths make any other one afterwards: `weights=0.07` at the doors (`post_hoc`).

    Args:
        stds: lengths, each in (0, 0.28]; the first is the one that is judged.
        snapshot_every: optimiser steps between two snapshots of all averages, in <run folder>/ema; 0 for none.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, stds: Sequence[float] = (0.05, 0.10), snapshot_every: int = 1000):
        super().__init__(decay=0.0, warmup=False)
        if not stds:
            raise ValueError("stds must name at least one length")
        self.exponents = [post_hoc.exponent(std) for std in stds]
        if snapshot_every < 0:
            raise ValueError(f"snapshot_every must be at least 0, got {snapshot_every}")
        self.decay = None  # none in particular
        self.stds, self.snapshot_every = list(stds), snapshot_every

    @property
    def name(self):
        return f"ema std={self.stds[0]:g}"

    def decays_at(self, update):
        return [(1 - 1 / (update + 1)) ** (gamma + 1) for gamma in self.exponents]

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            for path in post_hoc.snapshots(self._folder(trainer)):
                if post_hoc.step_of(path) > trainer.global_step:
                    set_aside(path)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        before = self.updates
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        due = self.snapshot_every and (
            self.updates % self.snapshot_every == 0 or self.updates == trainer.max_steps
        )
        if due and self.updates != before and trainer.is_global_zero:
            with forgiving(f"snapshot of the averages at step {self.updates}"):
                post_hoc.save(self._folder(trainer), self.updates, self.stds, self.averages)

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / post_hoc.FOLDER
