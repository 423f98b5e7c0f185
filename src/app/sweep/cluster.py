"""Launchers for clusters: SLURM through submitit, and Ray."""

import os
import re
import signal
import socket
import sys
import time
from collections import deque
from typing import Any, Literal

from src.app.sweep.jobs import Job
from src.app.sweep.launcher import PATIENCE, POLL, Launcher, Report, collect, run_job, stopping
from src.errors import UserError

# Trials of a search at the same time on a cluster, which decides how many jobs run.
AT_ONCE = 8
# Seconds in which a machine with a Ray cluster answers.
ANSWERS = 5.0
# For Lightning, an interactive job: a training starts its processes itself, instead of being one task of several.
ALONE = {"SLURM_JOB_NAME": "bash"}


class Slurm(Launcher):
    """A SLURM job array, submitted by submitit. A job that is put back into the queue continues its training.

    Args:
        partition: of the cluster; None for its default.
        minutes: time limit of a job.
        gpus: GPUs of a job.
        cpus: cores of a job.
        jobs: jobs at once; None for no limit.
        cluster: "slurm", or "local" for processes of this machine.
        options: further options of sbatch, e.g. {account: abc, constraint: h100}.
    """

    def __init__(
        self,
        partition: str | None = None,
        minutes: int = 24 * 60,
        gpus: int = 1,
        cpus: int = 8,
        jobs: int | None = None,
        cluster: Literal["slurm", "local"] = "slurm",
        options: dict[str, Any] | None = None,
    ):
        self.partition, self.minutes, self.gpus, self.cpus = partition, minutes, gpus, cpus
        self.jobs, self.cluster, self.options = jobs, cluster, options or {}
        self.at_once = jobs or AT_ONCE
        self.elsewhere = cluster == "slurm"

    def describe(self):
        return f"by submitit, cluster {self.cluster}"

    def check(self):
        import shutil

        _package("submitit", "slurm")
        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise UserError(
                "launcher=slurm: there is no sbatch on this machine; start it on the cluster's login node"
            )

    def run(self, jobs, total):
        self.check()
        if not jobs:
            return
        submitit = _package("submitit", "slurm")
        # the signal before the end of the time is the one on which a training saves
        os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
        executor = submitit.AutoExecutor(folder=jobs[0].folder.parent / "submitit", cluster=self.cluster)
        executor.update_parameters(timeout_min=self.minutes, name=jobs[0].folder.parent.name)
        if self.cluster == "slurm":
            executor.update_parameters(
                slurm_partition=self.partition,
                slurm_gpus_per_node=self.gpus,
                slurm_cpus_per_task=self.cpus,
                slurm_array_parallelism=self.jobs or len(jobs),
                slurm_additional_parameters={"requeue": True, **self.options},
            )
        atonce = self.jobs or len(jobs)
        report, waiting, running = Report(jobs, total, atonce), deque(jobs), {}
        if self.cluster == "slurm":
            try:
                with executor.batch():
                    running = {job: executor.submit(run_job, job, ALONE) for job in waiting}
            except RuntimeError as error:  # sbatch refused them
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise UserError(f"launcher=slurm: the jobs were not accepted: {lines[-1]}") from None
            waiting.clear()
        with stopping() as stopped:
            while waiting or running:
                while waiting and len(running) < atonce and not stopped:
                    job = waiting.popleft()
                    running[job] = executor.submit(run_job, job, ALONE)
                for job in [job for job, submitted in running.items() if _ended(job, submitted)]:
                    collect(job, _result(running.pop(job)))
                    report(job)
                if stopped:
                    for submitted in running.values():
                        submitted.cancel(check=False)
                    deadline = time.monotonic() + PATIENCE
                    while len(stopped) == 1 and time.monotonic() < deadline:
                        if all(submitted.done() for submitted in running.values()):
                            break
                        time.sleep(POLL)
                    break
                time.sleep(POLL if self.cluster == "local" else 5)
        if stopped:
            sys.exit(128 + stopped[0])


def _ended(job: Job, submitted: Any) -> bool:
    """Whether a submitted job has ended for good; one that was put back into the queue runs again."""
    if not submitted.done():
        return False
    if job.outcome() is not None or job.scores_file.is_file() or _result(submitted) <= 128:
        return True
    return submitted.state not in ("PENDING", "REQUEUED", "CONFIGURING", "RUNNING", "COMPLETING")


def _result(submitted: Any) -> int:
    """The exit status of a job; -9 if it was lost, e.g. by scancel or with its machine, so that it can be continued."""
    from submitit.core.utils import FailedJobError

    error = submitted.exception()
    if error is None:
        return submitted.result()
    return 1 if isinstance(error, FailedJobError) else -signal.SIGKILL


class Ray(Launcher):
    """The jobs as tasks of a Ray cluster, which shares them out by their resources.

    Args:
        address: of a running cluster, e.g. "auto" or "ray://host:10001"; None starts one on this machine.
        cpus: cores of a job.
        gpus: GPUs of a job.
    """

    def __init__(self, address: str | None = None, cpus: int = 1, gpus: float = 0):
        self.address, self.cpus, self.gpus = address, cpus, gpus
        self.at_once = AT_ONCE
        self.elsewhere = address is not None

    def describe(self):
        return f"by Ray, {self.address or 'on this machine'}, {self.cpus} cores and {self.gpus:g} GPUs a job"

    def check(self):
        _package("ray", "ray")
        # Ray itself waits for minutes
        if match := re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", self.address or ""):
            try:
                socket.create_connection((match[1], int(match[2])), timeout=ANSWERS).close()
            except (OSError, OverflowError) as error:
                raise UserError(
                    f"launcher.address={self.address}: no Ray cluster answers there ({error}); start one with ray start"
                    " --head, or leave launcher.address out for this machine"
                ) from None

    def _check_resources(self, there: dict[str, float]) -> None:
        for name, option, wanted in (("CPU", "cpus", self.cpus), ("GPU", "gpus", self.gpus)):
            if self.address is None and wanted > there.get(name, 0):
                raise UserError(
                    f"launcher.{option}={wanted:g}: this machine has {there.get(name, 0):g} for Ray; choose fewer"
                )

    def run(self, jobs, total):
        self.check()
        if not jobs:
            return
        ray = _package("ray", "ray")
        try:
            ray.init(
                address=self.address, log_to_driver=False, logging_level="ERROR", configure_logging=False
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"launcher.address={self.address}: {str(error).splitlines()[0]}") from None
        try:
            self._check_resources(ray.cluster_resources())
            remote = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(run_job)
            settings = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self.cpus))}
            running = {remote.remote(job, settings, os.getcwd()): job for job in jobs}
            report = Report(jobs, total, max(1, int(ray.cluster_resources().get("CPU", 1) // self.cpus)))
            with stopping() as stopped:
                while running and not stopped:
                    for done in ray.wait(list(running), timeout=POLL)[0]:
                        job = running.pop(done)
                        try:
                            collect(job, ray.get(done))
                        except ray.exceptions.RayTaskError as error:
                            job.close(error=str(error).strip().splitlines()[-1])
                        except ray.exceptions.RayError:  # the machine or the worker is lost
                            collect(job, -signal.SIGKILL)
                        report(job)
                for task in running:
                    ray.cancel(task)
                if running:
                    ray.wait(list(running), num_returns=len(running), timeout=PATIENCE)
            if stopped:
                sys.exit(128 + stopped[0])
        finally:
            ray.shutdown()


def _package(name: str, extra: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise UserError(
            f"launcher={extra}: the package {name} is missing; install it with pip install -e '.[{extra}]'"
        ) from None
