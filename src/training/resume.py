"""How exactly a resumed training continues its run.

bit-exact      the results are those of the uninterrupted run
order-exact    the same images in the same order, none skipped or repeated. Times, flips and noise are the same and only
               the rounding of sums differs, with these exceptions: another batch size changes times, flips and noise
               (they are drawn for the whole batch), another type of device changes the noise (its generator differs),
               another micro-batch size changes dropout
approximate    the data, the code or the experiment has changed, or may have changed
"""

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from src.errors import UserError
from src.training.fingerprint import code_fingerprints
from src.training.reading import read_checkpoint

log = logging.getLogger(__name__)

# Lightning's callbacks that do not change the results; those of `src` do not either.
PASSIVE = (
    "DeviceStatsMonitor",
    "EarlyStopping",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "RichModelSummary",
    "RichProgressBar",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
)
LISTED = 6


@dataclass(frozen=True)
class Origin:
    """What the results of a training depend on besides its configuration; stored in every checkpoint.

    Attributes:
        data: fingerprint of the training set; None if the data module has no source.
        code: the result of `code_fingerprints`.
        world_size: number of processes.
        accumulation: micro-batches per optimiser step.
        machine: versions and devices by name.
    """

    data: str | None
    code: dict[str, Any]
    world_size: int
    accumulation: int
    machine: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """Descriptions of the differences between a checkpoint and the training that continues from it.

    Attributes:
        experiment: changed options and data on which the results depend.
        code: changed modules.
        unknown: what cannot be compared.
        rounding: changes that affect only draws or rounding.
    """

    experiment: list[str]
    code: list[str]
    unknown: list[str]
    rounding: list[str]

    @property
    def level(self) -> str:
        """ "bit-exact", "order-exact" or "approximate"."""
        if self.experiment or self.code or self.unknown:
            return "approximate"
        return "order-exact" if self.rounding else "bit-exact"

    @property
    def differences(self) -> list[str]:
        """The differences that determine the level."""
        return [*self.experiment, *self.code, *self.unknown] or self.rounding


def compare(then: dict[str, Any], now: dict[str, Any], effects: Callable[[str], str]) -> Comparison:
    """Compares a checkpoint with the training that continues from it.

    Args:
        then: the stored `Origin` as a dictionary, and the flat `config` of the checkpoint.
        now: the same for this training, whether its kernels are `deterministic`, and the part on which the loss of an
            image depends through the others of its micro-batch (`paired`; empty for none).
        effects: maps a dotted option to the effect of changing it: "none" or "once" (no effect), "order", "tuning" or
            "experiment".
    """
    callbacks = _unknown_callbacks(then["config"]) | _unknown_callbacks(now["config"])
    experiment, rounding = [], []
    for key in _different(then["config"], now["config"]):
        effect = "experiment" if ".".join(key.split(".")[:2]) in callbacks else effects(key)
        if effect == "order":
            rounding.append(key)
        elif effect not in ("none", "once"):
            experiment.append(f"{key}: {then['config'].get(key)} -> {now['config'].get(key)}")
    if then["data"] != now["data"]:
        experiment.append(f"training images: fingerprint {_short(then['data'])} -> {_short(now['data'])}")
    unknown = [f"{name}: {target} may change the results" for name, target in sorted(callbacks.items())]
    code = []
    if then["code"].get("format") == now["code"]["format"]:
        changed = _different(then["code"]["modules"], now["code"]["modules"])
        code = [f"code: {module} has changed" for module in changed]
        if "assembly" in then["code"]:  # not in checkpoints of earlier releases
            changed = _different(then["code"]["assembly"], now["code"]["assembly"])
            unknown += [f"code: {module}, which joins the parts, has changed" for module in changed]
    else:
        unknown.append(
            "code: cannot be compared, the checkpoint is from an earlier release or another Python version"
        )
    paired = now["paired"]
    for name in ("world_size", "accumulation"):
        if then[name] != now[name] and paired:
            experiment.append(f"{name}: {then[name]} -> {now[name]}, on which {paired} depends")
        elif then[name] != now[name]:
            rounding.append(name)
    for name in _different(then["machine"], now["machine"]):
        rounding.append(f"{name}: {then['machine'].get(name)} -> {now['machine'].get(name)}")
    if not now["deterministic"]:
        rounding.append("nondeterministic kernels (trainer.deterministic=false)")
    return Comparison(experiment, code, unknown, rounding)


def part_with_pairs(module: LightningModule) -> str:
    """The part that makes the loss of an image depend on the others of its micro-batch; empty if none does."""
    parts = ("coupling", "regularizer", "loss")
    return next((name for name in parts if getattr(getattr(module, name, None), "needs_pairs", False)), "")


def _unknown_callbacks(config: dict[str, Any]) -> dict[str, str]:
    """callbacks.<name> -> class, for callbacks that may change the results."""
    found = {}
    for key, target in config.items():
        parts = key.split(".")
        if len(parts) == 3 and parts[0] == "callbacks" and parts[2] == "_target_":
            ours = str(target).startswith("src.")
            passive = str(target).startswith("lightning.") and str(target).rpartition(".")[2] in PASSIVE
            if not ours and not passive:
                found[f"callbacks.{parts[1]}"] = str(target)
    return found


def _short(fingerprint: str | None) -> str:
    return str(fingerprint)[:12]


def _different(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))


def _shapes(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(weight, "shape", None) for name, weight in flat(weights).items()}


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by their dotted names."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def machine(trainer: Trainer) -> dict[str, str]:
    """The versions and devices on which rounding depends."""
    device = trainer.strategy.root_device
    cuda = device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "threads": "" if cuda else str(torch.get_num_threads()),
    }


def retune(trainer: Trainer, configured: Any) -> None:
    """Replaces the restored optimiser options by the configured ones.

    Args:
        trainer: its optimiser and schedule have been restored.
        configured: the result of the module's `configure_optimizers`.
    """
    fresh, schedule = configured, None
    if isinstance(configured, dict):
        fresh, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        with warnings.catch_warnings(action="ignore"):  # warns that there are no optimiser steps in between
            for _ in range(trainer.global_step):
                schedule.step()
    kept = ("params", *getattr(fresh, "counters", ()))
    for group, options in zip(trainer.optimizers[0].param_groups, fresh.param_groups, strict=True):
        group.update({name: value for name, value in options.items() if name not in kept})
    if schedule is not None:
        trainer.lr_scheduler_configs[0].scheduler.load_state_dict(schedule.state_dict())


class ResumeCheck(Callback):
    """Stores the origin of a training in its checkpoints, and compares it with that of a resumed run.

    If the optimiser or the learning-rate schedule has changed, the state (moments) is the checkpoint's, the options are
    the new ones, and the learning rate is that of the new schedule at this step.

    Args:
        config: the composed configuration, primitives only.
        checkpoint: the file to continue from; None for a new run.
        allow_changes: continue even if the data, the code or the experiment has changed.
        effects: maps a dotted option to the effect of changing it, see `compare`.
        upgrade: converts a configuration stored by an earlier release.
        packages: packages whose code is compared: `src`, and those trusted by the user.
        assembly: modules that join the parts; if they have changed, the resume is approximate, with a warning.
    """

    def __init__(
        self,
        config: dict[str, Any],
        checkpoint: Path | None,
        allow_changes: bool,
        effects: Callable[[str], str],
        upgrade: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config,
        packages: Sequence[str] = ("src",),
        assembly: Sequence[str] = (),
    ):
        self.config = config
        self.checkpoint = checkpoint
        self.allow_changes = allow_changes
        self.effects = effects
        self.upgrade = upgrade
        self.packages = packages
        self.assembly = assembly
        self._code: dict[str, Any] | None = None
        self._origin: Origin | None = None
        self._retuned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule
        self._origin = self._origin_of(trainer, pl_module, data, _data_fingerprint(data))

    def check(self, trainer: Trainer, module: LightningModule, data: LightningDataModule) -> None:
        """Checks whether the training may continue and logs how exactly; call before anything is written.

        In a requeued SLURM job, changed code is not an error, since the user cannot react to it.

        Raises:
            UserError: the data, the code or the experiment has changed without `allow_changes`; the message lists the
                differences. Or the weights have other shapes.
        """
        if self.checkpoint is None:
            return
        # memory-mapped, since the weights are not needed here
        stored = read_checkpoint(self.checkpoint)
        if "imported" in stored:
            raise UserError(
                f"ckpt={self.checkpoint}: imported weights have no optimiser to continue with; start with"
                f" init={self.checkpoint} instead"
            )
        if "origin" not in stored:
            raise UserError(f"ckpt={self.checkpoint}: not a checkpoint of this project")
        then = {**stored["origin"], "config": flat(self.upgrade(stored["config"]))}
        fingerprint = then["data"]  # on other machines the data may not be prepared yet
        if trainer.is_global_zero:
            data.prepare_data()
            fingerprint = _data_fingerprint(data)
        now = {
            **asdict(self._origin_of(trainer, module, data, fingerprint)),
            "config": flat(self.config),
            "paired": part_with_pairs(module),
            "deterministic": trainer.strategy.root_device.type == "cpu"
            or torch.are_deterministic_algorithms_enabled(),
        }
        changed = _different(then["config"], now["config"])
        self._retuned = any(self.effects(key) == "tuning" for key in changed)
        found = compare(then, now, self.effects)
        self._refuse_changes(found)
        unfit = _different(_shapes(stored["state_dict"]), _shapes(module.state_dict()))
        if unfit:
            raise UserError(
                f"ckpt={self.checkpoint}: {len(unfit)} weights have other shapes, the first is {unfit[0]}; this is an"
                " error even with allow_changes=true: choose the same model, data, variance and weighting"
            )
        if trainer.is_global_zero:
            for warning in [*found.code, *found.unknown]:
                log.warning("%s", warning)
            why = f" ({_listed(found.differences)})" if found.differences else ""
            log.info("resume      %s from step %d%s", found.level, stored["global_step"], why)

    def _refuse_changes(self, found: Comparison) -> None:
        requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        refused = found.experiment + ([] if requeued else found.code)
        if refused and not self.allow_changes:
            raise UserError(
                f"ckpt={self.checkpoint} is of another experiment ({_listed(refused)}): undo the changes, or continue"
                " with allow_changes=true"
            )

    def _origin_of(
        self, trainer: Trainer, module: LightningModule, data: LightningDataModule, fingerprint: str | None
    ) -> Origin:
        if self._code is None:
            self._code = code_fingerprints((module, data), self.packages, self.assembly)
        return Origin(
            fingerprint, self._code, trainer.world_size, trainer.accumulate_grad_batches, machine(trainer)
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._retuned:
            retune(trainer, pl_module.configure_optimizers())

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["origin"] = asdict(self._origin)


def _data_fingerprint(data: LightningDataModule) -> str | None:
    source = getattr(data, "source", None)
    return None if source is None else source.fingerprint("train")


def _listed(differences: list[str]) -> str:
    more = f", and {len(differences) - LISTED} more" if len(differences) > LISTED else ""
    return f"{'; '.join(differences[:LISTED])}{more}"
