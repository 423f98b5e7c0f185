"""Launch of several training processes, and what happens if one of them is lost.

Lightning starts child processes from the command line. Under Hydra it adds arguments with which each child of a sweep
would run the whole sweep. Instead, the command line of the job itself is used, which `src.app.jobs` puts into sys.argv.
"""

import logging
import os
import subprocess
import threading
import time

import torch.distributed
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.utilities import rank_zero_only

from src.errors import UserError
from src.runs.stopping import LAUNCHER, LOST_CONNECTION, describe_status, stop_signal

log = logging.getLogger(__name__)

# Set by Lightning; with them, a second job of this process would be treated as a child.
LAUNCH_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GRACE = 25.0
"""Seconds in which this process notices by itself that a child is lost, and saves; then it is ended."""

_children: list[subprocess.Popen] = []


def launch_by_command_line() -> None:
    """Prepares the launch by a Trainer.

    Children are started with sys.argv unchanged and end with their parent, and the rank is set by the Trainer only.
    """
    subprocess_script._HYDRA_AVAILABLE = False
    subprocess_script._launch_process_observer = _observe
    # Lightning reads SLURM_PROCID, which independent tasks of one allocation also have. With several processes, the
    # Trainer's strategy sets the rank.
    rank_zero_only.rank = 0
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        os.environ[LAUNCHER] = str(os.getpid())


def explain_lost_process(error: Exception) -> None:
    """Explains an error that the loss of another process has caused; returns if the error is of another kind.

    Raises:
        SystemExit: a child was ended by a signal that stops trainings; with the same status.
        UserError: another process has ended otherwise.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if not isinstance(error, torch.distributed.DistError) and not LOST_CONNECTION.search(str(error)):
        return
    end = time.monotonic() + GRACE / 2  # its connections are closed before it has ended
    while not (lost := _lost()) and _children and time.monotonic() < end:
        time.sleep(0.05)
    if lost is None:
        raise UserError(
            "the connection to another process is lost; its own message, if any, is above"
        ) from None
    rank, status = lost
    if signum := stop_signal(status):
        raise SystemExit(128 + signum) from None
    number = len(_children) + 1
    raise UserError(
        f"process {rank} of {number} {describe_status(status)}; its own message, if any, is above"
    ) from None


def leave() -> None:
    """Destroys this job's process group, so that the next job of a sweep can create another."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            for name in LAUNCH_VARIABLES:
                os.environ.pop(name, None)
            _children.clear()


def _lost() -> tuple[int, int] | None:
    """Rank and exit status of the first child that has failed."""
    for rank, child in enumerate(_children, start=1):
        if child.poll():
            return rank, child.returncode
    return None


def _observe(children: list[subprocess.Popen]) -> None:
    """Replaces Lightning's observer, which kills this process within seconds after a child has failed."""
    _children[:] = children
    threading.Thread(target=_wait_for_children, args=(list(children),), daemon=True).start()


def _wait_for_children(children: list[subprocess.Popen]) -> None:
    while children == _children and not (lost := _lost()):
        if all(child.returncode == 0 for child in children):
            return
        time.sleep(0.5)
    if children != _children:
        return
    rank, status = lost
    signum = stop_signal(status)
    if signum:
        time.sleep(3)  # the signal may have come to all processes
        # it came before the training started, when the ranks do not pass signals on
        os.kill(os.getpid(), signum)
    time.sleep(GRACE)
    if children != _children:  # this process has noticed, and runs the next job of a sweep
        return
    log.error("process %d of %d %s; exiting", rank, len(children) + 1, describe_status(status))
    os._exit(128 + signum if signum else 1)
