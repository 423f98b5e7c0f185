"""Runs a sweep: finds or makes its folder, checks all jobs, hands them to the launcher, and prints the tables."""

import json
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from typing_extensions import TypedDict

from src.app.build import build, class_of, trusting
from src.app.messages import check_names, explain, parsed
from src.app.options import CONF, OPTIONS, check_options, effect_of
from src.app.overrides import trusted_folders, with_guidance, written_out
from src.app.sweep.hparams_search import SEARCH_FILE, HparamsSearch, SearchedSweep, space_of
from src.app.sweep.jobs import (
    JOBS_FILE,
    OUTCOME_FILE,
    SWEEP_FILE,
    Job,
    Sweep,
    combinations,
    composed,
    option_of,
)
from src.app.sweep.report import report_sweep
from src.app.sweep.table import print_tables
from src.errors import UserError
from src.runs.files import Damaged, read_json, write_atomically
from src.runs.folder import LOCK_FILE, check_contained, find_run, locked
from src.runs.output import silent, tolerated
from src.training.study import STUDY_FILE

log = logging.getLogger(__name__)


class Stored(TypedDict):
    """What is read of jobs.json."""

    entry_point: str
    overrides: list[str]


# Options of the sweep, which its jobs do not get.
OF_THE_SWEEP = ("launcher", "sweep", "rerun_failed", "interactions")
SEARCH = "hparams_search"
# Options of a search of which others continue the same search.
OF_ONE_START = (f"{SEARCH}.trials", f"{SEARCH}.at_once")


def run_sweep(entry_point: str, arguments: Sequence[str]) -> int:
    """Runs the jobs of a sweep that have not ended yet, and prints their scores.

    Args:
        entry_point: "train", "sample" or "evaluate".
        arguments: the command line without the program's name and without -m.

    Returns:
        How many jobs have failed, or were killed.

    Raises:
        UserError: an impossible option, or a sweep's folder that belongs to another command.
        SystemExit: with 128 + signal, after the jobs have saved and ended.
    """
    own, of_search, of_sweep = _split(entry_point, arguments)
    settings = composed(entry_point, of_sweep)
    if settings.sweep and not own:
        own = _stored(entry_point, Path(settings.sweep))
        refuse_harmful(own, Path(settings.sweep))
    search = _search(entry_point, [*own, *of_search])
    of_jobs = [o for o in own if _root(o) != SEARCH]
    space = None if search is None else space_of(of_jobs, search)
    example = combinations(of_jobs)[0][0] if space is None else space.example()
    config = composed(entry_point, [*example, *of_sweep])
    check_options(entry_point, config)
    if search is not None and config.rerun_failed:
        raise UserError("rerun_failed=true: a search does not repeat its trials; leave it out")
    if search is not None and config.interactions:
        raise UserError("interactions=true: a search does not run all combinations; leave it out")
    finished = (
        search.finished if search else lambda f: not Sweep(entry_point, f, own).waiting(config.rerun_failed)
    )
    folder = _folder(entry_point, config, own, finished)
    launcher = _launcher(config)
    launcher.check()
    if search is None:
        sweep = Sweep(entry_point, folder, own)
    else:
        sweep = SearchedSweep(entry_point, folder, own, space, search, _higher_is_better(entry_point, config))
    names = (JOBS_FILE, SWEEP_FILE, LOCK_FILE, STUDY_FILE, SEARCH_FILE, "submitit")
    check_contained(folder, [*names, *(job.folder.name for job in sweep.jobs)])
    with locked(folder):
        sweep.write()
        _run(sweep, launcher, config)
    report_sweep(sweep)
    return sweep.unfinished()


def _split(entry_point: str, arguments: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The options that identify a sweep; those of a search and of the sweep that do not, e.g. its launcher.

    Raises:
        UserError: an option that does not exist, or that a sweep does not have.
    """
    flag = next((argument for argument in arguments if argument.startswith("-")), None)
    if flag:
        raise UserError(f"{flag}: a sweep (-m) has no such flag; leave out -m")
    overrides = [part for argument in arguments for part in written_out(argument)]
    check_names(entry_point, overrides, [CONF, *trusted_folders(overrides)])
    if entry_point != "train":
        overrides = with_guidance(overrides)
    own = [o for o in overrides if _root(o) not in OF_THE_SWEEP and option_of(o) not in OF_ONE_START]
    for override in own:
        if option_of(override) == "ckpt":
            raise UserError(f"{override}: a sweep starts new runs; continue one with sweep=<folder>")
    of_search = [o for o in overrides if option_of(o) in OF_ONE_START]
    return own, of_search, [o for o in overrides if _root(o) in OF_THE_SWEEP]


def _root(override: str) -> str:
    return option_of(override).partition(".")[0]


def _search(entry_point: str, overrides: Sequence[str]) -> HparamsSearch | None:
    """The search that a command line chooses, if any."""
    chosen = [o for o in overrides if _root(o) == SEARCH]
    config = composed(entry_point, chosen) if chosen else {}
    return build(config.get(SEARCH), HparamsSearch, SEARCH)


def _higher_is_better(entry_point: str, config: DictConfig) -> bool:
    """Whether more is better of the monitored score: that of the options, or of the run that is evaluated."""
    from src.app.parts import metric_nodes

    nodes = metric_nodes(config)
    if not nodes and entry_point == "evaluate":
        from src.app.restore import config_of
        from src.training.reading import read_checkpoint

        found = find_run(config.run, config.checkpoint)
        nodes = metric_nodes(config_of(read_checkpoint(found.checkpoint), found))
    node = next(iter(nodes.values()), None)
    return bool(node and getattr(class_of(node), "higher_is_better", False))


def _run(sweep: Sweep, launcher: Any, config: DictConfig) -> None:
    def ready(jobs: Sequence[Job]) -> list[Job]:
        return _ready(jobs, launcher)

    try:
        if isinstance(sweep, SearchedSweep):
            print(
                f"sweep       {sweep.folder}\nsearch      {sweep.search.trials} trials: {launcher.describe()}"
            )
            sweep.run(launcher, ready)
        else:
            waiting = sweep.waiting(config.rerun_failed)
            for job in waiting:  # only failed jobs have one
                (job.folder / OUTCOME_FILE).unlink(missing_ok=True)
            print(
                f"sweep       {sweep.folder}\n"
                f"jobs        {len(sweep.jobs)}, {len(waiting)} to run: {launcher.describe()}"
            )
            possible = ready(waiting)
            if not possible and len(waiting) == len(sweep.jobs):
                raise UserError(
                    f"no job of this sweep can run; the first one: {waiting[0].outcome()['error']}"
                )
            launcher.run(possible, len(sweep.jobs))
    finally:
        outcomes = sweep.outcomes()
        named = {job.folder.name: outcomes[job.number] for job in sweep.jobs if job.number in outcomes}
        with tolerated(SWEEP_FILE):
            write_atomically(sweep.folder / SWEEP_FILE, (json.dumps(named, indent=2) + "\n").encode())
        if isinstance(sweep, SearchedSweep):
            sweep.print_trials()
        else:
            print_tables(sweep, outcomes, config.interactions)


def _ready(waiting: Sequence[Job], launcher: Any) -> list[Job]:
    """The jobs that can run; the others get their outcome. Jobs that differ only in the seed are checked once."""
    ready, known = [], {}
    with launcher.rich_progress("checking the jobs", len(waiting)) as advance:
        for job in waiting:
            alike = tuple(o for o in job.overrides if not re.fullmatch(r"seed=\d+", o))
            if alike not in known:
                known[alike] = _checked(job, launcher.elsewhere)
            checked, error = known[alike]
            if error is None:
                ready.append(replace(job, steps=checked.steps, devices=checked.devices))
            else:
                job.close(error=error)
                print(f"cannot run  {' '.join(job.varied)}: {error}")
            advance()
    return ready


def _folder(entry_point: str, config: DictConfig, own: list[str], finished: Callable[[Path], bool]) -> Path:
    """The folder of the sweep: the given one, that of the same command if it was interrupted, or a new one."""
    new = Path(config.hydra.sweep.dir)
    if config.sweep:
        folder = Path(config.sweep)
        stored = _stored(entry_point, folder)
        if stored != own:
            gone, added = (" ".join(o for o in a if o not in b) for a, b in ((stored, own), (own, stored)))
            raise UserError(
                f"sweep={folder} belongs to another command; it has {gone or 'nothing'} and this command has"
                f" {added or 'nothing'} in its place (in this order); leave the options out, or leave sweep= out"
            )
        return folder
    files = sorted(new.parent.glob(f"*/{JOBS_FILE}"), key=lambda path: path.stat().st_mtime)
    for path in reversed(files):
        with suppress(UserError):
            if _stored(entry_point, path.parent) == own:
                if not finished(path.parent):
                    return path.parent
                break
    return new


def _stored(entry_point: str, folder: Path) -> list[str]:
    """The options of the command of a sweep's folder, which may be untrusted.

    Raises:
        UserError: it is no sweep's folder, or one of another entry point.
    """
    try:
        content = read_json(folder / JOBS_FILE, Stored)
    except FileNotFoundError:
        raise UserError(f"sweep={folder}: no folder of a sweep ({JOBS_FILE} is missing)") from None
    except Damaged:
        raise UserError(f"sweep={folder}: {JOBS_FILE} is damaged; repeat the sweep's command") from None
    made_by = content["entry_point"]
    if made_by != entry_point:
        raise UserError(f"sweep={folder} is a sweep of src.{made_by}; use python -m src.{made_by}")
    return content["overrides"]


def refuse_harmful(overrides: list[str], folder: Path) -> None:
    """Checks the stored options of a sweep, which may be untrusted, before Hydra parses them.

    Raises:
        UserError: one is a flag, adds to `trust`, or names a class, an environment variable, a file outside conf/ or a
            folder to which a job writes.
    """
    for text in overrides:
        if text.startswith("-") or not all(map(_harmless, parsed([text]))):
            raise UserError(
                f"sweep={folder}: {text[:100]!r} is not taken from a folder, which may be untrusted: repeat the sweep's"
                " command if you trust it"
            )


def _harmless(override: Any) -> bool:
    key, value = override.key_or_group, override.input_line.partition("=")[2]
    words = set(re.split(r"\W+", f"{key}.{override.package}"))
    if words & {"hydra", "trust"} or "_target_" in f"{key}{value}{override.value()}" or "$" in value:
        return False
    if key.startswith(f"{SEARCH}.space"):  # it holds options itself
        return False
    if "." in key or key in {option.name for options in OPTIONS.values() for option in options}:
        # each job has a folder of its own, so that nothing is written to `runs`
        return key == "runs" or (effect_of(key) != "once" and key not in ("run", "out"))
    return key != "launcher" and re.search(r"[./\\]", value) is None  # the choice of a group is a file


def _launcher(config: DictConfig) -> Any:
    from src.app.sweep.launcher import Launcher

    return build(config.launcher, Launcher, "launcher")


def _checked(job: Job, elsewhere: bool) -> tuple[Job, str | None]:
    """The job with its steps and devices; and why it cannot run, or None.

    Args:
        job: the job.
        elsewhere: whether it will run on another machine, so that the devices of this one do not matter.
    """
    try:
        config = composed(job.entry_point, job.overrides)
        check_options(job.entry_point, config)
        if job.entry_point != "train":
            return replace(job, devices=config.devices), None
        steps = None if config.budget else config.trainer.max_steps
        job = replace(job, steps=steps, devices=devices_of(config.trainer.devices))
        if elsewhere:
            here = {
                "accelerator": "cpu",
                "devices": 1,
                "num_nodes": 1,
                "strategy": "auto",
                "precision": "32-true",
            }
            config.trainer = OmegaConf.merge(config.trainer, here)
        with trusting(config.trust), silent():
            from src.app.assemble import assemble

            OmegaConf.set_struct(config, False)
            config.pop("hydra")
            assemble(config, job.folder)
    except UserError as error:
        return job, str(error)
    except Exception as error:
        line = explain(error, job.entry_point, list(job.overrides), job.entry_point)
        if not line:
            log.exception("job %d cannot be checked", job.number)
        return job, line or f"{type(error).__name__}: {error}"
    return job, None


def devices_of(value: Any) -> int:
    """How many devices trainer.devices orders of a launcher; 1 where the job is to use all that it is given."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return max(1, len(value))
    found = int(value) if re.fullmatch(r"\d+", str(value)) else 1
    return max(1, found)
