"""One job: what Hydra, or a launcher in another process or on another machine, calls with a composed configuration."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from src.app.environment import redact
from src.app.messages import explain
from src.app.options import CONF, ENTRY_POINTS, check_options, nested
from src.app.options import OPTIONS as SINGLE_OPTIONS
from src.errors import UserError
from src.runs.files import write_json
from src.runs.output import lost_log

# Names the file to which a job of a sweep writes its scores.
SCORES_TO = "DIFFUSION_LAB_SCORES_TO"

log = logging.getLogger(__name__)


def register() -> None:
    """What a configuration of conf/ needs in the process that composes or resolves it: options and resolvers."""
    from hydra.core.config_store import ConfigStore

    from src.app import environment
    from src.app.sweep import jobs

    for entry_point in ENTRY_POINTS:
        ConfigStore.instance().store(f"{entry_point}_options", nested(SINGLE_OPTIONS[entry_point]))
    environment.register()
    jobs.register()


def run_single(entry_point: str, arguments: Sequence[str]) -> dict[str, float]:
    """Composes a configuration and runs one job in this process.

    Args:
        entry_point: "train", "sample" or "evaluate".
        arguments: the command line without the program's name.

    Returns:
        The scores by name.

    Raises:
        UserError: a mistake in the arguments.
    """
    from src.app.overrides import prepare

    scores_to = os.environ.pop(SCORES_TO, None)  # not for further processes
    name, sys.argv[1:] = prepare(entry_point, list(arguments))
    with explained(entry_point, sys.argv[1:], name):
        scores = run_hydra(name)
    if scores_to:
        write_json(Path(scores_to), scores)
    return scores


@contextmanager
def explained(entry_point: str, arguments: Sequence[str], name: str | None = None) -> Iterator[None]:
    """Within it, errors of Hydra, OmegaConf and the file system become a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        line = explain(error, entry_point, list(arguments), name or entry_point)
        if line is None:
            raise
        raise UserError(line) from None


def run_hydra(name: str) -> dict[str, float]:
    """Composes the configuration of this name from sys.argv and runs the job.

    Returns:
        The scores by name.

    Raises:
        Exception: what the job raised.
    """
    import hydra

    register()
    failures: list[Exception] = []
    scores: dict[str, float] = {}

    def once(config: Any) -> None:
        # raised below: Hydra would print a line of its own first
        try:
            scores.update(job(config))
        except Exception as error:
            failures.append(error)

    main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
    main(once)()
    if failures:
        raise failures[0]
    return scores


def job(config: Any) -> dict[str, float]:
    """Runs the entry point that the configuration is of, in this process.

    Args:
        config: conf/<entry point>.yaml, composed; Hydra's settings are in place.

    Returns:
        The scores by name.
    """
    from hydra.core.hydra_config import HydraConfig

    from src.app.build import trusting
    from src.app.overrides import quoted

    register()  # a launcher may have started this process anew
    settings = HydraConfig.get()
    entry_point = settings.job.name
    folder = Path(settings.runtime.output_dir)
    # what a further process of this very job is started with
    arguments = [*settings.overrides.task, f"hydra.run.dir={quoted(folder)}", "hydra.output_subdir=null"]
    with _arguments(arguments), _own_log():
        check_options(entry_point, config)
        with trusting(config.trust):
            return getattr(import_module(f"src.app.{entry_point}"), entry_point)(config)


@contextmanager
def _arguments(arguments: list[str]) -> Iterator[None]:
    """Within it, sys.argv holds these."""
    before = sys.argv[1:]
    sys.argv[1:] = arguments
    try:
        yield
    finally:
        sys.argv[1:] = before


@contextmanager
def _own_log() -> Iterator[None]:
    """Within it, no log line shows a value from the environment, only the first process logs more than warnings, and a
    log that cannot be written is reported once."""
    root = logging.getLogger()
    level = root.level
    for handler in root.handlers:
        handler.addFilter(redact)
        handler.handleError = lost_log
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.setLevel(level)
