"""Several processes, one command line each.

Lightning starts its child processes from the command line. Under Hydra it adds settings of its own, which in
a sweep make each child run the whole sweep; here the command line of the job itself is used, which
`src.app.cli` puts into sys.argv.
"""

import ctypes
import os
import signal
import sys

import torch.distributed
from lightning.pytorch.strategies.launchers import subprocess_script

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>

# What Lightning leaves in the environment; a second job of the process would take itself for a child.
LAUNCH_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch_by_command_line() -> None:
    """Makes Lightning start children with sys.argv as it stands; they end when their parent does."""
    subprocess_script._HYDRA_AVAILABLE = False
    if int(os.environ.get("LOCAL_RANK", "0")) > 0 and sys.platform == "linux":
        # a child whose parent was killed before they have met would wait for it for half an hour
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leave() -> None:
    """Ends this job's process group, so that the next job of a sweep forms its own."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            for name in LAUNCH_VARIABLES:
                os.environ.pop(name, None)
