"""Launchers: how the jobs of a sweep are run. All run the same command line, `Job.command`, and collect its outcome."""

import fcntl
import json
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
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


class Local(Launcher):
    """Several jobs at once on this machine, each in a process that sees only its own devices.

    Jobs wait for a free GPU, or for a free core where there is none. Sweeps of one user share both by locked files,
    which the system unlocks when a job ends, however it ends.

    Args:
        jobs: jobs at once; None for as many as there are GPUs, or cores.
        devices: numbers of the GPUs that may be used, as in CUDA_VISIBLE_DEVICES; None for all. [] for the CPU.

    Raises:
        ValueError: an argument is out of range, or there is no such device.
    """

    def __init__(self, jobs: int | None = None, devices: list[int] | None = None):
        if jobs is not None and jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}")
        visible = visible_devices()
        unknown = [str(device) for device in devices or () if str(device) not in visible]
        if unknown:
            there = ", ".join(visible) or "none"
            raise ValueError(f"devices={devices}: there is no GPU {', '.join(unknown)}; there are: {there}")
        self.gpus = visible if devices is None else [str(device) for device in devices]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.places = [f"cuda-{name}" for name in self.gpus] or [f"cpu-{number}" for number in range(cores)]
        if jobs is not None and jobs > len(self.places):
            kind = "GPUs" if self.gpus else "cores"
            raise ValueError(f"jobs={jobs}: there are {len(self.places)} {kind}")
        self.jobs = jobs or len(self.places)
        self.at_once = self.jobs
        self.threads = max(1, cores // self.jobs)

    def describe(self):
        return f"{self.jobs} at once on {', '.join(self.places)}"

    def run(self, jobs, total):
        self._check_devices(jobs)
        report = Report(jobs, total, self.jobs)
        if all(job.entry_point != "train" and job.devices == 1 for job in jobs):
            self._run_in_workers(jobs, report)
            return
        waiting, running = deque(jobs), {}
        with stopping() as stopped, ending_with(running):
            while waiting or running:
                for job in [job for job, process in running.items() if process.poll() is not None]:
                    collect(job, running.pop(job).returncode)
                    report(job)
                if not stopped:
                    self._start(waiting, running, report)
                elif not running:
                    break
                time.sleep(POLL)
                if stopped:
                    end(running.values(), stopped)
        if stopped:
            sys.exit(128 + stopped[0])

    def _check_devices(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if self.gpus and job.devices > len(self.gpus):
                option = "trainer.devices" if job.entry_point == "train" else "devices"
                raise UserError(
                    f"{option}={job.devices} of job {job.number}: launcher=local has {len(self.gpus)}"
                    f" GPU{'s' if len(self.gpus) > 1 else ''}; choose fewer"
                )

    def _start(self, waiting: deque[Job], running: dict[Job, subprocess.Popen], report: "Report") -> None:
        for _ in range(len(waiting)):
            if len(running) >= self.jobs:
                return
            job = waiting.popleft()
            lease = job.begin()
            if lease is None:  # it still runs: its launcher was killed
                waiting.append(job)
                continue
            with lease:
                if job.outcome() is not None:
                    report(job)
                    continue
                # on the CPU a job may have more processes than there are cores
                places = self._free_places(min(job.devices, len(self.places)))
                if places is None:
                    waiting.appendleft(job)
                    return
                running[job] = start(job, self._settings(places), [lease, *(file for _, file in places)])
                for _, file in places:
                    file.close()

    def _settings(self, places: Sequence[tuple[str, IO[str]]]) -> dict[str, str]:
        """The environment of a process in these places."""
        names = [place.partition("-")[2] for place, _ in places]
        settings = {"CUDA_VISIBLE_DEVICES": ",".join(names) if self.gpus else ""}
        if "OMP_NUM_THREADS" not in os.environ:
            settings["OMP_NUM_THREADS"] = str(self.threads)
        return settings

    def _run_in_workers(self, jobs: Sequence[Job], report: "Report") -> None:
        """Runs jobs of sampling or evaluation in processes that take one after the other."""
        # of jobs that were begun here: one that ended its process is not repeated
        mark = secrets.token_hex(8)
        unreported, workers, useless = list(jobs), dict[int, subprocess.Popen](), 0
        with stopping() as stopped, ending_with(workers):
            while True:
                ended = [pid for pid, worker in workers.items() if worker.poll() is not None]
                lost = sum(workers.pop(pid).returncode != 0 for pid in ended)
                for job in [job for job in unreported if job.outcome() is not None]:
                    unreported.remove(job)
                    report(job)
                left = [job for job in unreported if job.mark != mark]
                useless = useless + lost if len(left) == len(jobs) else 0
                if not workers and (stopped or not left or useless > self.jobs):
                    break
                wanted = bool(left) and not stopped and len(workers) < self.jobs and useless <= self.jobs
                if wanted and (places := self._free_places(1)):
                    files = [file for _, file in places]
                    worker = start_worker(left, mark, self._settings(places), files)
                    workers[worker.pid] = worker
                    for file in files:
                        file.close()
                time.sleep(POLL)
                if stopped:
                    end(workers.values(), stopped)
        for job in unreported:
            report(job)
        if stopped:
            sys.exit(128 + stopped[0])

    def _free_places(self, count: int) -> list[tuple[str, IO[str]]] | None:
        """Locks free places; None if there are too few."""
        folder = Path(tempfile.gettempdir(), f"diffusion-lab-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found: list[tuple[str, IO[str]]] = []
        for place in self.places:
            if len(found) == count:
                break
            file = (folder / f"{place}.lock").open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append((place, file))
            except OSError:
                file.close()
        if len(found) < count:
            for _, file in found:
                file.close()
            return None
        return found


def visible_devices() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def start(job: Job, settings: Mapping[str, str], leases: Sequence[IO[str]] = ()) -> subprocess.Popen:
    """Starts a job in a session of its own, which a Ctrl-C in the terminal does not reach.

    Args:
        job: the job.
        settings: environment variables besides those of this process.
        leases: locked files that stay locked while the job's process lives.
    """
    with (job.folder / CONSOLE_FILE).open("ab") as console:
        return subprocess.Popen(
            job.command(),
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


def start_worker(
    jobs: Sequence[Job], mark: str, settings: Mapping[str, str], leases: Sequence[IO[str]]
) -> subprocess.Popen:
    """Starts `src.app.sweep.worker` for jobs, in a session of its own.

    Args:
        jobs: those of them that no other process has taken are run.
        mark: see `Job.begin`.
        settings: environment variables besides those of this process.
        leases: locked files that stay locked while the process lives.
    """
    worker = subprocess.Popen(
        [sys.executable, "-m", "src.app.sweep.worker", mark],
        env={**os.environ, **settings, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        pass_fds=[lease.fileno() for lease in leases],
        start_new_session=True,
    )
    rows = [{**asdict(job), "folder": str(job.folder)} for job in jobs]
    with suppress(BrokenPipeError), worker.stdin:
        worker.stdin.write(json.dumps(rows).encode())
    return worker


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
    """The last line of an output that says what went wrong."""
    lines = console.read_text(errors="replace").splitlines() if console.is_file() else []
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
