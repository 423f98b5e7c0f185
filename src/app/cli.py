"""What the doors share: composing with Hydra, one-line errors, `--help`, the exit status.

Nothing heavy is imported here: `--help` and a mistyped option answer at once.
"""

import difflib
import inspect
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from src.app.overrides import quoted
from src.errors import UserError

CONF = Path(__file__).parents[2] / "conf"
JOB_FAILED = 1
USER_ERROR = 2
OUTCOME_FILE = "outcome.json"


def run(
    config_name: str,
    task: Callable[[Any], dict[str, float]],
    rewrite: Callable[[list[str]], list[str]] = list,
) -> None:
    """Composes conf/<config_name>.yaml with the command line's overrides and runs the task on it.

    Exits with status 0, or 2 after a mistake of the user's, told in one line. In a sweep each job's outcome
    is written to its folder, a failing job does not take the others along, and a table closes the sweep; the
    status is then 1 if a job has failed. Ctrl-C leaves with 130 and without a word, unless the task sees to it.

    Args:
        config_name: also the module's name, src.<config_name>.
        task: composed configuration -> scores by name.
        rewrite: what to make of the command line's arguments before Hydra reads them.
    """
    # wherever it stands: Hydra's parser takes flags only before all overrides or after them
    arguments = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    if any(argument in ("--help", "-h") for argument in arguments):
        print(help_text(config_name))
        return
    # With it, Hydra leaves exceptions to us instead of printing its own lines and exiting with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:
        # not KeyboardInterrupt: Lightning takes that for a failure, and its status would be 1
        signal.signal(signal.SIGINT, _leave)
    try:
        sys.argv[1:] = rewrite(arguments)
        failed = _run_hydra(config_name, task)
    except UserError as error:
        sys.exit(_complain(str(error)))
    except Exception as error:
        line = hydra_error(error, config_name)
        if line is None:
            raise
        sys.exit(_complain(line))
    finally:
        signal.signal(signal.SIGINT, interrupt)
    if failed:
        sys.exit(JOB_FAILED)


def _leave(signum: int, frame: Any) -> None:
    sys.exit(128 + signum)


def _complain(line: str) -> int:
    from src.app.build import redacted

    print(f"error: {redacted(line)}", file=sys.stderr)
    return USER_ERROR


class _Redacting(logging.Formatter):
    """Another formatter's lines, without the values that came from the environment."""

    def __init__(self, plain: logging.Formatter | None):
        super().__init__()
        self.plain = plain or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        from src.app.build import redacted

        return redacted(self.plain.format(record))


def _run_hydra(config_name: str, task: Callable[[Any], dict[str, float]]) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from src.app.build import redacted
    from src.app.sweep import SweepTable, register_resolvers

    register_resolvers()
    raised: list[Exception] = []

    def job(config: Any) -> float | None:
        settings = HydraConfig.get()
        folder = Path(settings.runtime.output_dir)
        sweeping = settings.mode == RunMode.MULTIRUN
        overrides = list(settings.overrides.task)
        outcome: dict[str, Any] = {"overrides": overrides}
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_Redacting(handler.formatter))
        # what a further process of this very job is started with
        sys.argv[1:] = [*overrides, f"hydra.run.dir={quoted(folder)}", "hydra.output_subdir=null"]
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            logging.getLogger().setLevel(logging.WARNING)
        try:
            outcome["scores"] = task(config)
        except Exception as error:
            if not sweeping:
                raised.append(error)  # raised again below: Hydra would print a line of its own first
                return None
            known = isinstance(error, UserError)
            outcome["error"] = redacted(str(error)) or type(error).__name__
            logging.getLogger(__name__).error("job failed: %s", outcome["error"], exc_info=not known)
        if sweeping:
            (folder / OUTCOME_FILE).write_text(json.dumps(outcome, indent=2))
        return next(iter((outcome.get("scores") or {}).values()), None)

    hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
    if raised:
        raise raised[0]
    return SweepTable.failed


def hydra_error(error: Exception, config_name: str) -> str | None:
    """One line for what Hydra, OmegaConf or the file system say; None if it is no such error."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(error, HydraException | OmegaConfBaseException):
        # a folder that cannot be made, a full disk: not our bug either
        return f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else None
    text = f"{error} {error.__cause__ or ''}"
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice}: no such choice; choose from {', '.join(error.options)}"
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"full_key: (\S+)", text)
    if unknown:
        key = unknown[1]
        defaults, _ = _defaults_and_options((CONF / f"{config_name}.yaml").read_text().splitlines())
        groups = list(defaults)
        if "No match in the defaults list" in text:
            return (
                f"{key}: no such group{_nearest(key, groups)}; python -m src.{config_name} --help lists them"
            )
        if told := _missing_in_choice(key, config_name):
            return told
        keys = _all_keys()
        if key in keys and key.partition(".")[0] in groups:
            return f"{key}: not every choice has this option, and one that is chosen has not"
        nearest = "" if "." in key else _nearest(key, groups)
        if key not in keys:  # of another door
            nearest = nearest or _nearest(key, keys)
        return f"{key}: no such option{nearest}; python -m src.{config_name} --help lists the groups"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: not understood; quote texts with spaces, commas or brackets: 'key=\"a, b\"'"
        )
    ambiguous = re.search(r"Ambiguous value for argument '([^=]+)=(.*)'\n", text)
    if ambiguous:
        key, value = ambiguous.groups()
        return (
            f"{key}={value}: several values for one; a text with commas is typed '{key}=\"{value}\"', with both kinds"
            " of quotes, and a sweep needs -m"
        )
    first = str(error).strip().splitlines()[0]
    return f"{first} (python -m src.{config_name} --help)"


def _missing_in_choice(key: str, config_name: str) -> str | None:
    """What a group's option is told by that the choice has not; None if the choice is not to be found."""
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from hydra.utils import get_class
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    group, _, name = key.rpartition(".")
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    try:
        parsed = OverridesParser.create().parse_overrides(arguments)
        others = [override.input_line for override in parsed if override.key_or_group != key]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(config_name, others, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException):  # another mistake besides, or a sweep over the choice
        return None
    choice = config.hydra.runtime.choices.get(group)
    if choice is None:
        return None
    node = OmegaConf.select(config, group)
    if "_target_" in (node or ()) and name in inspect.signature(get_class(node["_target_"])).parameters:
        return f"{key}: the file of {group}={choice} leaves this option out: say +{key}=..."
    has = [option for option in node or () if not option.startswith("_")]
    if not has:
        return f"{key}: {group}={choice} has no options"
    return f"{key}: {group}={choice} has no {name}{_nearest(name, has, f'{group}.')}; it has {', '.join(has)}"


def _nearest(name: str, names: list[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {prefix}{matches[0]}?)" if matches else ""


def _all_keys() -> list[str]:
    """Dotted names of all options in conf/."""
    from omegaconf import DictConfig, OmegaConf

    def names(node: DictConfig, prefix: str) -> list[str]:
        found = []
        for key in node:
            found.append(f"{prefix}{key}")
            child = node._get_node(key)
            if isinstance(child, DictConfig):
                found += names(child, f"{prefix}{key}.")
        return found

    keys = []
    for path in CONF.rglob("*.yaml"):
        group = path.parent.relative_to(CONF).as_posix()
        config = OmegaConf.load(path)
        if isinstance(config, DictConfig):
            keys += names(config, "" if group == "." else f"{group.replace('/', '.')}.")
    return keys


def help_text(config_name: str) -> str:
    """The door's options in plain words, taken from the comments in conf/, so never out of date."""
    lines = (CONF / f"{config_name}.yaml").read_text().splitlines()
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line.lstrip("# "))
    text = [*head, ""]
    defaults, options = _defaults_and_options(lines)
    for group, (chosen, comment) in defaults.items():
        text.append(f"{group}={chosen}   {comment}")
        for path in sorted((CONF / group).glob("*.yaml")):
            comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
            first = next(line.lstrip("# ") for line in comments if "@package" not in line)
            text.append(f"    {path.stem:<26} {first}")
    text += ["", "Single options, with their defaults:"]
    text += [f"    {option:<34}{comment}" for option, comment in options]
    text += [
        "",
        "Choose with group=choice, set numbers with group.option=value, sweep with -m and commas:",
        f"    python -m src.{config_name} --cfg job              shows the composed configuration",
        f"    python -m src.{config_name} --hydra-help           shows Hydra's own flags",
    ]
    return "\n".join(text)


def _defaults_and_options(lines: list[str]) -> tuple[dict[str, tuple[str, str]], list[tuple[str, str]]]:
    defaults, options = {}, []
    for line in lines:
        body, _, comment = line.partition("#")
        if match := re.fullmatch(r"  - (?:override )?/?(\w+)(?:@\S+)?: (\S+)\s*", body):
            defaults[match[1]] = (match[2], comment.strip())
        elif (match := re.fullmatch(r"(\w+): (.+?)\s*", body)) and comment:
            options.append((f"{match[1]}={match[2]}", comment.strip()))
    return defaults, options
