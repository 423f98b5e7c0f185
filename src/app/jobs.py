"""One job: what Hydra, or a launcher in another process or on another machine, calls with a composed configuration."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from src.app.environment import redacted
from src.app.options import CONF, ENTRY_POINTS, check_options, nested
from src.app.options import OPTIONS as SINGLE_OPTIONS
from src.app.sweep import OUTCOME_FILE
from src.errors import UserError
from src.runs.files import write_json

log = logging.getLogger(__name__)


def register() -> None:
    """What a configuration of conf/ needs in the process that composes or resolves it: options and resolvers."""
    from hydra.core.config_store import ConfigStore

    from src.app import environment, sweep

    for entry_point in ENTRY_POINTS:
        ConfigStore.instance().store(f"{entry_point}_options", nested(SINGLE_OPTIONS[entry_point]))
    environment.register()
    sweep.register()


def run_hydra(name: str) -> int:
    """Composes the configuration of this name with sys.argv and runs the job, or the jobs of a sweep.

    Returns:
        How many jobs of a sweep have failed.

    Raises:
        Exception: what a single job raised.
    """
    import hydra

    register()
    failures: list[Exception] = []

    def once(config: Any) -> float | None:
        # raised below: Hydra would print a line of its own first
        try:
            return job(config)
        except Exception as error:
            failures.append(error)
            return None

    sweeping = any(argument in ("-m", "--multirun") for argument in sys.argv[1:])
    main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
    if sweeping:
        from src.app.sweep import reported

        with reported() as sweep:
            main(sweep_job)()
        return sweep.failed
    main(once)()
    if failures:
        raise failures[0]
    return 0


def job(config: Any) -> float | None:
    """Runs the entry point that the configuration is of, in this process.

    Args:
        config: conf/<entry point>.yaml, composed; Hydra's settings are in place.

    Returns:
        The first score, or None.
    """
    return next(iter(_run(config).values()), None)


def sweep_job(config: Any) -> float | None:
    """One job of a sweep: its outcome is written to its folder, and a failure is logged, not raised."""
    from hydra.core.hydra_config import HydraConfig

    register()  # a launcher may have started this process anew
    settings = HydraConfig.get()
    outcome: dict[str, Any] = {"overrides": list(settings.overrides.task)}
    try:
        outcome["scores"] = _run(config)
    except Exception as error:
        outcome["error"] = redacted(str(error)) or type(error).__name__
        log.error("job failed: %s", outcome["error"], exc_info=not isinstance(error, UserError))
    write_json(Path(settings.runtime.output_dir) / OUTCOME_FILE, outcome)
    return next(iter((outcome.get("scores") or {}).values()), None)


def _run(config: Any) -> dict[str, float]:
    from hydra.core.hydra_config import HydraConfig

    from src.app.build import trusting
    from src.app.overrides import quoted

    register()  # a launcher may have started this process anew
    settings = HydraConfig.get()
    entry_point = settings.job.name
    folder = Path(settings.runtime.output_dir)
    # what a further process of this very job is started with
    arguments = [*settings.overrides.task, f"hydra.run.dir={quoted(folder)}", "hydra.output_subdir=null"]
    with _arguments(arguments), _redacted_log():
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
def _redacted_log() -> Iterator[None]:
    """Within it, no log line shows a value from the environment, and only the first process logs more than warnings."""
    root = logging.getLogger()
    level, formatters = root.level, {handler: handler.formatter for handler in root.handlers}
    for handler, formatter in formatters.items():
        handler.setFormatter(Redacting(formatter))
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.setLevel(level)
        for handler, formatter in formatters.items():
            handler.setFormatter(formatter)


class Redacting(logging.Formatter):
    """Another formatter's lines, without the values that came from the environment."""

    def __init__(self, plain: logging.Formatter | None):
        super().__init__()
        self.plain = plain or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return redacted(self.plain.format(record))
