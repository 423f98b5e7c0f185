"""A run's folder: where things lie in it, and how it is found again.

config.yaml        the composed configuration, interpolations filled in
environment.json   versions, hardware, git revision
checkpoints/       step_<k>.ckpt (the newest two), best.ckpt and best.json
samples/           previews and drawn images
csv/               the curves
scores.json        the last scores and their protocol
"""

import json
import platform
import re
import subprocess
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from src.command_line import quoted
from src.errors import UserError

CHECKPOINTS = "checkpoints"
BEST_FILE = "best.ckpt"
STEP_FILE = re.compile(r"step_(\d+)\.ckpt")
CONFIG_FILE = "config.yaml"


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
        run: a run folder, or a .ckpt file in its checkpoints folder or anywhere else.
        which: the checkpoint of a run folder, "last" or "best".
        option: what to call `run` in messages.

    Raises:
        UserError: there is no such thing.
    """
    path = Path(run).expanduser()
    if path.is_file():
        folder = path.parent.parent if path.parent.name == CHECKPOINTS else path.parent
        return FoundRun(folder, path)
    if not path.is_dir():
        raise UserError(f"{option}={run}: no such run folder or checkpoint file")
    if which == "best":
        best = path / CHECKPOINTS / BEST_FILE
        if not best.is_file():
            raise UserError(f"checkpoint=best: {path} has no {BEST_FILE}; choose checkpoint=last")
        return FoundRun(path, best)
    if which != "last":
        raise UserError(f"checkpoint={which}: choose last or best")
    steps = checkpoints_by_step(path / CHECKPOINTS)
    if not steps:
        raise UserError(
            f"{option}={run}: no checkpoint in {path / CHECKPOINTS}; was the run stopped before its first?"
        )
    return FoundRun(path, steps[-1])


def newest_run(runs: Path) -> Path:
    """The folder under `runs` whose newest checkpoint was written last, sweeps included.

    Raises:
        UserError: no run has a checkpoint.
    """
    checkpoints = list(runs.glob(f"**/{CHECKPOINTS}/step_*.ckpt"))
    if not checkpoints:
        raise UserError(f"ckpt=last: no run with a checkpoint under {runs}; name a run folder instead")
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent.parent


def resume_overrides(arguments: list[str]) -> list[str]:
    """The command line of a run that goes on: that of the run itself, and what is said anew.

    With `ckpt=` among the arguments, the stored overrides of that run come first, its folder is used again,
    and `ckpt` becomes the checkpoint file. Without it, the arguments as they are.

    Args:
        arguments: the command line without the program's name.

    Raises:
        UserError: there is no such run.
    """
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if given.get("ckpt", "null") == "null":
        return arguments
    if given["ckpt"] == "last":
        run = find_run(newest_run(Path(given.get("runs", "runs"))), option="ckpt")
    else:
        run = find_run(given["ckpt"], option="ckpt")
    stored_file = run.folder / ".hydra" / "overrides.yaml"
    stored = yaml.safe_load(stored_file.read_text()) if stored_file.is_file() else []
    kept = [override for override in stored if override.split("=", 1)[0] not in given]
    own = [argument for argument in arguments if not argument.startswith("ckpt=")]
    return [*kept, *own, f"ckpt={quoted(run.checkpoint)}", f"hydra.run.dir={quoted(run.folder)}"]


def environment() -> dict[str, Any]:
    """Versions, hardware and the git revision: what a number depends on besides its configuration."""
    import torch

    packages = ("torch", "lightning", "hydra-core", "torchmetrics", "torch-fidelity", "wandb", "numpy")
    return {
        "git": git_revision(),
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
    path.write_text(json.dumps(content, indent=2) + "\n")
