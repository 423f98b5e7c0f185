"""Checkpoints: atomic writes with a checksum, and the callback that saves and rotates them."""

import errno
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from src.data.datamodule import ImageDataModule
from src.errors import UserError
from src.runs.files import Damaged, Sidecar, read_json, replacing, sidecar_path, write_json
from src.runs.folder import BEST_FILE, checkpoints_by_step
from src.training import post_hoc
from src.training.dashboard import cut_curves
from src.training.ema import EMA
from src.training.reading import read_checkpoint
from src.training.sharded import ShardedStrategy
from src.training.signals import Stopped

log = logging.getLogger(__name__)

# Suffix of files of later steps, when a run is resumed from an earlier step.
SET_ASIDE = ".set_aside"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Streams to a temporary file, flushes it to disk, renames it, and writes its checksum to the sidecar.

    Lightning makes one copy in memory and another in $TMPDIR; if that is another filesystem, a kill during the move
    leaves a truncated checkpoint.

    Checkpoints whose weights, averages or optimiser moments are not finite are not written, and a failed write does not
    stop the training. Both are logged, and an existing file of that name is kept.

    Attributes:
        failures: number of failed or refused writes since the last successful one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures = 0

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        broken = not_finite(checkpoint)
        if broken:
            self.failures += 1
            log.error("%s is not written: %s is not finite", path, broken)
            return
        try:
            _write(checkpoint, path)
            self.failures = 0
        except OSError as error:
            self.failures += 1
            log.error("%s; %s is not written", reason(error, checkpoint), path)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads tensors and primitives only, regardless of the arguments; code in the file is not executed."""
        return read_checkpoint(Path(path), mapped=False)  # tensors of the state stay in use


def tensors_of(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dictionaries and lists, with their dotted names."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, dict | list | tuple):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in pairs:
            yield from tensors_of(value, f"{name}.{key}" if name else str(key))


def not_finite(checkpoint: dict[str, Any]) -> str | None:
    """The name of a weight, average or moment that is not finite, if there is one."""
    return next((name for name, tensor in _trained(checkpoint) if not bool(tensor.isfinite().all())), None)


def _trained(checkpoint: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The weights, optimiser moments and averages. Other states may be infinite, e.g. EarlyStopping's score."""
    for name in ("state_dict", "optimizer_states"):
        yield from tensors_of(checkpoint.get(name), name)
    averages = checkpoint.get("callbacks", {}).get(EMA.state_key)
    yield from tensors_of(averages, f"callbacks.{EMA.state_key}")


def reason(error: OSError, checkpoint: dict[str, Any]) -> str:
    """The reason why a checkpoint could not be written, for messages."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        needed = sum(tensor.nbytes for _, tensor in tensors_of(checkpoint))
        return f"disk full, {needed / 1e6:.1f} MB needed"
    return error.strerror or str(error)


class _Hashing(RawIOBase):
    """Writes to a file, hashing and counting the bytes; keeps the OSError that torch's writer hides."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.digest = sha256()
        self.size = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        stream = _Hashing(file)
        try:
            torch.save(checkpoint, stream)
        except Exception as error:
            raise stream.error or error from None
        # From here on, a kill leaves an intact checkpoint without a sidecar, never one with a wrong sidecar.
        sidecar_path(path).unlink(missing_ok=True)
    origin = checkpoint.get("origin", {})  # stored by ResumeCheck
    record = Sidecar(
        stream.size,
        stream.digest.hexdigest(),
        checkpoint["global_step"],
        checkpoint.get(ImageDataModule.__qualname__, {}).get("samples"),
        origin.get("world_size", 1),
        origin.get("data"),
    )
    write_json(sidecar_path(path), asdict(record))


def set_aside(path: Path) -> None:
    """Renames a file of a later step than that from which the training continues, with a warning."""
    log.warning("%s renamed to %s: the training continues from an earlier step", path, path.name + SET_ASIDE)
    sidecar_path(path).unlink(missing_ok=True)
    path.rename(path.with_name(path.name + SET_ASIDE))


def _known_step(checkpoint: Path) -> float:
    """The step in the sidecar; infinite without one: after a kill between the two writes the file is the newest."""
    try:
        return read_json(sidecar_path(checkpoint), Sidecar).step
    except (FileNotFoundError, Damaged):
        return math.inf


class Checkpoints(Checkpoint):
    """Saves every `every` optimiser steps, at the end of training, and when a signal or an error stops it.

    After an error, the steps that are complete are saved: at an error in a step, those before it. Nothing is saved if
    the error came between the update of the weights and that of their average.

    Keeps the newest `keep` files. If the training continues from an earlier step, checkpoints of later steps, including
    the best one, and later snapshots of averages are renamed, so that all files belong to one history.

    Args:
        folder: the folder of step_<k>.ckpt.
        config: the composed configuration, primitives only. It is stored in each file, so that the file can be loaded
            without the run folder.
        every: optimiser steps between two checkpoints.
        keep: number of files to keep, at least 2, since the newest may be damaged.
        stop_after: number of consecutive failed writes after which the training is stopped.

    Raises:
        ValueError: an argument is too small.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], every: int = 1000, keep: int = 2, stop_after: int = 3
    ):
        for name, number, least in (("every", every, 1), ("keep", keep, 2), ("stop_after", stop_after, 1)):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        self.folder = Path(folder)
        self.config = config
        self.every = every
        self.keep = keep
        self.stop_after = stop_after
        self._tried = self._saved = -1

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tried = self._saved = trainer.global_step
        if trainer.is_global_zero:
            for leftover in self.folder.glob(".*.tmp"):
                leftover.unlink()
            cut_curves(Path(trainer.default_root_dir), trainer.global_step)
            for path in checkpoints_by_step(self.folder):
                if path > self._path(trainer.global_step):
                    set_aside(path)
            for path in post_hoc.snapshots(Path(trainer.default_root_dir) / post_hoc.FOLDER):
                if post_hoc.step_of(path) > trainer.global_step:
                    set_aside(path)
            best = self.folder / BEST_FILE
            if best.is_file() and _known_step(best) > trainer.global_step:
                set_aside(best)
                if best.with_suffix(".json").is_file():
                    set_aside(best.with_suffix(".json"))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # once per step, although this is called for every micro-batch
        if trainer.global_step % self.every == 0 and trainer.global_step != self._tried:
            failures = self._save(trainer)
            if failures >= self.stop_after:
                raise UserError(
                    f"{failures} checkpoints in a row could not be written to {self.folder}, see above: free disk space"
                    " there, or increase callbacks.checkpoints.stop_after"
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._save(trainer):
            raise UserError(self._lost(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves what has been trained, whatever the exception is."""
        if self._saved < 0:  # the training has not started
            return
        if not isinstance(exception, Stopped):
            if trainer.is_global_zero:
                self._save_after_error(trainer, pl_module)
        elif self._save(trainer):
            log.error("%s", self._lost(trainer))  # the exit status remains that of the signal

    def _save_after_error(self, trainer: Trainer, module: LightningModule) -> None:
        """Saves without the other ranks, which may be gone, and keeps all earlier checkpoints."""
        step, ema = trainer.global_step, module.ema
        if module.is_updating or (ema is not None and ema.updates != step):
            log.error("step %d is not saved, since the error came in the middle of an update", step)
        elif isinstance(trainer.strategy, ShardedStrategy):
            log.error("step %d is not saved, since its weights are divided among the processes", step)
        elif step not in (self._saved, self._tried):
            try:
                content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
                trainer.strategy.checkpoint_io.save_checkpoint(content, self._path(step))
            except Exception as error:  # e.g. one of the device, after which nothing can be read from it
                log.error("step %d is not saved: %s", step, error)
        kept = checkpoints_by_step(self.folder)
        if kept:
            log.error("an error at step %d ends the training; continue with ckpt=%s", step, kept[-1])

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.ckpt"

    def _lost(self, trainer: Trainer) -> str:
        kept = checkpoints_by_step(self.folder)
        return f"step {trainer.global_step} could not be saved in {self.folder}, see above: " + (
            f"continue with ckpt={kept[-1]}" if kept else "there is no earlier checkpoint"
        )

    def _save(self, trainer: Trainer) -> int:
        """Saves unless this step is saved already; returns the number of consecutive failures, equal on all ranks."""
        step = trainer.global_step
        if step == self._saved:
            return 0
        self._tried = step
        trainer.save_checkpoint(self._path(step), weights_only=False)
        # only rank 0 writes; the other ranks must stop with it, or they would wait in a collective
        failures = trainer.strategy.broadcast(trainer.strategy.checkpoint_io.failures)
        if failures:
            return failures
        self._saved = step
        if trainer.is_global_zero:
            for old in checkpoints_by_step(self.folder)[: -self.keep]:
                old.unlink()
                sidecar_path(old).unlink(missing_ok=True)
        return 0
