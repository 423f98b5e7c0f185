"""The study of a search of hyperparameters: its file in the sweep's folder, and what a training knows of it."""

import json
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from src.errors import UserError

TRIAL_FILE = "trial.json"
STUDY_FILE = "study.jsonl"
STUDY = "search"


class Member(TypedDict):
    """What trial.json holds.

    trial: number of the trial in the study.
    objective: what is reported: "score", or the name of a score or a validation loss.
    prune_after: trials that run to their end before any is pruned.
    """

    trial: int
    objective: str
    prune_after: int


def storage_of(folder: Path) -> Any:
    """The storage of the study in a sweep's folder.

    Raises:
        UserError: Optuna is not installed, or the file is damaged.
    """
    try:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise UserError(
            "hparams_search: the package optuna is missing; install it with pip install -e '.[search]'"
        ) from None
    file = folder / STUDY_FILE
    try:
        return JournalStorage(JournalFileBackend(str(file)))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        raise UserError(f"{file} is damaged: remove the folder, and repeat the command") from None


def median_pruner(prune_after: int) -> Any:
    """Optuna's median rule: the best value so far is worse than the median of the other trials at this step."""
    from optuna.pruners import MedianPruner

    return MedianPruner(n_startup_trials=prune_after)


def repair(folder: Path) -> None:
    """Removes a line of the study's file that a kill has cut off."""
    file = folder / STUDY_FILE
    if file.is_file() and (content := file.read_bytes()) and not content.endswith(b"\n"):
        with file.open("r+b") as opened:
            opened.truncate(content.rfind(b"\n") + 1)
