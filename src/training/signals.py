"""Signals: the training is saved at the next step boundary and left with the usual exit status."""

import logging
import os
import signal
import subprocess
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from src.runs.machine import slurm_job

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(SystemExit):
    """Leaves the training because of a signal; the exit status is 128 + its number, as in a shell.

    Args:
        signum: the signal.
        rank: of this process. Only rank 0 tells the signal: Lightning would take another status of a child
            for a crash, and kill rank 0 while it is still closing its logs.
    """

    def __init__(self, signum: int, rank: int):
        super().__init__(128 + signum if rank == 0 else 0)
        self.signum = signum


class StopOnSignal(Checkpoint):
    """SIGTERM, SIGINT and SIGUSR1 stop the training after the current optimiser step.

    The handler only sets a flag: a save inside a handler may fall into the middle of an update, and a
    collective inside one waits for ever if the other ranks are elsewhere. At each step boundary the ranks
    agree, so that one signalled process is enough. Validation, previews and scores are finished first. A second
    SIGINT leaves at once. SIGUSR1 in a SLURM job also puts the job back into the queue.

    A `Checkpoint` by class only so that Lightning runs it last: nothing of the step is left undone.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._step = 0
        self._previous: dict[int, Any] = {}
        self._group: torch.distributed.ProcessGroup | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signum = 0
        self._previous = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self._listen()
        if trainer.world_size > 1:
            # On the CPU: agreeing must not make the step wait for an accelerator.
            self._group = torch.distributed.new_group(backend="gloo")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()  # once more, in the place of Lightning's own handlers
        self._step = trainer.global_step
        self._stop_if_asked(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:  # not after a micro-batch that has only accumulated gradients
            self._step = trainer.global_step
            if not _validation_is_due(trainer):
                self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_asked(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Stopped):
            self._restore()
        elif trainer.is_global_zero and exception.signum == signal.SIGUSR1 and slurm_job():
            requeue()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def _listen(self) -> None:
        for signum in SIGNALS:
            signal.signal(signum, self._handle)

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def _handle(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and self._signum == signal.SIGINT:
            os._exit(128 + signum)
        self._signum = signum

    def _stop_if_asked(self, trainer: Trainer) -> None:
        signum = self._signum
        if self._group is not None:
            agreed = torch.tensor(signum)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=self._group)
            signum = int(agreed)
        if signum:
            if trainer.is_global_zero:
                name = signal.Signals(signum).name
                log.warning("%s: saving at step %d and leaving", name, trainer.global_step)
            raise Stopped(signum, trainer.global_rank)


def _validation_is_due(trainer: Trainer) -> bool:
    """Whether Lightning validates between this step and the next: once stopped here, it would never make it up."""
    batches = trainer.global_step * trainer.accumulate_grad_batches
    return sum(trainer.num_val_batches) > 0 and batches % trainer.val_check_interval == 0


def requeue() -> None:
    """Puts this SLURM job back into the queue; its next start finds the run again by the job's number."""
    job = slurm_job()
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=30)
        log.warning("job %s is requeued", job)
    except (OSError, subprocess.SubprocessError) as error:
        log.error("not requeued: %s", error)
