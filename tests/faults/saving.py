"""A process that saves checkpoints in a loop, to be killed during a save."""

import os
import random
import time
from pathlib import Path
from typing import Any

import torch

from src.runs.files import damage
from src.runs.folder import checkpoints_by_step
from src.training.checkpoint import AtomicCheckpointIO
from tests.faults.processes import SERVER


def content(step: int, megabytes: int) -> dict[str, Any]:
    """A minimal checkpoint with this many MB of weights."""
    return {
        "global_step": step,
        "ImageDataModule": {"samples": step},
        "origin": {"world_size": 1, "data": "none"},
        "state_dict": {str(i): torch.full((250_000,), float(step)) for i in range(megabytes)},
    }


def save_for_ever(folder: Path, megabytes: int, temporary: str) -> None:
    """Saves to the same two names in a loop, so that every save replaces an intact file."""
    os.environ["TMPDIR"] = temporary
    io, step = AtomicCheckpointIO(), 0
    while True:
        step += 1
        io.save_checkpoint(content(step, megabytes), folder / f"step_{step % 2:08d}.ckpt")


def kill_while_saving(folder: Path, chance: random.Random, megabytes: int, temporary: str) -> list[str]:
    """Kills the process at a random instant; returns the problems of the files, empty if there are none."""
    folder.mkdir(parents=True, exist_ok=True)
    process = SERVER.Process(target=save_for_ever, args=(folder, megabytes, temporary))
    process.start()
    end = time.monotonic() + 60
    while len(checkpoints_by_step(folder)) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.3))
    process.kill()
    process.join()
    found = []
    for path in checkpoints_by_step(folder):
        wrong = damage(path)
        if wrong is None:
            steps = {
                float(weight[0]) for weight in torch.load(path, weights_only=True)["state_dict"].values()
            }
            wrong = f"it mixes saves {steps}" if len(steps) > 1 else None
        found += [f"{path.name}: {wrong}"] if wrong else []
    return found if len(checkpoints_by_step(folder)) == 2 else [*found, "a checkpoint is missing"]
