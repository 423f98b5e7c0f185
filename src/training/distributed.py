"""Several processes, one command line each.

Lightning starts its child processes from the command line. Under Hydra it adds settings of its own, which in
a sweep make each child run the whole sweep; here the command line of the job itself is used, which
`src.command_line` puts into sys.argv.
"""

import os

import torch.distributed
from lightning.pytorch.strategies.launchers import subprocess_script

# What Lightning leaves in the environment; a second job of the process would take itself for a child.
LAUNCH_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch_by_command_line() -> None:
    """Makes Lightning start children with sys.argv as it stands."""
    subprocess_script._HYDRA_AVAILABLE = False


def leave() -> None:
    """Ends this job's process group, so that the next job of a sweep forms its own."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            for name in LAUNCH_VARIABLES:
                os.environ.pop(name, None)
