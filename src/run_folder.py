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
import json
import logging
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from src.command_line import lasting, quoted, refuse_harmful, unquoted
from src.errors import UserError
from src.sidecar import damage

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
BEST_FILE = "best.ckpt"
STEP_FILE = re.compile(r"step_(\d+)\.ckpt")
CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
# Where Hydra keeps them; written by us, for Hydra does so before anything is checked.
OVERRIDES_FILE = ".hydra/overrides.yaml"
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


def requeued_run(runs: Path, overrides: list[str]) -> Path | None:
    """The run that this SLURM job trained before it was put back into the queue, sweeps included, if any.

    Args:
        runs: the folder of the run folders.
        overrides: what the training is started with: a job may hold several. The newest of equal ones is meant.
    """
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    records = [path for depth in ("*", "sweeps/*/*") for path in runs.glob(f"{depth}/{ENVIRONMENT_FILE}")]
    for path in sorted(records, key=lambda path: path.stat().st_mtime, reverse=True):
        if (
            json.loads(path.read_text()).get("slurm_job") == slurm_job()
            and sorted(stored_overrides(path.parent)) == sorted(overrides)
            and checkpoints_by_step(path.parent / CHECKPOINTS)
        ):
            return path.parent
    return None


def stored_overrides(folder: Path) -> list[str]:
    """What a run was composed with; empty if it is not known.

    Raises:
        UserError: the file is damaged, or not harmless (see `refuse_harmful`).
    """
    file = folder / OVERRIDES_FILE
    try:
        stored = yaml.safe_load(file.read_text()) if file.is_file() else []
    except (ValueError, yaml.YAMLError):
        stored = None
    if not isinstance(stored, list):
        raise UserError(f"{file} is damaged: it must be a list of options")
    refuse_harmful(stored, file)
    return lasting(stored)


def write_overrides(folder: Path, overrides: list[str]) -> None:
    """Keeps those overrides of a run that hold when it goes on."""
    file = folder / OVERRIDES_FILE
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, yaml.safe_dump(lasting(overrides)).encode())


def slurm_job() -> str | None:
    """The number of the SLURM job that this process belongs to; None outside one."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def is_first_process() -> bool:
    """Whether this process is rank 0, or is about to start the others."""
    return all(
        os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    )


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


def resume_overrides(arguments: list[str]) -> list[str]:
    """The command line of a run that goes on: that of the run itself, and what is said anew.

    With `ckpt=` among the arguments, or in a SLURM job that was put back into the queue, the stored overrides of
    that run come first, its folder is used again, and `ckpt` becomes the checkpoint file. Otherwise the
    arguments as they are.

    Args:
        arguments: the command line without the program's name.

    Raises:
        UserError: there is no such run, or its stored overrides are not harmless.
    """
    pairs = (argument.split("=", 1) for argument in arguments if "=" in argument)
    given = {name: unquoted(value) for name, value in pairs}
    runs = Path(given.get("runs", "runs"))
    if given.get("ckpt", "null") != "null":
        run = find_run(newest_run(runs) if given["ckpt"] == "last" else given["ckpt"], option="ckpt")
    elif (requeued := requeued_run(runs, lasting(arguments))) is not None:
        run = find_run(requeued, option="ckpt")
    else:
        return arguments
    kept = [
        override
        for override in stored_overrides(run.folder)
        if override not in arguments and override.split("=", 1)[0] not in given
    ]
    own = [argument for argument in arguments if not argument.startswith("ckpt=")]
    return [*kept, *own, f"ckpt={quoted(run.checkpoint)}", f"hydra.run.dir={quoted(run.folder)}"]


def environment() -> dict[str, Any]:
    """Versions, hardware and the git revision: what a number depends on besides its configuration."""
    import torch

    packages = ("torch", "lightning", "hydra-core", "torchmetrics", "torch-fidelity", "wandb", "numpy")
    return {
        "git": git_revision(),
        "slurm_job": slurm_job(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": {name: version(name) for name in packages},
    }


def git_revision() -> str | None:
    """The commit of the code, with "+changes" if files differ from it; None outside a git checkout."""
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


def recipe_folder(parent: Path, recipe: dict[str, Any]) -> Path:
    """A folder of its own for each recipe: the same recipe finds its folder again, another never overwrites it."""
    digest = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    made = recipe.get("recipe", recipe)
    sampler = made["sampler"].partition("(")[0].lower()
    return parent / f"{sampler}-{made['steps']}_seed-{made['seed']}_{digest}"


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON, the folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that a kill leaves either as it was or complete, and flushes it and its folder to disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renames themselves
    finally:
        os.close(folder)


@contextmanager
def forgiving(what: str) -> Iterator[None]:
    """What cannot be written within it (a full disk) is told in the log and does not end the training."""
    try:
        yield
    except OSError as error:
        log.error("%s: %s; the training goes on", what, error.strerror or error)
