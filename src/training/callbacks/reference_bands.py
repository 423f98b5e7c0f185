"""Compares a training with the reference band of its recipe."""

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from src.runs.files import write_json
from src.runs.folder import BANDS_FILE
from src.runs.output import tolerated
from src.training.callbacks.every import EverySteps
from src.training.callbacks.levels import LossesByLevel
from src.training.callbacks.track_fidelity import TrackFidelity
from src.training.reference_bands import LEVELS, Band, Values, describe_value

log = logging.getLogger(__name__)

MOST = 200
"""Largest number of recorded departures."""
NAMED = 2
"""Number of likely causes in the warning."""


class ReferenceBands(EverySteps):
    """Warns once if a training leaves the reference band of its recipe, and records where.

    At the end of each window of `every` steps it compares the mean loss at each noise level and the gradient norm,
    after a validation the losses of raw and averaged weights, after a scoring the scores. The training continues.
    All departures are written to <folder>/bands.json with the likely causes. Windows that a resumed training enters in
    their middle are left out.

    Args:
        band: the band; None to collect the values only.
        name: its name.
        folder: the run's folder.
        scores: whether scores are comparable with those of the band.
        every: steps of a window without a band.

    Attributes:
        values: what was observed.
        departures: values outside the band: step, name, value, the band's limits and z.
    """

    def __init__(self, band: Band | None, name: str, folder: Path, scores: bool = True, every: int = 20):
        super().__init__(band.every if band else every)
        self.band = band
        self.name = name
        self.folder = Path(folder)
        self.scores = scores
        self.values: Values = {}
        self.departures: list[dict[str, Any]] = []
        self._restart(0, torch.device("cpu"))

    @property
    def summary(self) -> str:
        """What the training is compared with, in one line."""
        band = self.band
        what = "losses by noise level and scores" if self.scores else "losses by noise level"
        last = max(max(curve["steps"]) for curve in band.curves.values())
        return f"{self.name}: {what} of {band.seeds} seeds up to step {last} (bands=none: no comparison)"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._restart(trainer.global_step, pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.add(outputs["losses"], outputs["times"])
        self._images += len(outputs["losses"]) * trainer.world_size
        if trainer.global_step != self._step:  # not after a micro-batch that only accumulates gradients
            self._step = trainer.global_step
            self._norms += pl_module.gradient_norm
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step
        sums, counts = (trainer.strategy.reduce(each, reduce_op="sum") for each in self._losses.read())
        if step - self._since == self.every:
            means = (sums / counts).tolist()
            found = {f"level_{k}": mean for k, mean in enumerate(means)}
            found["gradient_norm"] = float(self._norms) / self.every
            found["images"] = self._images / self.every
            self._compare(trainer, found)
        self._restart(step, module.device)
        tracker = next((c for c in trainer.callbacks if isinstance(c, TrackFidelity)), None)
        latest = tracker.latest if tracker and self.scores else None
        if latest is not None and latest.protocol["recipe"]["training_steps"] == step:
            self._compare(trainer, latest.scores)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raw, averaged = (
            float(trainer.callback_metrics.get(f"val/{name}", 0.0)) for name in ("loss", "loss_ema")
        )
        # without an average the raw weights take its place, in previews and scores too
        averaged = averaged or raw
        found = {"val_loss": raw, "val_loss_ema": averaged, "ema_gain": averaged / raw if raw else 0.0}
        self._compare(trainer, found)

    def state_dict(self) -> dict[str, Any]:
        return {"departures": self.departures}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.departures = state_dict["departures"]

    def _compare(self, trainer: Trainer, found: dict[str, float]) -> None:
        """Compares values of the current step; the same on all ranks."""
        step, was_inside = trainer.global_step, not self.departures
        for name, value in found.items():
            if value > 0:
                self.values.setdefault(name, {})[step] = value
        if self.band is None:
            return
        outside = [self._departure(name, step, value) for name, value in found.items()]
        outside = sorted((each for each in outside if each), key=lambda each: -abs(each["z"]))
        if not outside:
            return
        self.departures += outside[: MOST - len(self.departures)]
        if trainer.is_global_zero:
            causes = self.band.causes(self.values)
            if was_inside:
                self._warn(outside, causes)
            content = {
                "band": self.name,
                "limit": self.band.limit,
                "causes": [{"cause": cause, "cosine": cosine} for cause, cosine in causes],
                "departures": self.departures,
            }
            with tolerated("record of the reference band"):
                write_json(self.folder / BANDS_FILE, content)

    def _departure(self, name: str, step: int, value: float) -> dict[str, Any] | None:
        """A value outside the band with its limits; None for one inside."""
        if name == "images":
            if value == self.band.images:
                return None
            low = high = float(self.band.images)
            z = float("inf")
        else:
            z = self.band.z(name, step, value)
            if z is None or abs(z) <= self.band.limit:
                return None
            low, high = self.band.limits(name, step)
        return {"step": step, "name": name, "value": value, "low": low, "high": high, "z": min(z, 1e6)}

    def _warn(self, outside: list[dict[str, Any]], causes: list[tuple[str, float]]) -> None:
        worst = outside[0]
        limits = f"{worst['low']:.3g} to {worst['high']:.3g}"
        others = f" and {len(outside) - 1} other values" if len(outside) > 1 else ""
        likely = (
            "; ".join(cause for cause, _ in causes[:NAMED]) or "none of the known mistakes looks like this"
        )
        if worst["name"] == "images":
            likely = "batch_size is over all devices and micro-batches, not of each"
            limits = f"{self.band.images}"
        log.warning(
            "bands: step %d: %s is %.3g%s; the band %s has %s. Likely: %s. The training continues; %s lists all",
            worst["step"],
            describe_value(worst["name"]),
            worst["value"],
            others,
            self.name,
            limits,
            likely,
            self.folder / BANDS_FILE,
        )

    def _restart(self, step: int, device: torch.device) -> None:
        self._losses = LossesByLevel(LEVELS, device)
        self._norms: Tensor = torch.zeros((), device=device)
        self._images = 0
        self._since = self._step = step
