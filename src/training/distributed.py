"""Several processes, each with a command line.

Lightning starts its child processes from the command line. Under Hydra it adds settings that make each child of a
sweep run the whole sweep; here the command line of the job itself is used, which `src.app.cli` puts into sys.argv.
"""

import ctypes
import os
import signal
import sys

import torch.distributed
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.utilities import rank_zero_only

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>

# What Lightning leaves in the environment; with it a second job of this process would count as a child.
LAUNCH_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch_by_command_line() -> None:
    """Prepares for a Trainer: it starts children with sys.argv as it is, they end with their parent, and only the
    Trainer decides which process is the first."""
    subprocess_script._HYDRA_AVAILABLE = False
    # Lightning reads SLURM_PROCID, which independent tasks of one allocation have too; with several processes the
    # Trainer's strategy sets the rank.
    rank_zero_only.rank = 0
    if int(os.environ.get("LOCAL_RANK", "0")) > 0 and sys.platform == "linux":
        # if the parent is killed before the processes have met, the child would wait for it for half an hour
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leave() -> None:
    """Ends this job's process group, so that the next job of a sweep can form another."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            for name in LAUNCH_VARIABLES:
                os.environ.pop(name, None)
