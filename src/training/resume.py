"""What a resumed training still has in common with the one that it continues, said aloud.

bit-exact      the numbers are those of the uninterrupted run
order-exact    the same images in the same order, none left out or repeated. Times, flips and noise are the same too and
               sums are rounded differently, but for these: another batch size means other times, flips and noise
               (they are drawn for the whole batch), another type of device other noise (its generator has other
               numbers), another size of the micro-batches other dropout
approximate    the data, the code or the experiment itself has changed: only if it is allowed
"""

import logging
import warnings
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from src.errors import UserError
from src.runs.machine import is_first_process

log = logging.getLogger(__name__)

# Options that the numbers of a training do not depend on: where things lie, what is watched and for how long.
FREE = (
    "allow_changes",
    "cache",
    "callbacks",
    "ckpt",
    "clipping",
    "data.cache",
    "data.root",  # the fingerprint tells whether the images are others
    "generation",
    "logger",
    "metrics",
    "name",
    "runs",
    "sampler",
    "spacing",
    "trainer.max_steps",
    "validate_every",
    "workers",
)
# Options that change how the stream is cut up and rounded, and in part what is drawn, not which images follow.
ORDER = (
    "batch_size",
    "compile",
    "max_device_batch",
    "trainer.accelerator",
    "trainer.deterministic",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
)
# Options whose values come back with the optimiser's and the schedule's state.
TUNING = ("optimizer", "lr_schedule")
# Rooms of src/ whose code the numbers of a training depend on.
ROOMS = ("data", "diffusion", "model", "training", "randomness.py")
LISTED = 6


@dataclass(frozen=True)
class Origin:
    """What the numbers of a training depend on besides its seed; kept in every checkpoint.

    Attributes:
        data: fingerprint of the training set.
        code: fingerprints of the source files by path.
        world_size: number of processes.
        accumulation: micro-batches of an optimiser step.
        machine: versions and devices by name.
    """

    data: str
    code: dict[str, str]
    world_size: int
    accumulation: int
    machine: dict[str, str]


def code_fingerprints() -> dict[str, str]:
    """The source files that a training runs through: path under src/ -> start of the SHA-256."""
    src = Path(__file__).parent.parent
    files = [file for room in ROOMS for file in sorted([*(src / room).rglob("*.py"), src / room])]
    return {
        file.relative_to(src).as_posix(): sha256(file.read_bytes()).hexdigest()[:12]
        for file in files
        if file.is_file()
    }


def machine(trainer: Trainer) -> dict[str, str]:
    """What rounding depends on."""
    device = trainer.strategy.root_device
    cuda = device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "threads": "" if cuda else str(torch.get_num_threads()),
    }


def origin(trainer: Trainer, data: str) -> Origin:
    """What the numbers of a training on data of this fingerprint depend on."""
    return Origin(
        data, code_fingerprints(), trainer.world_size, trainer.accumulate_grad_batches, machine(trainer)
    )


def level(then: dict[str, Any], now: dict[str, Any]) -> tuple[str, list[str]]:
    """How exactly a run goes on.

    Args:
        then: the stored `Origin` as a dictionary, and the flat `config` of the checkpoint.
        now: the same of this training.

    Returns:
        "bit-exact", "order-exact" or "approximate", and what differs, in words; of the level itself only.
    """
    keys = _different(then["config"], now["config"])
    decisive = [key for key in keys if not _below(key, FREE + ORDER)]
    changed = [f"{key}: {then['config'].get(key)} -> {now['config'].get(key)}" for key in decisive]
    if then["data"] != now["data"]:
        changed.append(f"training images: fingerprint {then['data'][:12]} -> {now['data'][:12]}")
    changed += [f"src/{file}" for file in _different(then["code"], now["code"])]
    if changed:
        return "approximate", changed
    rounding = [key for key in keys if _below(key, ORDER)]
    rounding += [name for name in ("world_size", "accumulation") if then[name] != now[name]]
    for name in _different(then["machine"], now["machine"]):
        rounding.append(f"{name}: {then['machine'].get(name)} -> {now['machine'].get(name)}")
    if not now["deterministic"]:
        rounding.append("kernels that are not deterministic (trainer.deterministic=false)")
    return ("order-exact", rounding) if rounding else ("bit-exact", [])


def _different(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))


def _shapes(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(weight, "shape", None) for name, weight in weights.items()}


def _below(key: str, options: tuple[str, ...]) -> bool:
    return any(key == option or key.startswith(f"{option}.") for option in options)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def retune(trainer: Trainer, configured: Any) -> None:
    """Puts fresh options in the place of those that came with an optimiser's state.

    Args:
        trainer: its optimiser and schedule have been restored.
        configured: what the module's `configure_optimizers` returns.
    """
    fresh, schedule = configured, None
    if isinstance(configured, dict):
        fresh, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        with warnings.catch_warnings(action="ignore"):  # no optimiser steps in between: meant
            for _ in range(trainer.global_step):
                schedule.step()
    for group, options in zip(trainer.optimizers[0].param_groups, fresh.param_groups, strict=True):
        group.update({name: value for name, value in options.items() if name != "params"})
    if schedule is not None:
        trainer.lr_scheduler_configs[0].scheduler.load_state_dict(schedule.state_dict())


class ResumeCheck(Callback):
    """Keeps the origin of a training in its checkpoints, and holds it against that of a run that is continued.

    If optimiser or learning-rate schedule have changed, they go on as if they had been so from the start: the state
    (moments) is the checkpoint's, the options are the new ones, and the rate is that of the new schedule at this step.

    Args:
        config: the composed configuration, primitives only.
        checkpoint: the file to continue from; None for a new run.
        allow_changes: go on even if data, code or the experiment have changed.
    """

    def __init__(self, config: dict[str, Any], checkpoint: Path | None, allow_changes: bool):
        self.config = config
        self.checkpoint = checkpoint
        self.allow_changes = allow_changes
        self._origin: Origin | None = None
        self._retuned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._origin = origin(trainer, trainer.datamodule.source.fingerprint("train"))

    def check(self, trainer: Trainer, module: LightningModule, data: LightningDataModule) -> None:
        """Refuses what may not go on, and says how exactly the rest does; to be called before anything is written.

        Raises:
            UserError: data, code or the experiment have changed, and it is not allowed; names what differs. Or the
                weights are of other shapes.
        """
        if self.checkpoint is None:
            return
        # mapped, not read: the weights are of no interest here
        stored = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=True)
        if "origin" not in stored:
            raise UserError(f"ckpt={self.checkpoint}: not a checkpoint of this project's trainings")
        deterministic = trainer.strategy.root_device.type == "cpu" or bool(
            torch.are_deterministic_algorithms_enabled()
        )
        then = {**stored["origin"], "config": flat(stored["config"])}
        if is_first_process():
            data.prepare_data()
            fingerprint = data.source.fingerprint("train")
        else:  # its machine may not have the data yet, and the first process looks at them
            fingerprint = then["data"]
        now = {
            **asdict(origin(trainer, fingerprint)),
            "config": flat(self.config),
            "deterministic": deterministic,
        }
        self._retuned = any(_below(key, TUNING) for key in _different(then["config"], now["config"]))
        name, differences = level(then, now)
        if name == "approximate" and not self.allow_changes:
            more = f", and {len(differences) - LISTED} more" if len(differences) > LISTED else ""
            raise UserError(
                f"ckpt={self.checkpoint} is of another experiment ({'; '.join(differences[:LISTED])}{more}): "
                "undo the changes, or go on with allow_changes=true"
            )
        unfit = _different(_shapes(stored["state_dict"]), _shapes(module.state_dict()))
        if unfit:
            raise UserError(
                f"ckpt={self.checkpoint}: {len(unfit)} of its weights do not fit ({unfit[0]} is the first), which"
                " allow_changes=true cannot mend: choose model, data, variance and weighting as they were"
            )
        if is_first_process():
            log.info(
                "resume      %s from step %d%s",
                name,
                stored["global_step"],
                f" ({'; '.join(differences)})" if differences else "",
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._retuned:
            retune(trainer, pl_module.configure_optimizers())

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["origin"] = asdict(self._origin)
