"""Launchers: how the jobs of a sweep are run. All run the same command line, `Job.command`, and collect its outcome."""

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from src.app.environment import redacted
from src.app.jobs import SCORES_TO, run_single
from src.app.shared import sharing
from src.app.sweep.jobs import CONSOLE_FILE, Job
from src.errors import UserError
from src.runs.stopping import SIGNALS, Watch, handlers

log = logging.getLogger(__name__)

POLL = 0.1
# Begins the line with which each start of a job begins in its console.log.
START = "\x1e$ "
# Time for the jobs of a stopped sweep to save, in seconds.
PATIENCE = 120


class Launcher(ABC):
    """Runs the jobs of a sweep.

    Attributes:
        at_once: jobs at the same time, where the launcher decides it.
        elsewhere: whether the jobs run on other machines, with other devices.
    """

    at_once = 1
    elsewhere = False

    @abstractmethod
    def describe(self) -> str:
        """How the jobs are run, in a few words."""

    def check(self) -> None:  # noqa: B027 - most launchers need nothing
        """Checks that the launcher can run here, before anything is written.

        Raises:
            UserError: it cannot.
        """

    @abstractmethod
    def run(self, jobs: Sequence[Job], total: int) -> None:
        """Runs jobs, each to its outcome.

        Args:
            jobs: jobs without an outcome, in their prepared folders.
            total: number of jobs of the whole sweep.

        Raises:
            UserError: the launcher cannot run here.
            SystemExit: with 128 + signal, after the running jobs have saved and ended.
        """

    @staticmethod
    @contextmanager
    def rich_progress(what: str, total: int) -> Iterator[Callable[[], None]]:
        """A progress bar with an estimate, for what takes longer than a moment."""
        from tqdm import tqdm

        with tqdm(desc=what, total=total, delay=2, leave=False) as bar:
            yield lambda: bar.update() and None


class Serial(Launcher):
    """One job after the other in this process."""

    def describe(self):
        return "one after the other"

    def run(self, jobs, total):
        report = Report(jobs, total, 1)
        with sharing():
            for job in jobs:
                with _begun(job):
                    if job.outcome() is None:
                        run_here(job)
                report(job)


def run_here(job: Job) -> None:
    """Runs a leased job in this process, and writes its outcome."""
    try:
        job.close(run_single(job.entry_point, job.arguments()))
    except UserError as error:
        line = redacted(str(error))
        job.close(error=line)
        print(f"error: {line}", file=sys.stderr)
    except Exception as error:
        job.close(
            error=redacted(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        )
        log.exception("job %d failed", job.number)


def start(job: Job, settings: Mapping[str, str], leases: Sequence[IO[str]] = ()) -> subprocess.Popen:
    """Starts a job in a session of its own, which a Ctrl-C in the terminal does not reach.

    Args:
        job: the job.
        settings: environment variables besides those of this process.
        leases: locked files that stay locked while the job's process lives.
    """
    command = job.command()
    with (job.folder / CONSOLE_FILE).open("ab") as console:
        console.write(f"{START}{shlex.join(command)}\n".encode())
        console.flush()
        return subprocess.Popen(
            command,
            env={
                **os.environ,
                **settings,
                SCORES_TO: str(job.scores_file.absolute()),
                "PYTHONUNBUFFERED": "1",
            },
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            pass_fds=[lease.fileno() for lease in leases],
            start_new_session=True,
        )


def run_job(job: Job, settings: Mapping[str, str] | None = None, folder: str | None = None) -> int:
    """Runs a job in the process of a cluster's worker; signals to stop are handed on.

    Args:
        job: the job.
        settings: environment variables.
        folder: working folder.

    Returns:
        The exit status of its process.
    """
    import threading

    if folder is not None:
        os.chdir(folder)
    with _begun(job) as lease:
        if job.outcome() is not None:
            return 0
        process = start(job, settings or {}, [lease])
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                signal.signal(signum, lambda signum, _: process.send_signal(signum))
        return process.wait()


def collect(job: Job, status: int) -> None:
    """Writes the outcome of a job that has ended; none for one that was stopped or killed, which can be continued.

    Args:
        job: the job.
        status: exit status of its process; negative for the signal that killed it.
    """
    if job.outcome() is not None or (status == 0 and job.collect()) or status < 0 or status > 128:
        return
    job.close(error=_reason(job.folder / CONSOLE_FILE, status))


def _reason(console: Path, status: int) -> str:
    """The last line that says what went wrong in the output of a job's last start."""
    text = console.read_text(errors="replace") if console.is_file() else ""
    lines = text.rpartition(START)[2].splitlines()
    for line in reversed(lines):
        if match := re.search(r"error: (.*)", line) or re.match(r"(\w[\w.]*(?:Error|Exception)\b.*)", line):
            return match[1]
    return f"exit status {status}; see {console}"


def end(processes: Any, signals: list[int]) -> None:
    """Hands a signal on to processes, and ends those that have not saved and ended in time."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signals[0])
    deadline = time.monotonic() + PATIENCE
    while (
        any(process.poll() is None for process in processes)
        and time.monotonic() < deadline
        and len(signals) == 1
    ):
        time.sleep(POLL)
    for process in processes:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def ending_with(running: Mapping[Any, subprocess.Popen]) -> Iterator[None]:
    """Ends the running processes, which save, if the block raises an error, e.g. on a full disk."""
    try:
        yield
    except Exception:
        end(running.values(), [signal.SIGTERM])
        raise


@contextmanager
def stopping() -> Iterator[list[int]]:
    """Within it, signals to stop are kept in the returned list."""
    stopped: list[int] = []

    def keep(signum: int, frame: Any) -> None:
        if not stopped:
            print("stopping: waiting for the running jobs to save (again to end them at once)")
        stopped.append(signum)

    before = handlers()
    watch = Watch()  # takes the place of that which ends the process
    watch.start()
    for signum in before:
        signal.signal(signum, keep)
    try:
        yield stopped
    finally:
        watch.end()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _begun(job: Job) -> IO[str]:
    """The lease of a job, as soon as no other process runs it."""
    while (lease := job.begin()) is None:
        time.sleep(POLL)
    return lease


class Report:
    """Prints a line for each job that has ended, with an estimate of the time that is left.

    Args:
        jobs: the jobs that are run.
        total: number of jobs of the sweep.
        at_once: jobs that run at the same time.
    """

    def __init__(self, jobs: Sequence[Job], total: int, at_once: int):
        self.left, self.total, self.at_once = len(jobs), total, at_once
        self.done, self.started = 0, time.monotonic()

    def __call__(self, job: Job) -> None:
        """Reports a job that has ended."""
        self.left -= 1
        self.done += 1
        outcome = job.outcome() or {"error": "stopped before its end"}
        scores = outcome.get("scores") or {}
        first = next((f"{name} {value:.4g}" for name, value in scores.items()), "done")
        said = f"failed: {outcome['error']}" if "error" in outcome else first
        minutes = (time.monotonic() - self.started) / self.done * self.left / 60
        estimate = f"; {self.left} left, about {minutes:.1f} min" if self.left else ""
        print(f"job {job.number:<4}    {' '.join(job.varied)}: {said}{estimate}")
