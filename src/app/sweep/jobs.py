"""A sweep (`-m`): its jobs, their folders and outcomes, and the tables at its end.

A job is the command line of a single run with a folder of its own, so that every launcher runs the same thing:

    <sweep>/jobs.json               the command and its jobs
    <sweep>/<number>_<what differs> the job's folder (a training's run folder)
        outcome.json                its scores, or why it failed; written when it has ended
        scores.json                 the record of a training or an evaluation
        console.log                 what it printed, unless it ran in the launcher's process
    <sweep>/sweep.json              the outcomes of all jobs
"""

import fcntl
import itertools
import logging
import re
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NotRequired

from omegaconf import DictConfig, OmegaConf
from typing_extensions import TypedDict

from src.app.messages import parsed
from src.app.options import CONF
from src.app.overrides import quoted, trusted_folders
from src.errors import UserError
from src.runs.files import Damaged, digest_of, read_json, write_json
from src.runs.folder import CHECKPOINTS, checkpoints_by_step

log = logging.getLogger(__name__)

JOBS_FILE = "jobs.json"
OUTCOME_FILE = "outcome.json"
SWEEP_FILE = "sweep.json"
CONSOLE_FILE = "console.log"
LEASE_FILE = "running"
LONGEST_NAME = 100  # bytes


def register() -> None:
    """Registers the resolvers that conf/ uses.

    `unique:` four hexadecimal digits, the same throughout a process: two runs of one second differ.
    """
    OmegaConf.register_new_resolver("unique", lambda: secrets.token_hex(2), use_cache=True, replace=True)


def folder_name(text: str) -> str:
    """Letters, digits and "._+-" are kept, a comma becomes "_", all else "-"; long texts end in a hash.

    No "=" and no comma: such a folder would have to be quoted in Hydra's overrides.
    """
    name = re.sub(r"[^\w.+-]+", "-", text.replace(",", "_"))
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{name.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}-{digest_of(text)}"


class Outcome(TypedDict):
    """What a job leaves in its folder."""

    overrides: list[str]
    scores: NotRequired[dict[str, float]]
    error: NotRequired[str]


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        entry_point: "train", "sample" or "evaluate".
        folder: its folder.
        overrides: its options.
        varied: those of them that differ between the jobs of the sweep.
        steps: of a training, if known.
        devices: that it uses.
    """

    entry_point: str
    folder: Path
    overrides: tuple[str, ...]
    varied: tuple[str, ...]
    steps: int | None = None
    devices: int = 1

    @property
    def number(self) -> int:
        """Its place in the sweep, from 0."""
        return int(self.folder.name.partition("_")[0])

    def arguments(self) -> list[str]:
        """The arguments of `python -m src.<entry point>` that start the job, or continue it."""
        if self.entry_point == "train" and checkpoints_by_step(self.folder / CHECKPOINTS):
            return [*self.overrides, f"ckpt={quoted(self.folder)}"]
        return [*self.overrides, f"hydra.run.dir={quoted(self.folder)}"]

    def command(self) -> list[str]:
        """The command line that starts the job in a process of its own."""
        return [sys.executable, "-m", f"src.{self.entry_point}", *self.arguments()]

    def begin(self, mark: str = "") -> IO[str] | None:
        """Leases the job, which no other process may run, and prepares its folder.

        A last checkpoint, after which a killed training lacked only its scores, is dropped, so that it is trained
        again from the one before.

        Args:
            mark: is kept with the job, see `mark`.

        Returns:
            A file that is locked while it is open anywhere: hand it on to the job's process. None while the job is run
            by another process.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lease = (self.folder / LEASE_FILE).open("a")
        try:
            fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lease.close()
            return None
        lease.truncate(0)
        lease.write(mark)
        lease.flush()
        self.collect()  # it ended after its launcher was killed
        if self.outcome() is None:
            for checkpoint in checkpoints_by_step(self.folder / CHECKPOINTS):
                if self.steps is not None and int(checkpoint.stem.partition("_")[2]) >= self.steps:
                    checkpoint.unlink()
        return lease

    @property
    def mark(self) -> str:
        """What the last process that ran the job left with it; empty without one."""
        with suppress(OSError):
            return (self.folder / LEASE_FILE).read_text()
        return ""

    @property
    def scores_file(self) -> Path:
        """Where the job's process writes its scores."""
        return self.folder / ".scores.json"

    def collect(self) -> bool:
        """Makes the scores of a process that has ended the outcome; False if there are none."""
        try:
            self.close(read_json(self.scores_file, dict[str, float]))
        except (OSError, Damaged):
            return False
        self.scores_file.unlink()
        return True

    def outcome(self) -> Outcome | None:
        """`scores`, or `error`; None while the job has not ended."""
        with suppress(OSError, Damaged):
            content = read_json(self.folder / OUTCOME_FILE, Outcome)
            if {"scores", "error"} & set(content):
                return content
        return None

    def close(self, scores: dict[str, float] | None = None, error: str | None = None) -> None:
        """Writes the outcome."""
        outcome = {"scores": scores} if error is None else {"error": error}
        write_json(self.folder / OUTCOME_FILE, {"overrides": list(self.overrides), **outcome})


class Sweep:
    """The jobs of a sweep in their folder.

    Args:
        entry_point: "train", "sample" or "evaluate".
        folder: the sweep's folder.
        overrides: the options of the command line, without those of the sweep itself.
    """

    def __init__(self, entry_point: str, folder: Path, overrides: Sequence[str]):
        self.entry_point = entry_point
        self.folder = folder
        self.overrides = list(overrides)
        self.jobs = [
            Job(entry_point, folder / f"{number}_{folder_name(','.join(varied))}", chosen, varied)
            for number, (chosen, varied) in enumerate(combinations(self.overrides))
        ]

    def write(self) -> None:
        """Writes jobs.json."""
        jobs = [{**asdict(job), "folder": job.folder.name} for job in self.jobs]
        content = {"entry_point": self.entry_point, "overrides": self.overrides, "jobs": jobs}
        write_json(self.folder / JOBS_FILE, content)

    def outcomes(self) -> dict[int, Outcome]:
        """The outcomes of the jobs that have ended, by number."""
        found = ((job.number, job.outcome()) for job in self.jobs)
        return {number: outcome for number, outcome in found if outcome is not None}

    def unfinished(self) -> int:
        """How many jobs have failed, were killed, or have not run."""
        return sum("scores" not in (job.outcome() or {}) for job in self.jobs)

    def waiting(self, rerun_failed: bool) -> list[Job]:
        """The jobs without an outcome, and on request those that failed."""
        outcomes = self.outcomes()
        return [
            job
            for job in self.jobs
            if job.number not in outcomes or (rerun_failed and "error" in outcomes[job.number])
        ]


def combinations(overrides: Sequence[str]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The options of each job: all of them, and those that differ between jobs.

    Raises:
        UserError: an option has no list of values, e.g. interval(0,1).
    """
    choices: list[list[str]] = []
    for override in parsed(list(overrides)):
        if not override.is_sweep_override():
            choices.append([override.input_line])
        elif override.is_discrete_sweep():
            name = override.get_key_element()
            choices.append([f"{name}={value}" for value in override.sweep_string_iterator()])
        else:
            raise UserError(f"{override.input_line}: give the values, e.g. {override.key_or_group}=1,2,3")
    varied = [len(values) > 1 for values in choices]
    jobs = []
    for chosen in itertools.product(*choices):
        differing = tuple(itertools.compress(chosen, varied))
        jobs.append((chosen, differing))
    return jobs


def option_of(override: str) -> str:
    """The option or the group that an override sets, e.g. "sampler.steps"."""
    return re.split(r"[@=]", override.lstrip("+~"), maxsplit=1)[0]


def composed(entry_point: str, overrides: Sequence[str]) -> DictConfig:
    """conf/<entry point>.yaml with these options, and with Hydra's settings."""
    from hydra import compose, initialize_config_dir
    from hydra.core.utils import setup_globals

    setup_globals()
    folders = trusted_folders(list(overrides))
    if folders:
        places = ",".join(f"'file://{folder}'" for folder in folders)
        overrides = [*overrides, f"hydra.searchpath=[{places}]"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(entry_point, list(overrides), return_hydra_config=True)
