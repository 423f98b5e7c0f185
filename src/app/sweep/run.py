"""Runs a sweep: finds or makes its folder, checks all jobs, hands them to the launcher, and prints the tables."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from typing_extensions import TypedDict

from src.app.messages import check_names, explain, parsed
from src.app.options import CONF, OPTIONS, check_options, effect_of
from src.app.overrides import trusted_folders, with_guidance, written_out
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
from src.runs.folder import LOCK_FILE, check_contained, locked


class Stored(TypedDict):
    """What is read of jobs.json."""

    entry_point: str
    overrides: list[str]


# Options of the sweep, which its jobs do not get.
OF_THE_SWEEP = ("launcher", "sweep", "rerun_failed")


def run_sweep(entry_point: str, arguments: Sequence[str]) -> int:
    """Runs the jobs of a sweep that have not ended yet, and prints their scores.

    Args:
        entry_point: "train", "sample" or "evaluate".
        arguments: the command line without the program's name and without -m.

    Returns:
        How many jobs have failed.

    Raises:
        UserError: an impossible option, or a sweep's folder that belongs to another command.
        SystemExit: with 128 + signal, after the jobs have saved and ended.
    """
    flag = next((argument for argument in arguments if argument.startswith("-")), None)
    if flag:
        raise UserError(f"{flag}: a sweep (-m) has no such flag; leave out -m")
    overrides = [part for argument in arguments for part in written_out(argument)]
    places = [CONF, *trusted_folders(overrides)]
    check_names(entry_point, overrides, places)
    if entry_point != "train":
        overrides = with_guidance(overrides)
    own = [o for o in overrides if option_of(o).partition(".")[0] not in OF_THE_SWEEP]
    for override in own:
        if option_of(override) == "ckpt":
            raise UserError(f"{override}: a sweep starts new runs; continue one with sweep=<folder>")
    settings = composed(entry_point, [o for o in overrides if o not in own])
    if settings.sweep and not own:
        own = _stored(entry_point, Path(settings.sweep))
        refuse_harmful(own, Path(settings.sweep))
    every = combinations(own)
    config = composed(entry_point, [*every[0][0], *(o for o in overrides if o not in own)])
    check_options(entry_point, config)
    folder = _folder(entry_point, config, own)
    launcher = _launcher(config)
    sweep = Sweep(entry_point, folder, own)
    names = (JOBS_FILE, SWEEP_FILE, LOCK_FILE, "submitit")
    check_contained(folder, [*names, *(job.folder.name for job in sweep.jobs)])
    with locked(folder):
        sweep.write()
        _run(sweep, launcher, config.rerun_failed)
    outcomes = sweep.outcomes()
    report_sweep(sweep)
    return sum("error" in outcome for outcome in outcomes.values())


def _run(sweep: Sweep, launcher: Any, rerun_failed: bool) -> None:
    waiting = sweep.waiting(rerun_failed)
    for job in waiting:  # only failed jobs have one
        (job.folder / OUTCOME_FILE).unlink(missing_ok=True)
    print(
        f"sweep       {sweep.folder}\njobs        {len(sweep.jobs)}, {len(waiting)} to run: {launcher.describe()}"
    )
    ready = []
    with launcher.rich_progress("checking the jobs", len(waiting)) as advance:
        for job in waiting:
            steps, error = _check(job)
            if error is None:
                ready.append(replace(job, steps=steps))
            else:
                job.close(error=error)
                print(f"cannot run  {' '.join(job.varied)}: {error}")
            advance()
    try:
        launcher.run(ready, len(sweep.jobs))
    finally:
        outcomes = sweep.outcomes()
        named = {job.folder.name: outcomes[job.number] for job in sweep.jobs if job.number in outcomes}
        write_atomically(sweep.folder / SWEEP_FILE, (json.dumps(named, indent=2) + "\n").encode())
        print_tables(sweep, outcomes)


def _folder(entry_point: str, config: DictConfig, own: list[str]) -> Path:
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
                if Sweep(entry_point, path.parent, own).waiting(config.rerun_failed):
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
    if "." in key or key in {option.name for options in OPTIONS.values() for option in options}:
        # each job has a folder of its own, so that nothing is written to `runs`
        return key == "runs" or (effect_of(key) != "once" and key not in ("run", "out"))
    return key != "launcher" and re.search(r"[./\\]", value) is None  # the choice of a group is a file


def _launcher(config: DictConfig) -> Any:
    from src.app.build import build
    from src.app.sweep.launcher import Launcher

    return build(config.launcher, Launcher, "launcher")


def _check(job: Job) -> tuple[int | None, str | None]:
    """The steps of a training; and why the job cannot run, or None."""
    from src.app.build import trusting

    steps = None
    try:
        config = composed(job.entry_point, job.overrides)
        check_options(job.entry_point, config)
        if job.entry_point == "train":
            steps = config.trainer.max_steps
            with trusting(config.trust), _silent():
                from src.app.assemble import assemble

                OmegaConf.set_struct(config, False)
                config.pop("hydra")
                assemble(config, job.folder)
    except UserError as error:
        return steps, str(error)
    except Exception as error:
        return steps, explain(
            error, job.entry_point, list(job.overrides), job.entry_point
        ) or f"{type(error).__name__}: {error}"
    return steps, None


@contextmanager
def _silent() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
