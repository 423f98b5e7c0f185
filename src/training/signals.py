"""Signal handling: the training saves a checkpoint after the current step and exits with status 128 + signal."""

import logging
import os
import signal
import time
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from src.runs.machine import requeue, slurm_job
from src.runs.stopping import Watch, handlers

log = logging.getLogger(__name__)

PATIENCE = 25.0
"""Seconds without progress after a signal until the process exits without saving."""


class Stopped(SystemExit):
    """Stops the training because of a signal; the exit status is 128 + the signal number, as in a shell.

    Args:
        signum: the signal.
        rank: rank of this process. Only rank 0 exits with the signal's status: Lightning treats a nonzero status of a
            child as a crash and would kill rank 0 while it is still closing its logs.
    """

    def __init__(self, signum: int, rank: int):
        super().__init__(128 + signum if rank == 0 else 0)
        self.signum = signum


class StepWatch(Watch):
    """Ends the process after a signal if the step makes no progress, e.g. if data loading or a collective hangs.

    It waits for `PATIENCE` seconds or three times the longest part of a step so far, whichever is longer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._since: float | None = None
        self._longest = 0.0

    def moved(self, waiting: bool = True) -> None:
        """Records that a part of a step has finished.

        Args:
            waiting: whether the next part is watched. Saves, scores and previews are not, since they may take long.
        """
        now = time.monotonic()
        if self._since is not None:
            self._longest = max(self._longest, now - self._since)
        self._since = now if waiting else None

    def react(self, signum: int) -> None:
        came = time.monotonic()
        while not self.ended.wait(0.2):
            since = self._since
            patience = max(PATIENCE, 3 * self._longest)
            if since is not None and time.monotonic() - max(since, came) > patience:
                log.error(
                    "%s: no progress for %.0f s; exiting without saving. If data loading hangs, try workers=0",
                    signal.Signals(signum).name,
                    patience,
                )
                os._exit(128 + signum)


class StopOnSignal(Checkpoint):
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP stop the training after the current optimiser step.

    The handler only sets a flag: a save in the handler could happen in the middle of an update, and a collective in the
    handler would deadlock if the other ranks are elsewhere. After each step the ranks reduce the flag, so it is enough
    to signal one process. Validation, previews and scores are finished first. A second SIGINT ends the process
    immediately, and so does any signal if there is no progress (`StepWatch`). If SIGHUP was ignored (nohup), it stays
    ignored. In a SLURM job, SIGUSR1 also requeues the job.

    It is a subclass of `Checkpoint` so that Lightning calls it after all other callbacks.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._step = 0
        self._previous: dict[int, Any] = {}
        self._watch = StepWatch()
        self._group: torch.distributed.ProcessGroup | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signum = 0
        self._previous = handlers()
        self._listen()
        self._watch.start()
        if trainer.world_size > 1:
            # On the CPU, so that the reduction does not synchronise with an accelerator.
            self._group = torch.distributed.new_group(backend="gloo")
            # Lightning's own SIGTERM broadcast synchronises with the device at every step.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()  # again, to replace Lightning's handlers
        self._step = trainer.global_step
        self._stop_if_signalled(trainer)
        self._watch.moved()

    def on_train_batch_start(self, *_: Any) -> None:
        self._watch.moved()

    def on_after_backward(self, *_: Any) -> None:
        self._watch.moved(waiting=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:  # not after a micro-batch that only accumulated gradients
            self._step = trainer.global_step
            if not _validation_is_due(trainer):
                self._stop_if_signalled(trainer)
        self._watch.moved()

    def on_validation_start(self, *_: Any) -> None:
        self._watch.moved(waiting=False)  # this rank may wait here for rank 0 to finish a preview

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_signalled(trainer)
        self._watch.moved()

    def on_train_epoch_end(self, *_: Any) -> None:
        self._watch.moved(waiting=False)  # the end of the training, before the last save

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Stopped):
            self._restore()
        elif trainer.is_global_zero and exception.signum == signal.SIGUSR1 and slurm_job():
            requeue()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def _listen(self) -> None:
        for signum in self._previous:
            signal.signal(signum, self._handle)

    def _restore(self) -> None:
        if self._previous:
            self._watch.end()
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def _handle(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and self._signum == signal.SIGINT:
            os._exit(128 + signum)
        self._signum = signum

    def _stop_if_signalled(self, trainer: Trainer) -> None:
        self._watch.moved(waiting=False)
        signum = self._signum
        if self._group is not None:
            agreed = torch.tensor(signum)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=self._group)
            signum = int(agreed)
        if signum:
            if trainer.is_global_zero:
                name = signal.Signals(signum).name
                log.warning("%s: saving at step %d and exiting", name, trainer.global_step)
            raise Stopped(signum, trainer.global_rank)


def _validation_is_due(trainer: Trainer) -> bool:
    """Whether Lightning validates after this step. A stop before it would skip this validation for good."""
    batches = trainer.global_step * trainer.accumulate_grad_batches
    return sum(trainer.num_val_batches) > 0 and batches % trainer.val_check_interval == 0
