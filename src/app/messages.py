"""One line for what is wrong with a command line."""

import difflib
import errno
import inspect
import re
from pathlib import Path
from typing import Any

from src.app.options import CONF, ENTRY_POINTS, OPTIONS, groups_of
from src.errors import UserError

# Groups and nodes to which any name can be added.
OPEN = ("callbacks", "logger", "wrappers")
# Options of the network that the framework sets.
FOLLOWING = (
    "model.channels",
    "model.image_size",
    "model.num_classes",
    "model.token_channels",
    "model.condition_channels",
)


def check_names(entry_point: str, arguments: list[str], places: list[Path]) -> None:
    """Refuses overrides of what the entry point does not have, also those with a plus, which Hydra would accept.

    Args:
        entry_point: "train", "sample" or "evaluate".
        arguments: the command line.
        places: folders with groups and choices.

    Raises:
        UserError: an override cannot be read, or names a group, a choice or an option that does not exist.
    """
    groups = groups_of(entry_point)
    own = {option.name.partition(".")[0] for option in OPTIONS[entry_point]}
    for override in parsed(arguments):
        key = override.key_or_group
        root = key.partition(".")[0]
        if root in ("hydra", *OPEN) or key.startswith("hydra/"):
            continue
        if key == "runs" and override.value() is None:
            raise UserError("runs=null: give a folder, e.g. runs=runs")
        if (CONF / key).is_dir():
            _check_choices(override, key, groups, entry_point, places)
        elif root not in groups and root not in own:
            nearest = _nearest(key, [*groups, *own])
            elsewhere = [
                e for e in ENTRY_POINTS if root in groups_of(e) or root in {o.name for o in OPTIONS[e]}
            ]
            where = f"; it is an option of src.{elsewhere[0]}" if elsewhere and not nearest else ""
            raise UserError(f"{key}: no such option{nearest}{where}; {_help(entry_point)} lists them")
        elif (
            root in own and key not in {option.name for option in OPTIONS[entry_point]} and root not in groups
        ):
            known = [option.name for option in OPTIONS[entry_point] if option.name.startswith(f"{root}.")]
            raise UserError(f"{key}: no such option; there is {', '.join(known) or root}")


def parsed(arguments: list[str]) -> list[Any]:
    """The overrides among the arguments, without Hydra's flags, parsed.

    Raises:
        UserError: one is not understood.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, parsed, flag = OverridesParser.create(), [], ""
    for argument in arguments:
        if argument.startswith("-") or flag in (
            "-cp",
            "-cn",
            "-cd",
            "--config-path",
            "--config-name",
            "--config-dir",
        ):
            flag = argument
            continue
        if flag in ("--cfg", "-c", "--package", "-p", "--info", "-i"):
            flag = ""
            if "=" not in argument:
                continue
        try:
            parsed.append(parser.parse_override(argument))
        except (HydraException, TypeError, AttributeError):
            raise UserError(
                f"{argument}: not understood; quote texts with spaces, commas or brackets: 'key=\"a, b\"'"
            ) from None
    return parsed


def _check_choices(
    override: Any, group: str, groups: dict[str, Any], entry_point: str, places: list[Path]
) -> None:
    if group not in groups and override.package is None and "/" not in group:
        raise UserError(
            f"{group}: no such group{_nearest(group, list(groups))}; {_help(entry_point)} lists them"
        )
    choices = sorted(path.stem for place in places for path in (place / group).glob("*.yaml"))
    if override.value() is None and not override.is_delete():
        raise UserError(f"{group}=null: choose from {', '.join(choices)}")
    values = override.value() if override.is_sweep_override() else [override.value()]
    if not isinstance(values, list):
        values = list(getattr(values, "list", []))
    for value in values:
        if isinstance(value, str) and "$" not in value and value not in choices:
            raise UserError(f"{group}={value}: no such choice; choose from {', '.join(choices)}")


# Errors of the file system that are not a bug of this project.
REFUSED = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
}


def explain(error: Exception, entry_point: str, arguments: list[str], config_name: str) -> str | None:
    """One line for what Hydra, OmegaConf or the file system report; None if it is no such error."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(error, HydraException | OmegaConfBaseException):
        if getattr(error, "filename", None):  # a folder that cannot be made
            return f"{error.filename}: {error.strerror}"
        return (
            f"{error.strerror}; choose another disk with runs=..."
            if getattr(error, "errno", None) in REFUSED
            else None
        )
    missing = getattr(error, "missing_cfg_file", None)
    if missing:
        group, _, choice = missing.rpartition("/")
        choices = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        advice = "choices of your own package need trust=[mypackage]"
        if group == "metrics":
            advice = f"by default the score is named as the data; choose metrics=none, or {advice}"
        return f"{group}={choice}: no such choice; choose from {choices}; {advice}"
    try:
        found = _wrong_option(entry_point, arguments, config_name)
    except UserError as another:
        found = str(another)
    return found or f"{str(error).strip().splitlines()[0]} ({_help(entry_point)})"


def _wrong_option(entry_point: str, arguments: list[str], config_name: str) -> str | None:
    """The first override that does not fit the configuration without it."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    overrides = parsed(arguments)
    sweeping = any(argument in ("-m", "--multirun") for argument in arguments)
    for override in overrides:
        if override.is_sweep_override() and not sweeping:
            value = override.input_line.partition("=")[2]
            return (
                f"{override.key_or_group}={value}: several values for one; a text with commas is typed"
                f" '{override.key_or_group}=\"{value}\"', with both kinds of quotes, and a sweep needs -m"
            )
    for choices in _variants([o for o in overrides if (CONF / o.key_or_group).is_dir()]):
        try:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                config = compose(config_name, choices, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException):
            return None
        for override in overrides:
            key = override.key_or_group
            if (CONF / key).is_dir() or key.startswith("hydra.") or override.is_force_add():
                continue
            parent, _, name = key.rpartition(".")
            node = OmegaConf.select(config, parent) if parent else config
            if node is None and parent in groups_of(entry_point):
                return _without_choice(key)
            if override.is_add():
                if isinstance(node, DictConfig) and name in node.keys():  # noqa: SIM118
                    return f"{key}: this option exists; type it without the plus"
                continue
            if isinstance(node, DictConfig) and name not in node.keys():  # noqa: SIM118 - `in` misses ???
                line = _missing(key, node, config.hydra.runtime.choices.get(parent), entry_point)
                swept = any(o.key_or_group == parent and o.is_sweep_override() for o in overrides)
                return f"{line}; not every choice of the sweep has this option" if swept else line
    return None


def _variants(groups: list[Any]) -> list[list[str]]:
    """The group choices of the command line, one list for each value of a sweep over a group."""
    fixed = [override.input_line for override in groups if not override.is_sweep_override()]
    swept = [
        f"{override.key_or_group}={value}"
        for override in groups
        if override.is_sweep_override()
        for value in getattr(override.value(), "list", [])
    ]
    return [[*fixed, choice] for choice in swept] or [fixed]


def _without_choice(key: str) -> str:
    """What to say of an option of a group that is null by default: the choices that have it."""
    group, _, name = key.partition(".")
    having = [
        path.stem
        for path in sorted((CONF / group).glob("*.yaml"))
        if re.search(rf"^{re.escape(name)}:", path.read_text(), re.MULTILINE)
    ]
    owner = "task" if group == "restoration" else "run"
    choice = f"{group}={' or '.join(having) or '...'}"
    return f"{key}: choose {choice} too; without it, {group} and its options are the {owner}'s own"


def _missing(key: str, node: Any, choice: str | None, entry_point: str) -> str:
    """What to say of an option that a node does not have."""
    from hydra.utils import get_class

    group, _, name = key.rpartition(".")
    if key in FOLLOWING:
        return f"{key}: it follows the data and the conditioning; leave it out"
    if choice is None:
        return f"{key}: no such option{_nearest(name, list(map(str, node)))}; {_help(entry_point)} lists them"
    target = node.get("_target_")
    if target and name in inspect.signature(get_class(target)).parameters:
        return f"{key}: the file of {group}={choice} leaves this option out: type +{key}=..."
    has = [option for option in node if not option.startswith("_")]
    if not has:
        return f"{key}: {group}={choice} has no options"
    return f"{key}: {group}={choice} has no {name}{_nearest(name, has, f'{group}.')}; it has {', '.join(has)}"


def _help(entry_point: str) -> str:
    return f"python -m src.{entry_point} --help"


def _nearest(name: str, names: list[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {prefix}{matches[0]}?)" if matches else ""
