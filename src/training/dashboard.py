"""Loggers whose failures do not stop a training: CSV curves, and Weights & Biases without prompts and long waits."""

import csv
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.logger import _add_prefix
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import TypedDict

from src.errors import UserError
from src.evaluation.record import Record
from src.report.page import report_of_run
from src.report.protocol import interval_of
from src.report.run import flat, read_yaml
from src.runs.files import Damaged, read_json, replacing
from src.runs.folder import CONFIG_FILE
from src.runs.output import tolerated

log = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id"
PATIENCE = 8.0
"""Timeout in seconds for a server that does not respond, at the start and at the end."""
LONGEST_NAME, LONGEST_TAG = 128, 64
"""Characters that wandb allows."""


class CurveFiles(CSVLogger):
    """The curves as CSV files. Each row is flushed immediately, so that a killed process loses none."""

    def __init__(self, folder: Path):
        super().__init__(folder, name="csv", flush_logs_every_n_steps=1)

    def save(self) -> None:
        with tolerated("csv"):  # the rows stay in memory until the next save
            super().save()


def forgiving(logger: Logger, name: str) -> Logger:
    """A logger whose methods do not raise: a failure is reported once and counted (`tolerated`)."""

    def shielded(method: Callable[..., Any]) -> Callable[..., None]:
        @wraps(method)
        def call(*arguments: Any, **named: Any) -> None:
            with tolerated(f"logger {name}"):
                method(*arguments, **named)

        return call

    for method in ("log_metrics", "log_hyperparams", "save", "finalize"):
        setattr(logger, method, shielded(getattr(logger, method)))
    return logger


def cut_curves(folder: Path, step: int) -> None:
    """Removes the points after a step from the CSV files of earlier starts; a cut file is kept as *.set_aside.

    Args:
        folder: the run folder.
        step: from which the training continues: later points are logged again.
    """
    for path in folder.glob("csv/version_*/metrics.csv"):
        with tolerated("curves"), suppress(ValueError, csv.Error):
            header, *rows = csv.reader(path.read_text().splitlines())
            place = header.index("step")
            kept = [row for row in rows if len(row) == len(header) and int(row[place]) <= step]
            if len(kept) < len(rows):
                path.rename(path.with_name(f"{path.name}.set_aside"))
                with replacing(path) as file:
                    file.write("".join(f"{','.join(row)}\n" for row in [header, *kept]).encode())


class Dashboard(WandbLogger):
    """Lightning's logger for Weights & Biases; its first failure is logged, later ones are ignored.

    If the server cannot be reached at the start, the run is logged offline. If wandb's service process dies, only the
    CSV files continue. The run's id is stored in the run folder, so that a resumed run continues its curves.
    """

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self._lost = False

    @property
    def experiment(self) -> Any:
        if self._lost:
            return DummyExperiment()
        self._keep_id()
        try:
            return super().experiment
        except Exception as error:
            log.warning("wandb       offline (%s); later: wandb sync %s", _first_line(error), self.save_dir)
        _forget_service()  # otherwise it would report that the run's id is in use
        self._wandb_init |= {"mode": "offline", "resume": None}
        try:
            return super().experiment
        except Exception as error:
            self._lose(error)
            return DummyExperiment()

    @rank_zero_only
    def _keep_id(self) -> None:
        file = Path(self.save_dir) / RUN_ID_FILE
        if self.version and not file.is_file():
            with tolerated("the run's id for wandb"):
                file.write_text(self.version)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        self._try(super().log_hyperparams, params)

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._try(self._log, metrics, step)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self._try(super().log_image, key, images, step, **kwargs)

    @rank_zero_only
    def publish(self, record: Record, folder: Path) -> None:
        """Adds what stays of a training: the record's protocol to the run's summary, the table of its scores, and
        online the report of the run as an artifact.

        Args:
            record: the last scores.
            folder: the run folder.
        """
        self._try(self._publish, record, folder)

    def _publish(self, record: Record, folder: Path) -> None:
        import wandb

        run, recipe = self.experiment, record.protocol.get("recipe", {})
        run.summary.update({"protocol": record.protocol})
        rows = [
            [
                name,
                value,
                *interval_of(record, name),
                recipe.get("training_steps"),
                recipe.get("network_evaluations"),
            ]
            for name, value in record.scores.items()
        ]
        columns = ["score", "value", "low", "high", "training_steps", "network_evaluations"]
        self._log({"scores": wandb.Table(columns=columns, data=rows)}, recipe.get("training_steps"))
        if self._wandb_init.get("mode") == "online":
            artifact = wandb.Artifact(f"report-{run.id}", type="report")
            artifact.add_file(str(report_of_run(folder, record)), name="report.html")
            run.log_artifact(artifact)

    def _log(self, metrics: dict[str, Any], step: int | None) -> None:
        run, row = self.experiment, _add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR)
        if step is None or self._wandb_init.get("sync_tensorboard"):
            run.log(dict(row))
            return
        # wandb drops rows of earlier steps than its own; a run that continues from one appends them
        own = step if isinstance(run.step, int) and step >= run.step else None
        run.log({**row, "trainer/global_step": step}, step=own, commit=True)

    def _try(self, action: Callable[..., None], *arguments: Any, **named: Any) -> None:
        if self._lost:
            return
        try:
            action(*arguments, **named)
        except Exception as error:  # any exception: it must not stop the training
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        self._lost = True
        log.warning("wandb       lost (%s); the curves continue in csv/", _first_line(error))


@contextmanager
def needs_package(option: str) -> Iterator[None]:
    """Converts an ImportError of the block into a UserError.

    Raises:
        UserError: an import in the block failed.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(f"{option}: {_first_line(error)}; install it, or choose logger=csv") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _forget_service() -> None:
    """Stops wandb's service process, whatever its state; the next run starts a new one."""
    with suppress(Exception):
        sys.modules["wandb"].teardown()


def finish_dashboards() -> None:
    """Finishes the wandb run, so that the next job of a sweep starts a new one."""
    if "wandb" not in sys.modules:
        return
    try:
        sys.modules["wandb"].finish()
    except Exception as error:
        log.warning("wandb       not finished (%s)", _first_line(error))
        _forget_service()


def wandb_settings(folder: Path, name: str | None) -> dict[str, Any]:
    """Arguments of `Dashboard` for a run folder.

    The mode is WANDB_MODE if it is set, otherwise online if an API key is configured, otherwise offline.

    Args:
        folder: the run folder; the jobs of a sweep are grouped by the parent folder.
        name: name in the dashboard; by default the folder's name.

    Raises:
        UserError: wandb is not installed.
    """
    # at exit, its error reporting waits longer than finish_timeout for a server that does not respond
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    with needs_package("logger=wandb"):
        import wandb

    id_file = folder / RUN_ID_FILE
    stored = id_file.read_bytes()[:64].strip() if id_file.is_file() else b""
    run_id = stored.decode() if stored.isalnum() else secrets.token_hex(4)  # part of the names of files
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    if mode == "offline":
        log.info("wandb       offline (no key); later: wandb sync %s/wandb/offline-run-*", folder)
    in_sweep = folder.parent.parent.name == "sweeps"
    varied = varied_options(folder) if in_sweep else []
    return {
        "id": run_id,
        "name": " ".join([*([name] if name else []), *varied])[:LONGEST_NAME] or folder.name,
        "group": folder.parent.name if in_sweep else None,
        "job_type": "train",
        "tags": [option[:LONGEST_TAG] for option in varied],
        "mode": mode,
        "resume": "allow" if mode == "online" else None,
        "settings": wandb.Settings(
            silent=True,
            console="off",
            init_timeout=PATIENCE,
            finish_timeout=PATIENCE,
            x_transaction_log_flush_interval=1.0,  # by default a killed run loses 15 seconds
        ),
    }


class Member(TypedDict):
    """What is read of a job in the file of a sweep."""

    folder: str
    varied: list[str]


class Members(TypedDict):
    """What is read of the file of a sweep."""

    jobs: list[Member]


def varied_options(folder: Path) -> list[str]:
    """The options of a job that differ between the jobs of its sweep, e.g. ["schedule=cosine", "seed=1"]."""
    with suppress(FileNotFoundError, Damaged):
        jobs = read_json(folder.parent / "jobs.json", Members)["jobs"]
        return next((job["varied"] for job in jobs if job["folder"] == folder.name), [])
    return []


def publish_sweep(page: Path, sweep: Path) -> bool:
    """Uploads the report of a sweep as an artifact of a run in the sweep's group, if its jobs were logged online.

    Args:
        page: the report.
        sweep: the folder of the sweep.

    Returns:
        Whether it was uploaded.
    """
    online = sorted(sweep.glob("*/wandb/run-*"))
    if not online:
        return False
    import wandb

    settings = wandb.Settings(silent=True, console="off", init_timeout=PATIENCE, finish_timeout=PATIENCE)
    options = flat(read_yaml(online[0].parents[1] / CONFIG_FILE))
    project = options.get("logger.wandb.project")
    run = wandb.init(
        project=project,
        group=sweep.name,
        job_type="report",
        name=f"report {sweep.name}",
        dir=sweep,
        settings=settings,
    )
    artifact = wandb.Artifact(f"report-{sweep.name}", type="report")
    artifact.add_file(str(page), name="report.html")
    run.log_artifact(artifact)
    run.finish()
    return True


def _has_key() -> bool:
    """Whether the environment or ~/.netrc has an API key (`wandb.login(prompt=False)` would contact the server)."""
    import wandb
    from requests.utils import get_netrc_auth

    return bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(wandb.Settings().base_url))
