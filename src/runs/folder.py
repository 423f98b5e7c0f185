"""Run folders: layout, lookup of runs and checkpoints, and the lock of a training.

config.yaml        the composed configuration with resolved interpolations
environment.json   versions, hardware, git revision
init.json          the run whose weights the training started from, with `init=`
checkpoints/       step_<k>.ckpt (by default the newest two), best.ckpt and best.json
ema/               snapshots of power-function averages
samples/           previews and sampled images
lock               locked while a process trains in this folder
csv/               the curves; also wandb/ and tensorboard/
scores.json        the last scores and their protocol
bands.json         where the training left the reference band of its recipe
error.json         why the last start failed, if it did
train.log          what was printed
scores/            scores of src.evaluate, one folder per recipe
"""

import fcntl
import logging
import os
import platform
import re
import stat
from collections.abc import Iterator, Sequence
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
SCORES_FILE = "scores.json"
INIT_FILE = "init.json"
BANDS_FILE = "bands.json"
ERROR_FILE = "error.json"
LOCK_FILE = "lock"
LAYOUT = (
    *(CHECKPOINTS, "ema", "samples", "scores", "csv", "wandb", "tensorboard", ".hydra"),
    *(CONFIG_FILE, ENVIRONMENT_FILE, SCORES_FILE, INIT_FILE, BANDS_FILE, ERROR_FILE, LOCK_FILE),
    *("train.log", "outcome.json", "wandb_run_id"),
)
"""What this package and its loggers read and write in a run folder."""

WANDB_LINK = "debug-core.log"
"""The link of wandb to the log of its service, which lies elsewhere; nothing is written through it."""


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
    """Finds a run and its checkpoint.

    Args:
        run: a run folder, or a .ckpt file. In a run folder, damaged last checkpoints are skipped with a warning.
        which: the checkpoint of a run folder, "last" or "best".
        option: name of the option for `run` in messages.

    Raises:
        UserError: the run or the checkpoint does not exist, is damaged, or the folder leads out of itself.
    """
    path = Path(run).expanduser()
    if path.is_file():
        folder = path.parent.parent if path.parent.name == CHECKPOINTS else path.parent
        check_contained(folder)
        _refuse_damaged(path, option)
        return FoundRun(folder, path)
    if not path.is_dir():
        raise UserError(f"{option}={run}: no such run folder or checkpoint file")
    check_contained(path)
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
            f"{option}={run}: no checkpoint in {path / CHECKPOINTS}; was the run stopped before the first one?"
        )
    for checkpoint in reversed(steps):
        wrong = damage(checkpoint)
        if wrong is None:
            return FoundRun(path, checkpoint)
        log.warning("%s is damaged (%s): using the previous one", checkpoint, wrong)
    raise UserError(f"{option}={run}: all checkpoints in {path / CHECKPOINTS} are damaged")


def check_contained(folder: Path, names: Sequence[str] = LAYOUT) -> None:
    """Checks that everything with these names, at any depth, lies in the folder and is a file or a folder.

    A run folder may be untrusted: a link in it could make a training write elsewhere, and reading a pipe never ends.

    Raises:
        UserError: a link leads out of the folder; or there is a pipe, a socket or a device.
    """
    root = os.path.realpath(folder)
    todo, seen = (
        [os.path.join(root, name) for name in names if os.path.lexists(os.path.join(root, name))],
        set(),
    )
    while todo:
        path = todo.pop()
        if os.path.basename(path) == WANDB_LINK:
            continue
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        if os.path.commonpath([root, real]) != root:
            raise UserError(
                f"{path} is a link out of the run folder, to {real}: remove it, or copy what it leads to"
            )
        try:
            kind = stat.S_IFMT(os.stat(real).st_mode)
        except OSError:  # a link to what does not exist yet: wandb makes some
            continue
        if kind == stat.S_IFDIR:
            todo += [os.path.join(real, name) for name in os.listdir(real)]
        elif kind != stat.S_IFREG:
            raise UserError(f"{path} is neither a file nor a folder: remove it")


def _refuse_damaged(checkpoint: Path, option: str) -> None:
    wrong = damage(checkpoint)
    if wrong is not None:
        raise UserError(f"{option}={checkpoint} is damaged or not a checkpoint: {wrong}; choose another")


def newest_run(runs: Path) -> Path:
    """The run folder under `runs`, including sweeps, with the most recently written checkpoint.

    Raises:
        UserError: no run has a checkpoint.
    """
    checkpoints = list(runs.glob(f"**/{CHECKPOINTS}/step_*.ckpt"))
    if not checkpoints:
        raise UserError(f"ckpt=last: no run with a checkpoint under {runs}; name a run folder instead")
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent.parent


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a folder against other trainings. The lock is released when this process ends, however it ends.

    Raises:
        UserError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+") as file:
        try:
            # a record lock: unlike flock's, it is not inherited by forked workers, which may outlive this process
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


def recipe_folder(parent: Path, recipe: dict[str, Any], prefix: str = "") -> Path:
    """The folder of a recipe; different recipes have different folders.

    Args:
        parent: the parent folder.
        recipe: primitives, with "sampler", "steps" and "seed" at the top level or under "recipe".
        prefix: start of the folder's name, e.g. a task.
    """
    made = recipe.get("recipe", recipe)
    sampler = made["sampler"].partition("(")[0].lower()
    name = f"{sampler}-{made['steps']}_seed-{made['seed']}_{digest_of(recipe)}"
    return parent / (f"{prefix}_{name}" if prefix else name)
