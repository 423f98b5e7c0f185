"""What a run folder says about its training: status, step, scores, configuration and cost.

A run folder may be untrusted or damaged: nothing outside it is read, and what cannot be read is listed in `problems`.
Neither torch nor Hydra is loaded.
"""

import csv
import fcntl
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

from typing_extensions import TypedDict

from src.errors import UserError
from src.evaluation.record import Record
from src.runs.files import LARGEST_JSON, Damaged, open_regular, read_json
from src.runs.folder import (
    BEST_FILE,
    CHECKPOINTS,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    ERROR_FILE,
    LOCK_FILE,
    SCORES_FILE,
    check_contained,
    checkpoints_by_step,
)

STATUSES = ("finished", "running", "stopped", "failed")
JOBS_FILE = "jobs.json"
OUTCOME_FILE = "outcome.json"
BEST_RECORD = f"{CHECKPOINTS}/{Path(BEST_FILE).with_suffix('.json')}"
READ = (CONFIG_FILE, ENVIRONMENT_FILE, SCORES_FILE, ERROR_FILE, OUTCOME_FILE, LOCK_FILE, CHECKPOINTS, "csv")
"""What is read in a run folder here; samples/ and scores/ are checked where they are read."""
TAIL = 1 << 16  # bytes of a CSV file from which the present speed is taken
MOST_OPTIONS = 10_000  # of a configuration; YAML can repeat one part exponentially often
LARGEST = 1e15  # number in a CSV file


class Job(TypedDict):
    """A job in jobs.json."""

    folder: str
    overrides: list[str]
    varied: list[str]


class Jobs(TypedDict):
    """What is read of a sweep's jobs.json."""

    entry_point: str
    jobs: list[Job]


@dataclass(frozen=True)
class Cost:
    """What a training has cost so far.

    Attributes:
        seconds: from the curves: images trained on, divided by images per second. Includes previews and scores, and
            excludes the start. None without curves.
        images_per_second: the median over the last points of the curves; None without curves.
        images: training images consumed, over all devices.
        hardware: e.g. "2 x NVIDIA A100" or "CPU, 4 threads".
        parameters: of the network; None if unknown.
    """

    seconds: float | None = None
    images_per_second: float | None = None
    images: int | None = None
    hardware: str = ""
    parameters: int | None = None


@dataclass
class Run:
    """A training's run folder, or the folder of a job of a sweep that failed before it was one.

    Attributes:
        folder: the folder.
        status: one of `STATUSES`. A stopped run was ended by a signal or a kill, and can be continued.
        error: why it failed; None for other runs.
        step: optimiser steps, by the newest checkpoint or the last point of the curves.
        max_steps: steps of a complete training; None if unknown.
        last: the scores at the end of the training, or None.
        best: the scores of the best checkpoint, or None.
        cost: what it has cost.
        started: when the configuration was written; None if it was not.
        options: the configuration, flat: {"schedule._target_": "src.diffusion.schedule.Cosine", ...}.
        environment: versions and hardware.
        varied: for a job of a sweep, its options that differ between the jobs.
        problems: files that could not be read, with the reason.
    """

    folder: Path
    status: str = "stopped"
    error: str | None = None
    step: int = 0
    max_steps: int | None = None
    last: Record | None = None
    best: Record | None = None
    cost: Cost = field(default_factory=Cost)
    started: datetime | None = None
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    varied: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)

    @property
    def record(self) -> Record | None:
        """The last scores; of a training that has not ended, those of the best checkpoint."""
        return self.last or self.best


def is_run(folder: Path) -> bool:
    """Whether a folder is the run folder of a training."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "hydra.yaml").is_file()


def find_runs(place: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The run folders at or below a folder, in order of their names, each with its `Run.varied`.

    A sweep of trainings gives all its jobs that have begun. Links to folders are not followed.
    """
    if is_run(place):
        yield place, ()
        return
    sweep = jobs_of(place)
    if sweep is not None:
        jobs = sweep["jobs"] if sweep["entry_point"] == "train" else []
        for job in jobs:
            if (folder := inside(place, job["folder"])).is_dir():
                yield folder, tuple(job["varied"])
        return
    try:
        names = sorted(entry.name for entry in os.scandir(place) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for name in names:
        if not name.startswith("."):
            yield from find_runs(place / name)


def inside(folder: Path, name: str) -> Path:
    """The part of a folder with a name from an untrusted file, of which a path is not followed."""
    return folder / (Path(name).name or "-")


def jobs_of(sweep: Path) -> Jobs | None:
    """The jobs of a sweep's folder; None if it is none, or its list of jobs is damaged."""
    try:
        return read_json(sweep / JOBS_FILE, Jobs)
    except (FileNotFoundError, Damaged):
        return None


def read_run(folder: Path, varied: tuple[str, ...] = ()) -> Run:
    """Reads a run folder.

    One from which a link leads out, or with a pipe or a device in it, is not read: its status is "failed".
    """
    run = Run(folder, varied=varied)
    try:
        check_contained(folder, READ)
    except UserError as error:
        run.status, run.error = "failed", str(error)
        return run
    run.options = _options(run)
    run.environment = _json(run, ENVIRONMENT_FILE) or {}
    run.last, run.best = _record(run, SCORES_FILE), _record(run, BEST_RECORD)
    most = run.options.get("trainer.max_steps")
    run.max_steps = most if isinstance(most, int) else None
    tail = _tail(run)
    steps = [int(path.stem.partition("_")[2]) for path in checkpoints_by_step(folder / CHECKPOINTS)[-1:]]
    run.step = int(max([0, *steps, *(_number(row.get("step")) or 0 for row in tail)]))
    run.cost = _cost(run, tail)
    run.status, run.error = _status(run)
    return run


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys; lists are values."""
    found: dict[str, Any] = {}
    todo = [(prefix, node)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, Mapping) and value:
            parts = [(f"{name}.{key}" if name else str(key), part) for key, part in value.items()]
            todo += reversed(parts)  # the first one comes next
        elif name:
            found[name] = value
    return found


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not YAML, or too large.
    """
    import yaml

    with open_regular(path) as file:
        text = file.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise ValueError(f"larger than {LARGEST_JSON:,} bytes")
    try:
        content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not YAML: {str(error).partition(chr(10))[0]}") from None
    todo, parts = [content], 0
    while todo:
        part = todo.pop()
        parts += 1
        if parts > MOST_OPTIONS:
            raise ValueError(f"more than {MOST_OPTIONS:,} values")
        todo += part.values() if isinstance(part, Mapping) else part if isinstance(part, list) else ()
    return content


def _options(run: Run) -> dict[str, Any]:
    path = run.folder / CONFIG_FILE
    try:
        run.started = datetime.fromtimestamp(path.stat().st_mtime)
        return flat(read_yaml(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, UserError) as error:
        run.problems.append(f"{CONFIG_FILE}: {error}")
        return {}


def _json(run: Run, name: str) -> dict[str, Any] | None:
    try:
        return read_json(run.folder / name, dict[str, Any])
    except FileNotFoundError:
        return None
    except UserError as error:
        run.problems.append(str(error))
        return None


def _record(run: Run, name: str) -> Record | None:
    path = run.folder / name
    if not path.exists():
        return None
    try:
        return Record.read(path)
    except UserError as error:
        run.problems.append(str(error))
        return None


def _status(run: Run) -> tuple[str, str | None]:
    if is_locked(run.folder / LOCK_FILE):
        return "running", None
    for name in (OUTCOME_FILE, ERROR_FILE):
        if error := (_json(run, name) or {}).get("error"):
            return "failed", str(error)
    if run.last is None:
        return "stopped", None
    if run.max_steps is not None and run.step >= run.max_steps:
        return "finished", None
    # fewer steps: early stopping, or continued since the scores were written; a start writes the configuration
    newer = os.stat(run.folder / SCORES_FILE).st_mtime >= (run.started.timestamp() if run.started else 0)
    return ("finished" if newer else "stopped"), None


def is_locked(path: Path) -> bool:
    """Whether another process holds a record lock on a file; asking takes none."""
    try:
        with open_regular(path) as file:
            if sys.platform != "linux":
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
            layout = "hhqqi4x"  # struct flock: type, whence, start, length, process
            asked = struct.pack(layout, fcntl.F_RDLCK, 0, 0, 0, 0)
            found = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except BlockingIOError:
        return True
    except (OSError, UserError):
        return False
    return found[0] != fcntl.F_UNLCK


def curve_files(folder: Path) -> list[Path]:
    """The CSV files of a run, one for each of its starts, oldest first."""
    paths = folder.glob("csv/version_*/metrics.csv")
    return sorted(paths, key=lambda path: int("".join(filter(str.isdecimal, path.parent.name)) or 0))


def _tail(run: Run) -> list[dict[str, str]]:
    """The last rows of the curves."""
    files = curve_files(run.folder)
    if not files:
        return []
    try:
        with open_regular(files[-1]) as file:
            header = file.readline(TAIL)
            file.seek(max(len(header), os.fstat(file.fileno()).st_size - TAIL))
            if file.tell() > len(header):
                file.readline()  # the rest of a row
            text = (header + file.read()).decode(errors="replace")
        return [row for row in csv.DictReader(StringIO(text)) if None not in row]
    except (OSError, UserError, csv.Error) as error:
        run.problems.append(f"{files[-1].name}: {error}")
        return []


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if abs(value) < LARGEST else None


def _cost(run: Run, tail: list[dict[str, str]]) -> Cost:
    speeds = [speed for row in tail if (speed := _number(row.get("train/images_per_second")))]
    images = [count for row in tail if (count := _number(row.get("train/samples")))]
    speed, count = (median(speeds) if speeds else None), (int(images[-1]) if images else None)
    seconds = count / speed if speed and count and speed > 1 / LARGEST else None
    parameters = run.environment.get("parameters")
    return Cost(
        seconds,
        speed,
        count,
        hardware_of(run.environment),
        parameters if isinstance(parameters, int) else None,
    )


def hardware_of(environment: Mapping[str, Any]) -> str:
    """The hardware in environment.json, e.g. "2 x NVIDIA A100" or "AMD EPYC 9654, 2 threads"."""
    gpus = environment.get("gpus")
    if isinstance(gpus, list) and gpus:
        names = sorted({str(name) for name in gpus})
        return ", ".join(f"{gpus.count(name)} x {name}" if gpus.count(name) > 1 else name for name in names)
    if "cpu_threads" not in environment:
        return ""
    threads = environment["cpu_threads"]
    return f"{environment.get('cpu') or 'CPU'}, {threads} thread{'' if threads == 1 else 's'}"
