"""Launch of several training processes.

Lightning starts child processes from the command line. Under Hydra it adds arguments with which each child of a sweep
would run the whole sweep. Instead, the command line of the job itself is used, which `src.app.jobs` puts into sys.argv.
"""

import ctypes
import os
import signal
import sys

import torch.distributed
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.utilities import rank_zero_only

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>

# Set by Lightning; with them, a second job of this process would be treated as a child.
LAUNCH_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch_by_command_line() -> None:
    """Prepares the launch by a Trainer.

    Children are started with sys.argv unchanged and end with their parent, and the rank is set by the Trainer only.
    """
    subprocess_script._HYDRA_AVAILABLE = False
    # Lightning reads SLURM_PROCID, which independent tasks of one allocation also have. With several processes, the
    # Trainer's strategy sets the rank.
    rank_zero_only.rank = 0
    if int(os.environ.get("LOCAL_RANK", "0")) > 0 and sys.platform == "linux":
        # otherwise, if the parent is killed before the rendezvous, the child would wait for half an hour
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leave() -> None:
    """Destroys this job's process group, so that the next job of a sweep can create another."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            for name in LAUNCH_VARIABLES:
                os.environ.pop(name, None)
