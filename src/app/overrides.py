"""Overrides as texts: quoting, what a run stores of them, and the command line of a run that is continued."""

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path

import yaml

from src.app.messages import check_names
from src.app.options import CONF, OPTIONS, effect_of
from src.errors import UserError
from src.runs.files import write_atomically
from src.runs.folder import CHECKPOINTS, ENVIRONMENT_FILE, checkpoints_by_step, find_run, newest_run
from src.runs.machine import slurm_job

# Where Hydra keeps them; written by us, since Hydra would do so before anything is checked.
OVERRIDES_FILE = ".hydra/overrides.yaml"


def prepare(entry_point: str, arguments: list[str]) -> list[str]:
    """The command line that Hydra is given.

    Short forms are written out, a training that is continued gets the overrides of its run, and names are checked. In
    sampling and evaluation, `guidance.scale=4` alone means `guidance=classifier_free guidance.scale=4`.

    Args:
        entry_point: "train", "sample" or "evaluate".
        arguments: the command line without the program's name.

    Raises:
        UserError: there is no such run, its stored overrides are not harmless, or an override names nothing.
    """
    arguments = [part for argument in arguments for part in written_out(argument)]
    folders = trusted_folders(arguments)
    check_names(entry_point, arguments, [CONF, *folders])
    arguments = resume_overrides(arguments) if entry_point == "train" else with_guidance(arguments)
    if folders:
        places = ",".join(f"'file://{folder}'" for folder in folders)
        arguments = [*arguments, f"hydra.searchpath=[{places}]"]
    return arguments


def trusted_folders(arguments: list[str]) -> list[Path]:
    """The conf/ folders of the packages in `trust=[...]`, whose choices are added to those of this repository."""
    match = next(
        (re.fullmatch(r"trust=\[?([\w.,\s]*)\]?", a) for a in arguments if a.startswith("trust=")), None
    )
    folders = []
    for name in match[1].split(",") if match else ():
        try:
            spec = find_spec(name.strip())
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
    names = {_name(argument) for argument in arguments if "=" in argument}
    alone = "guidance" not in names and any(name.startswith("guidance.") for name in names)
    return ["guidance=classifier_free", *arguments] if alone else arguments


def quoted(path: Path) -> str:
    """A path as Hydra reads it on the command line, whatever characters are in it."""
    escaped = str(path.absolute()).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def unquoted(value: str) -> str:
    """What `quoted` was made of; a value that is not quoted is returned as it is."""
    if len(value) < 2 or value[0] != "'" or value[-1] != "'":
        return value
    return value[1:-1].replace("\\'", "'").replace("\\\\", "\\")


def in_override(path: Path) -> str:
    """A path as it can stand in an override: as it is where Hydra understands it so, else quoted."""
    return str(path) if re.fullmatch(r"[\w./+:-]+", str(path)) else quoted(path)


def lasting(overrides: list[str]) -> list[str]:
    """Those of a training's overrides that hold when it is continued: neither of one start only nor Hydra's own."""

    def lasts(override: str) -> bool:
        name = re.split(r"\W", override.lstrip("+~"), maxsplit=1)[0]
        return name != "hydra" and effect_of(name) != "once"

    return [override for override in overrides if lasts(override)]


def refuse_harmful(overrides: list[str], origin: Path) -> None:
    """Checks stored overrides, which may be untrusted, against what Hydra would do with them.

    Args:
        overrides: as read from a file.
        origin: that file.

    Raises:
        UserError: one addresses Hydra itself, which instantiates whatever its configuration names; or is a flag, or
            chooses a file outside conf/, which could do the same.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except (HydraException, TypeError, AttributeError):
            override = None
        if override is None or not _harmless(override.key_or_group, override.package, text.partition("=")[2]):
            raise UserError(
                f"{origin}: {str(text)[:100]!r} is not allowed in stored options, which may be untrusted: remove that"
                " line, and give it on the command line if you trust it"
            )


def _harmless(key: str, package: str | None, value: str) -> bool:
    if {"hydra", "trust"} & set(re.split(r"[^a-zA-Z0-9_]+", f"{key}.{package}")):
        return False
    # a choice of a group is the name of a file
    options = {option.name for option in OPTIONS["train"]}
    return "." in key or key in options or re.search(r"[./\\$]", value) is None


def _name(override: str) -> str:
    """The option or the group that an override sets."""
    return re.split(r"[@=]", override.lstrip("+~"), maxsplit=1)[0]


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
    """The overrides that a run was composed with, in today's words; empty if they are not known.

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
    return [part for override in lasting(stored) for part in written_out(override)]


def write_overrides(folder: Path, overrides: list[str]) -> None:
    """Keeps those overrides of a run that hold when it is continued."""
    file = folder / OVERRIDES_FILE
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, yaml.safe_dump(lasting(overrides)).encode())


def resume_overrides(arguments: list[str]) -> list[str]:
    """The command line of a continued run: the overrides of the run, then those given now.

    With `ckpt=` among the arguments, or in a SLURM job that was put back into the queue, the stored overrides of
    that run come first, its folder is used again, and `ckpt` becomes the checkpoint file. Otherwise the
    arguments as they are.

    Args:
        arguments: the command line without the program's name.

    Raises:
        UserError: there is no such run, or its stored overrides are not harmless.
    """
    given = {_name(a): unquoted(a.partition("=")[2]) for a in arguments if "=" in a}
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
        if override not in arguments and _name(override) not in given
    ]
    own = [argument for argument in arguments if not argument.startswith("ckpt=")]
    return [*kept, *own, f"ckpt={quoted(run.checkpoint)}", f"hydra.run.dir={quoted(run.folder)}"]
