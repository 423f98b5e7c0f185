"""`budget`: the steps that fit into a time, from a few steps on this machine, before a training is assembled."""

import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf

from src.app.assemble import Experiment, assemble, has_several_processes
from src.app.automatic import device_of
from src.errors import UserError
from src.runs.output import silent
from src.training.reading import read_checkpoint

log = logging.getLogger(__name__)

# Steps that are timed, after those that are not: at least so many, and so many seconds, but not more than LONGEST.
PROBED, WARM_UP, SECONDS, LONGEST = 12, 4, 4.0, 300
QUIET = ("sample_images", "track_fidelity", "checkpoints", "progress")


class StopWatch(Callback):
    """Times optimiser steps, and ends the training when they are enough.

    Args:
        device: of the training.
        clock: gives seconds; a GPU is waited for first.

    Attributes:
        seconds: of each step; the first has the start of the training in it.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self.device = device
        self.clock = clock
        self.seconds: list[float] = []
        self._last: float | None = None
        self._step = 0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def time(self, function: Callable[[], Any]) -> float:
        """Seconds of a function, the faster of two calls."""
        found = []
        for _ in range(2):
            begin = self.now()
            function()
            found.append(self.now() - begin)
        return min(found)

    def on_train_start(self, *arguments: Any) -> None:
        self._last = self.now()

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == self._step:  # a micro-batch
            return
        self._step = trainer.global_step
        now = self.now()
        self.seconds.append(now - self._last)
        self._last = now
        timed = self.seconds[WARM_UP:]
        enough = len(timed) >= PROBED and sum(timed) >= SECONDS
        trainer.should_stop = enough or len(timed) >= LONGEST


def probe(config: DictConfig, folder: Path, watch: StopWatch) -> Experiment:
    """Trains for a few steps without validation, previews, scores, checkpoints and loggers.

    Args:
        config: conf/train.yaml, composed; left as it is.
        folder: where it may write.
        watch: gets the times of the steps.
    """
    short = config.copy()
    OmegaConf.set_struct(short, False)
    short.trainer.max_steps = max(config.trainer.max_steps, WARM_UP + LONGEST)
    short.logger, short.ckpt = {}, None
    short.validate_every, short.bands = 10**9, "none"
    for name in QUIET:
        (short.callbacks or {}).pop(name, None)
    experiment = assemble(short, folder)
    experiment.trainer.callbacks.append(watch)
    experiment.trainer.fit(experiment.module, experiment.data)
    return experiment


def with_steps_of_budget(config: DictConfig, folder: Path) -> DictConfig:
    """The configuration with `trainer.max_steps` from `budget`, which is logged; without a budget as it is.

    A step is loss, gradients, optimiser, average and data. On the CPU its processor time counts, over all threads, so
    that other processes do not change the number by much; on other devices its time. Start-up counts, e.g. compiling,
    but on the CPU not the compiler's own processes. A training that is continued keeps its number.

    Args:
        config: conf/train.yaml, composed; left as it is.
        folder: the run's folder.

    Raises:
        UserError: it is not finite; there are several processes; `trainer.max_steps` is given too; or the budget of a
            run that is continued was another one.
    """
    if config.budget is None:
        return config
    typed = HydraConfig.initialized() and any(
        override.startswith("trainer.max_steps=") for override in HydraConfig.get().overrides.task
    )
    fixed = config.copy()
    if config.ckpt:
        if not typed:
            fixed.trainer.max_steps = _stored(config)
        return fixed
    if typed:
        raise UserError("budget: trainer.max_steps follows from it; give one of the two")
    if not math.isfinite(config.budget):
        raise UserError(f"budget={config.budget:g}: give a number of seconds")
    if has_several_processes(config):
        raise UserError("budget: one process is timed, and this training has several; give trainer.max_steps")
    log.info("budget      timing a few steps")
    cpu = device_of(config) == "cpu"
    watch = StopWatch(torch.device(device_of(config)), time.process_time if cpu else time.perf_counter)
    with silent(), tempfile.TemporaryDirectory() as place:  # the training logs its own messages
        probe(config, Path(place), watch)
    start, step = sum(watch.seconds[:WARM_UP]), statistics.fmean(watch.seconds[WARM_UP:])
    fixed.trainer.max_steps = steps = max(1, WARM_UP + int((config.budget - start) / step))
    log.info(
        "budget      %s steps of %.3g s%s in %g s",
        f"{steps:,}",
        step,
        " of processor time" if cpu else "",
        config.budget,
    )
    return fixed


def _stored(config: DictConfig) -> int:
    """The number of steps of the run that is continued.

    Raises:
        UserError: it had another budget.
    """
    stored = read_checkpoint(Path(config.ckpt))["config"]
    if stored.get("budget") != config.budget:
        raise UserError(
            f"budget={config.budget:g}: this training began with budget={stored.get('budget')}; give trainer.max_steps"
            " for another length"
        )
    return stored["trainer"]["max_steps"]
