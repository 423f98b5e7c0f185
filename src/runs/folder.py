"""A run's folder: where things lie in it, and how it is found again.

config.yaml        the composed configuration, interpolations filled in
environment.json   versions, hardware, git revision
checkpoints/       step_<k>.ckpt (the newest two), best.ckpt and best.json
samples/           previews and drawn images
.hydra/            the overrides, for going on
lock               held while a process trains in this folder
csv/               the curves
scores.json        the last scores and their protocol
"""

import fcntl
import logging
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.runs.files import damage, digest_of

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
BEST_FILE = "best.ckpt"
STEP_FILE = re.compile(r"step_(\d+)\.ckpt")
CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
LOCK_FILE = "lock"


def checkpoints_by_step(folder: Path) -> list[Path]:
    """The step_<k>.ckpt files of a folder, oldest first."""
    found = [(STEP_FILE.fullmatch(path.name), path) for path in folder.glob("*.ckpt")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


@dataclass(frozen=True)
class FoundRun:
    """A run folder and one checkpoint in it."""

    folder: Path
    checkpoint: Path


def find_run(run: str | Path, which: str = "last", option: str = "run") -> FoundRun:
    """The run and the checkpoint that a run folder or a checkpoint file means.

    Args:
        run: a run folder, or a .ckpt file in its checkpoints folder or anywhere else. Of a folder's checkpoints
            the damaged ones are passed over, with a warning.
        which: the checkpoint of a run folder, "last" or "best".
        option: what to call `run` in messages.

    Raises:
        UserError: there is no such thing, or it is damaged.
    """
    path = Path(run).expanduser()
    if path.is_file():
        _refuse_damaged(path, option)
        folder = path.parent.parent if path.parent.name == CHECKPOINTS else path.parent
        return FoundRun(folder, path)
    if not path.is_dir():
        raise UserError(f"{option}={run}: no such run folder or checkpoint file")
    if which == "best":
        best = path / CHECKPOINTS / BEST_FILE
        if not best.is_file():
            raise UserError(f"checkpoint=best: {path} has no {BEST_FILE}; choose checkpoint=last")
        _refuse_damaged(best, option)
        return FoundRun(path, best)
    if which != "last":
        raise UserError(f"checkpoint={which}: choose last or best")
    steps = checkpoints_by_step(path / CHECKPOINTS)
    if not steps:
        raise UserError(
            f"{option}={run}: no checkpoint in {path / CHECKPOINTS}; was the run stopped before its first?"
        )
    for checkpoint in reversed(steps):
        wrong = damage(checkpoint)
        if wrong is None:
            return FoundRun(path, checkpoint)
        log.warning("%s is damaged (%s): the one before is used", checkpoint, wrong)
    raise UserError(f"{option}={run}: all checkpoints in {path / CHECKPOINTS} are damaged")


def _refuse_damaged(checkpoint: Path, option: str) -> None:
    wrong = damage(checkpoint)
    if wrong is not None:
        raise UserError(f"{option}={checkpoint} is damaged or not a checkpoint: {wrong}; choose another")


def newest_run(runs: Path) -> Path:
    """The folder under `runs` whose newest checkpoint was written last, sweeps included.

    Raises:
        UserError: no run has a checkpoint.
    """
    checkpoints = list(runs.glob(f"**/{CHECKPOINTS}/step_*.ckpt"))
    if not checkpoints:
        raise UserError(f"ckpt=last: no run with a checkpoint under {runs}; name a run folder instead")
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent.parent


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a folder; the lock dies with this process, however it ends.

    Raises:
        UserError: another process trains there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+") as file:
        try:
            # of the record kind: unlike flock's, it is not inherited by forked workers that outlive a kill
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by {file.read().strip() or 'another process'}: wait for it, or stop it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def recipe_folder(parent: Path, recipe: dict[str, Any]) -> Path:
    """A folder of its own for each recipe: the same recipe finds its folder again, another never overwrites it."""
    made = recipe.get("recipe", recipe)
    sampler = made["sampler"].partition("(")[0].lower()
    return parent / f"{sampler}-{made['steps']}_seed-{made['seed']}_{digest_of(recipe)}"
