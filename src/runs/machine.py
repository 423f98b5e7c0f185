"""The machine: versions, hardware, git revision, SLURM, memory allocator."""

import ctypes
import logging
import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

log = logging.getLogger(__name__)

# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4

PACKAGES = ("torch", "lightning", "hydra-core", "torchmetrics", "torch-fidelity", "wandb", "numpy")


def environment() -> dict[str, Any]:
    """Versions, hardware and the git revision, on which results depend besides the configuration."""
    import torch

    return {
        "git": git_revision(),
        "slurm_job": slurm_job(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": {name: installed(name) for name in PACKAGES},
    }


def cpu_name() -> str | None:
    """The processor's model, e.g. "AMD EPYC 9654 96-Core Processor"; None if the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """The commit of the code, with "+changes" for uncommitted changes; None outside a git checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10
        )
        return result.stdout.strip() if result.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return f"{commit}{'+changes' if git('status', '--porcelain') else ''}" if commit else None
    except (OSError, subprocess.TimeoutExpired):
        return None


def slurm_job() -> str | None:
    """The id of this process's SLURM job; None outside SLURM."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def is_first_process(several: bool = True) -> bool:
    """Whether this process is rank 0 or will launch the other ranks; for use before the Trainer exists.

    Args:
        several: whether the training may have several processes. If False, the result is True: in a SLURM allocation,
            independent tasks have different SLURM_PROCIDs.
    """
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return not several or all(os.environ.get(name, "0") == "0" for name in ranks)


def requeue() -> None:
    """Requeues this SLURM job; after the restart the run is found by the job id."""
    job = slurm_job()
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=10)
        log.warning("job %s requeued", job)
    except (OSError, subprocess.SubprocessError) as error:
        log.error("job %s could not be requeued: %s", job, error)


def discard_output(stream: TextIO) -> None:
    """Redirects a stream that cannot be written to (a closed pipe, a full disk) to the null device.

    Later writes and the flush at the interpreter's exit then succeed.
    """
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def keep_freed_memory() -> None:
    """Configures glibc to keep freed blocks instead of returning them to the kernel.

    Large activations are allocated and freed at each step. By default, blocks of 32 MiB or more are returned to the
    kernel and faulted in again, page by page, at about a tenth of the speed of mapped memory. Does nothing with other
    C libraries.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def skip_driver_search() -> None:
    """Lets PyTorch remember that there is no NVIDIA driver, where there is none.

    Each step of an optimiser asks whether CUDA is available. Lightning makes PyTorch answer by loading the driver's
    library, which costs 0.2 ms each time that it fails. PyTorch's own way asks the CUDA runtime, which remembers.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
