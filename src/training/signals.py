"""Signals: the training is saved at the next step boundary and ends with the usual exit status."""

import logging
import os
import signal
import subprocess
import threading
import time
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from src.runs.machine import slurm_job

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PATIENCE = 30.0
"""Seconds after a signal in which a step does not move; then the process ends without a save."""


class Stopped(SystemExit):
    """Ends the training because of a signal; the exit status is 128 + its number, as in a shell.

    Args:
        signum: the signal.
        rank: of this process. Only rank 0 has the signal's status: Lightning would take another status of a child for a
            crash, and kill rank 0 while it is still closing its logs.
    """

    def __init__(self, signum: int, rank: int):
        super().__init__(128 + signum if rank == 0 else 0)
        self.signum = signum


class Watch:
    """Ends the process if a signal has come and the step does not move: loading hangs, or a collective does.

    A thread learns of the signal from C (`signal.set_wakeup_fd`), since a blocked main thread runs no handlers. It
    waits at least `PATIENCE` seconds, and three times the longest batch, forward or backward pass so far.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._longest = 0.0
        self._ended = threading.Event()

    def start(self) -> None:
        """Watches from now on; in the main thread."""
        self._ended.clear()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._wait_for_signals, args=(self._reader,), daemon=True).start()

    def end(self) -> None:
        """Ends what `start` has started."""
        self._ended.set()
        signal.set_wakeup_fd(self._previous)
        os.close(self._writer)

    def moved(self, waiting: bool = True) -> None:
        """Notes that a part of a step has ended.

        Args:
            waiting: whether the next part is watched. Saves, scores and previews are not, however long they take.
        """
        now = time.monotonic()
        if self._since is not None:
            self._longest = max(self._longest, now - self._since)
        self._since = now if waiting else None

    def _wait_for_signals(self, reader: int) -> None:
        while data := os.read(reader, 1):
            if data[0] in SIGNALS:
                self._leave_if_nothing_moves(data[0])
        os.close(reader)

    def _leave_if_nothing_moves(self, signum: int) -> None:
        came = time.monotonic()
        while not self._ended.wait(0.2):
            since = self._since
            patience = max(PATIENCE, 3 * self._longest)
            if since is not None and time.monotonic() - max(since, came) > patience:
                log.error(
                    "%s: nothing has moved for %.0f s; leaving without a save. If loading hangs, try workers=0",
                    signal.Signals(signum).name,
                    patience,
                )
                os._exit(128 + signum)


class StopOnSignal(Checkpoint):
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP stop the training after the current optimiser step.

    The handler only sets a flag: a save inside a handler may come in the middle of an update, and a collective inside
    one waits for ever if the other ranks are elsewhere. At each step boundary the ranks agree, so that one signalled
    process is enough. Validation, previews and scores are finished first. A second SIGINT ends the process at once,
    and so does any signal if no step ends for a while (`Watch`). SIGHUP that is ignored (nohup) stays ignored.
    SIGUSR1 in a SLURM job also puts the job back into the queue.

    A `Checkpoint` by class only so that Lightning calls it last, when the step is complete.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._step = 0
        self._previous: dict[int, Any] = {}
        self._watch = Watch()
        self._group: torch.distributed.ProcessGroup | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signum = 0
        self._previous = {signum: signal.getsignal(signum) for signum in SIGNALS}
        if self._previous[signal.SIGHUP] is signal.SIG_IGN:
            del self._previous[signal.SIGHUP]
        self._listen()
        self._watch.start()
        if trainer.world_size > 1:
            # On the CPU: agreeing must not make the step wait for an accelerator.
            self._group = torch.distributed.new_group(backend="gloo")
            # Lightning's own agreement on SIGTERM waits for the device at every step.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()  # again, in place of Lightning's own handlers
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
        if trainer.global_step != self._step:  # not after a micro-batch that has only accumulated gradients
            self._step = trainer.global_step
            if not _validation_is_due(trainer):
                self._stop_if_signalled(trainer)
        self._watch.moved()

    def on_validation_start(self, *_: Any) -> None:
        self._watch.moved(waiting=False)  # this rank may wait at its end for one that makes a preview

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_signalled(trainer)
        self._watch.moved()

    def on_train_epoch_end(self, *_: Any) -> None:
        self._watch.moved(waiting=False)  # the end of the training: the last save follows

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
                log.warning("%s: saving at step %d and leaving", name, trainer.global_step)
            raise Stopped(signum, trainer.global_rank)


def _validation_is_due(trainer: Trainer) -> bool:
    """Whether Lightning validates between this step and the next: if stopped before, it would not make up for it."""
    batches = trainer.global_step * trainer.accumulate_grad_batches
    return sum(trainer.num_val_batches) > 0 and batches % trainer.val_check_interval == 0


def requeue() -> None:
    """Puts this SLURM job back into the queue; its next start finds the run by the job's number."""
    job = slurm_job()
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=30)
        log.warning("job %s is requeued", job)
    except (OSError, subprocess.SubprocessError) as error:
        log.error("not requeued: %s", error)
