"""Overrides as texts: short forms, quoting, and the command line of a run that is continued."""

import os
import re
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from typing_extensions import TypedDict

from src.app.messages import check_names
from src.app.options import CONF, effect_of
from src.errors import UserError
from src.runs.files import Damaged, read_json
from src.runs.folder import CHECKPOINTS, ENVIRONMENT_FILE, FoundRun, checkpoints_by_step, find_run, newest_run
from src.runs.machine import slurm_job


def prepare(entry_point: str, arguments: list[str]) -> tuple[str, list[str]]:
    """The name of the configuration that Hydra composes, and its command line.

    Short forms are written out, names are checked, and a training that is continued starts from the configuration of
    its run. In sampling and evaluation, `guidance.scale=4` alone means `guidance=classifier_free guidance.scale=4`.

    Args:
        entry_point: "train", "sample" or "evaluate".
        arguments: the command line without the program's name.

    Raises:
        UserError: there is no such run, its configuration is not allowed, or an override names nothing.
    """
    arguments = [part for argument in arguments for part in written_out(argument)]
    folders = trusted_folders(arguments)
    check_names(entry_point, arguments, [CONF, *folders])
    if entry_point != "train":
        arguments = with_guidance(arguments)
    elif (run := run_to_continue(arguments)) is not None:
        from src.app.build import trusting
        from src.app.stored import CONTINUED, continue_with

        own = [a for a in arguments if not a.startswith("ckpt=")]
        with trusting(trusted_packages(arguments)):
            moved = (_given(arguments, name) for name in ("conditioning.encoder.name", "codec.folder"))
            continue_with(run.checkpoint, own, *moved)
        entry_point = CONTINUED
        arguments = [*own, f"ckpt={quoted(run.checkpoint)}", f"hydra.run.dir={quoted(run.folder)}"]
    if folders:
        places = ",".join(f"'file://{folder}'" for folder in folders)
        arguments = [*arguments, f"hydra.searchpath=[{places}]"]
    return entry_point, arguments


def trusted_packages(arguments: list[str]) -> list[str]:
    """The names in `trust=[...]`."""
    match = next(
        (re.fullmatch(r"trust=\[?([\w.,\s]*)\]?", a) for a in arguments if a.startswith("trust=")), None
    )
    return [name.strip() for name in match[1].split(",") if name.strip()] if match else []


def trusted_folders(arguments: list[str]) -> list[Path]:
    """The conf/ folders of the packages in `trust=[...]`, whose choices are added to those of this repository."""
    folders = []
    for name in trusted_packages(arguments):
        try:
            spec = find_spec(name)
        except (ImportError, ValueError):
            continue  # `trusting` reports it
        if spec is not None:
            folders += [Path(place) / "conf" for place in spec.submodule_search_locations or ()]
    return [folder for folder in folders if folder.is_dir()]


def written_out(argument: str) -> list[str]:
    """An argument in Hydra's words: `metrics=[a,b]` as several choices, class_conditional as `conditioning`."""
    if match := re.fullmatch(r"metrics=\[(.*)\]", argument):
        names = [name.strip() for name in match[1].split(",") if name.strip()]
        if len(set(names)) < len(names) or "none" in names:
            raise UserError(f"{argument}: give different scores, without none, e.g. metrics=[fid,kid]")
        return ["metrics=none", *(f"+metrics@metrics.{name}={name}" for name in names)]
    if match := re.fullmatch(r"class_conditional=([\w,]+)", argument):
        words = {"true": "class", "false": "none"}
        values = match[1].lower().split(",")
        if set(values) <= set(words):
            return [f"conditioning={','.join(words[value] for value in values)}"]
    return [argument]


def with_guidance(arguments: list[str]) -> list[str]:
    """The command line of sampling or evaluation, with `guidance=classifier_free` if only its options are given.

    The group's default, null, is the run's own guidance and has no options.
    """
    names = {re.split(r"[@=]", a.lstrip("+~"), maxsplit=1)[0] for a in arguments if "=" in a}
    alone = "guidance" not in names and any(name.startswith("guidance.") for name in names)
    return ["guidance=classifier_free", *arguments] if alone else arguments


def quoted(path: Path) -> str:
    """A path as Hydra and OmegaConf read it on the command line, whatever characters are in it."""
    special = {"'": "\\'", "${": "\\${", "": ""}
    text = re.sub(r"(\\*)('|\$\{|$)", lambda m: m[1] * 2 + special[m[2]], str(path.absolute()))
    return f"'{text}'"


def in_override(path: Path) -> str:
    """A path as it can stand in an override: as it is where Hydra understands it so, else quoted."""
    return str(path) if re.fullmatch(r"[\w./+:-]+", str(path)) else quoted(path)


def _given(arguments: list[str], option: str) -> str | None:
    """The value of an option on the command line; None without one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    argument = next((a for a in reversed(arguments) if a.startswith(f"{option}=")), f"{option}=null")
    value = OverridesParser.create().parse_override(argument).value()
    return None if value is None else str(OmegaConf.create({"value": value}).value)


class Requeued(TypedDict):
    """What is read of a run's environment.json."""

    slurm_job: str | None
    arguments: list[str]


def requeued_run(runs: Path, arguments: list[str]) -> Path | None:
    """The run that this SLURM job trained before it was put back into the queue, sweeps included, if any.

    Args:
        runs: the folder of the run folders.
        arguments: what the training is started with: a job may hold several. The newest of equal ones is meant.
    """
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    records = [path for depth in ("*", "sweeps/*/*") for path in runs.glob(f"{depth}/{ENVIRONMENT_FILE}")]
    for path in sorted(records, key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(Damaged):
            record = read_json(path, Requeued)
            same = (record["slurm_job"], record["arguments"]) == (slurm_job(), own_arguments(arguments))
            if same and checkpoints_by_step(path.parent / CHECKPOINTS):
                return path.parent
    return None


def own_arguments(arguments: list[str]) -> list[str]:
    """A training's arguments, sorted, without those that differ between its starts."""
    return sorted(a for a in arguments if not re.match(r"(ckpt=|\W*hydra\b)", a))


def given_again(arguments: list[str]) -> list[str]:
    """Those arguments of a training that its run folder does not give: of one start, and added callbacks."""

    def again(argument: str) -> bool:
        name = re.match(r"[\w.]*", argument.lstrip("+~"))[0]
        added = argument.startswith("+callbacks.")
        return added or (
            effect_of(name) == "once" and name not in ("ckpt", "allow_changes", "runs", "logger")
        )

    return [argument for argument in arguments if again(argument)]


def run_to_continue(arguments: list[str]) -> FoundRun | None:
    """The run that `ckpt` names, or that a SLURM job put back into the queue continues; None for a new one.

    Args:
        arguments: the command line without the program's name.

    Raises:
        UserError: there is no such run, or it has no intact checkpoint.
    """
    runs, ckpt = Path(_given(arguments, "runs") or "runs"), _given(arguments, "ckpt")
    if ckpt is not None:
        return find_run(newest_run(runs) if ckpt == "last" else ckpt, option="ckpt")
    requeued = requeued_run(runs, arguments)
    return None if requeued is None else find_run(requeued, option="ckpt")
