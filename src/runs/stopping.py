"""Signals: how this process ends, and how processes end together.

Outside the steps of a training (imports, data, sampling, evaluation) there is nothing to save: a signal ends the
process at once. In a training, `src.training.signals` takes over and saves first.
"""

import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from src.runs.machine import is_first_process, requeue, slurm_job

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
GRACE = 15.0
"""Seconds for cleaning up after a signal until the process exits in any case."""
LAUNCHER = "DIFFUSION_LAB_LAUNCHER"
"""Environment variable with the process id of the process that starts the other ranks."""
# Of the errors of gloo, NCCL and sockets, which are plain RuntimeErrors in part.
LOST_CONNECTION = re.compile("gloo|NCCL|Connection (closed|reset)|Broken pipe")
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def stop_signal(status: int | None) -> int | None:
    """The signal of `SIGNALS` by which a process ended, from its exit status as subprocess or a shell gives it."""
    signum = 0 if status is None else -status if status < 0 else status - 128
    return signum if signum in SIGNALS else None


def describe_status(status: int) -> str:
    """What an exit status of a failed process means, e.g. "was killed by SIGKILL (out of memory?)"."""
    if status == -signal.SIGKILL:
        return "was killed by SIGKILL (out of memory?)"
    if -status in set(signal.Signals):
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


class Watch:
    """A thread that is notified of signals even while the main thread is blocked and runs no Python handlers.

    Subclasses define `react`. Watches can be nested; only the innermost is notified.
    """

    def __init__(self) -> None:
        self.ended = threading.Event()

    def start(self) -> None:
        """Starts watching; must be called in the main thread."""
        self.ended.clear()
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._wait_for_signals, args=(reader,), daemon=True).start()

    def end(self) -> None:
        """Stops watching."""
        self.ended.set()
        signal.set_wakeup_fd(self._previous)
        os.close(self._writer)

    def react(self, signum: int) -> None:
        """Called in the thread for each signal of `SIGNALS` that has a handler."""

    def _wait_for_signals(self, reader: int) -> None:
        while data := os.read(reader, 1):
            if data[0] in SIGNALS:
                self.react(data[0])
        os.close(reader)


class ExitOnSignal(Watch):
    """Ends the process after a signal with status 128 + signal.

    SystemExit is raised in the main thread, so that files are closed and temporary ones removed. If that takes longer
    than `GRACE`, or at a second SIGINT, the process exits at once. If SIGHUP was ignored (nohup), it stays ignored. In
    a SLURM job, SIGUSR1 also requeues the job.
    """

    def __init__(self) -> None:
        super().__init__()
        self._came = False
        self._exiting = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within it, signals are handled; after a signal they stay so until the process ends."""
        previous = handlers()
        self.start()
        for signum in previous:
            signal.signal(signum, self._handle)
        try:
            yield
        finally:
            if not self._exiting:
                self.end()
                for signum, handler in previous.items():
                    signal.signal(signum, handler)

    def react(self, signum: int) -> None:
        if self._came and signum == signal.SIGINT:
            os._exit(128 + signum)
        if not self._came:
            self._came = True
            threading.Thread(target=self._exit_in_time, args=(signum,), daemon=True).start()

    def _exit_in_time(self, signum: int) -> None:
        if not self.ended.wait(GRACE):
            os._exit(128 + signum)

    def _handle(self, signum: int, frame: Any) -> None:
        if self._exiting:
            return
        self._exiting = True
        if signum == signal.SIGUSR1 and slurm_job() and is_first_process():
            requeue()
        sys.exit(128 + signum)


def handlers() -> dict[int, Any]:
    """The current handlers of `SIGNALS`, without SIGHUP if it is ignored, which it should stay (nohup)."""
    found = {signum: signal.getsignal(signum) for signum in SIGNALS}
    if found[signal.SIGHUP] is signal.SIG_IGN:
        del found[signal.SIGHUP]
    return found


def die_with(parent: int) -> None:
    """Makes the kernel kill this process when its parent process ends; exits if that has happened already.

    Args:
        parent: process id of the parent.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
