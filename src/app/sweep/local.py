"""launcher=local: several jobs at once on this machine, each with devices of its own."""

import fcntl
import itertools
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

from src.app.sweep.jobs import Job
from src.app.sweep.launcher import POLL, Launcher, Report, collect, end, ending_with, start, stopping
from src.errors import UserError


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
        if devices and len(set(devices)) < len(devices):
            raise ValueError(f"devices={devices}: each GPU only once")
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
        self.awaited: set[Job] = set()
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

    def _start(self, waiting: deque[Job], running: dict[Job, subprocess.Popen], report: Report) -> None:
        for _ in range(len(waiting)):
            if len(running) >= self.jobs:
                return
            job = waiting.popleft()
            lease = job.begin()
            if lease is None:  # it still runs: its launcher was killed
                if job not in self.awaited:
                    print(
                        f"job {job.number:<4}    still runs, started by an earlier launcher: waiting for it"
                    )
                    self.awaited.add(job)
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
                settings = self._settings(places, job.devices)
                running[job] = start(job, settings, [lease, *(file for _, file in places)])
                for _, file in places:
                    file.close()

    def _settings(self, places: Sequence[tuple[str, IO[str]]], processes: int = 1) -> dict[str, str]:
        """The environment of a job with so many processes in these places."""
        names = [place.partition("-")[2] for place, _ in places]
        settings = {"CUDA_VISIBLE_DEVICES": ",".join(names) if self.gpus else ""}
        if "OMP_NUM_THREADS" not in os.environ:
            settings["OMP_NUM_THREADS"] = str(max(1, self.threads // processes))
        return settings

    def _run_in_workers(self, jobs: Sequence[Job], report: Report) -> None:
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
        names = [name.strip() for name in visible.split(",")]
        # as in CUDA, the first impossible one ends the list
        return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


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
