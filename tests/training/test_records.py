"""Checkpoint records, loggers and processes if something is missing."""

import json
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.utilities import rank_zero_only

from src.app.options import effect_of
from src.errors import UserError
from src.evaluation.record import Record
from src.runs.files import sidecar_path
from src.runs.machine import installed, is_first_process
from src.training.checkpoint import AtomicCheckpointIO
from src.training.dashboard import RUN_ID_FILE, Dashboard, needs_package, publish_sweep, wandb_settings
from src.training.distributed import launch_by_command_line
from src.training.resume import ResumeCheck
from tests.report.simulated import protocol, write_run


def _record(folder, **content):
    path = folder / "step_00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1, **content}, path)
    return json.loads(sidecar_path(path).read_text())


def test_a_checkpoint_without_our_data_module_and_check(tmp_path):
    record = _record(tmp_path, state_dict={"w": torch.ones(2)})
    assert (record["step"], record["samples"], record["data"], record["world_size"]) == (1, None, None, 1)


def test_only_weights_averages_and_moments_must_be_finite(tmp_path):
    infinite = torch.tensor(float("inf"))
    states = {"EarlyStopping{}": {"best_score": infinite}, "EMA": {"weights": {"w": torch.ones(2)}}}
    assert _record(tmp_path, callbacks=states, loops={"x": infinite})
    for broken in (
        {"state_dict": {"w": infinite}},
        {"optimizer_states": [{"state": {0: {"exp_avg": infinite}}}]},
        {"callbacks": {"EMA": {"weights": {}, "others": [{"w": infinite}]}}},
    ):
        io, path = AtomicCheckpointIO(), tmp_path / "broken.ckpt"
        io.save_checkpoint({"global_step": 1, **broken}, path)
        assert io.failures == 1
        assert not path.exists()


def test_data_without_a_source_has_no_fingerprint():
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(),
        world_size=1,
        accumulate_grad_batches=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    check, checkpoint = ResumeCheck({}, None, False, effect_of), {}
    check.setup(trainer, torch.nn.Linear(1, 1), "fit")
    check.on_save_checkpoint(trainer, None, checkpoint)
    assert checkpoint["origin"]["data"] is None


def test_missing_wandb_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^logger=wandb: .*install it, or choose logger=csv$") as caught:
        wandb_settings(tmp_path, None)
    assert "\n" not in str(caught.value)
    with (
        pytest.raises(UserError, match=r"^logger\.tensorboard: Neither"),
        needs_package("logger.tensorboard"),
    ):
        raise ModuleNotFoundError("Neither `tensorboard` nor\n`tensorboardX` is available")


def test_wandb_settings_write_no_files(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = wandb_settings(tmp_path / "run", None)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RUN_ID_FILE).write_text("abcd")
    assert wandb_settings(tmp_path / "run", None)["id"] == "abcd" != settings["id"]


class Run:
    """Counts steps as wandb does: a row of an earlier step is dropped."""

    id = "abcd"

    def __init__(self):
        self.step = 0
        self.rows = []
        self.summary = {}
        self.artifacts = []

    def log_artifact(self, artifact):
        self.artifacts.append(artifact)

    def finish(self):
        self.finished = True

    def log(self, row, step=None, commit=None):
        step = self.step if step is None else step
        if step >= self.step:
            self.rows.append((step, row))
            self.step = step + 1


def test_no_row_of_a_continued_run_is_dropped_by_wandb(tmp_path):
    dashboard = Dashboard(id="abcd", mode="offline", save_dir=str(tmp_path))
    dashboard._experiment = Run()
    for step in (20, 20, 40, 30, 60):  # two kinds of rows at step 20; continued from step 20 after step 40
        dashboard.log_metrics({"train/loss": 1.0}, step=step)
    rows = dashboard.experiment.rows
    assert [own for own, _ in rows] == [20, 21, 40, 41, 60]
    assert [row["trainer/global_step"] for _, row in rows] == [20, 20, 40, 30, 60]


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_the_dashboard_gets_protocol_scores_and_online_the_report(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    folder = write_run(tmp_path / "run")
    dashboard = Dashboard(id="abcd", mode=mode, save_dir=str(folder))
    run = dashboard._experiment = Run()
    record = Record({"fd_digits": 4.5, "kid": 0.1}, protocol())
    dashboard.publish(record, folder)
    assert run.summary["protocol"] == record.protocol
    ((_, row),) = run.rows
    assert [line[:2] for line in row["scores"].data] == [["fd_digits", 4.5], ["kid", 0.1]]
    assert row["scores"].data[0][4:] == [300, 50]
    assert [list(artifact.manifest.entries) for artifact in run.artifacts] == (
        [["report.html"]] if mode == "online" else []
    )
    assert (folder / "report.html").is_file() == (mode == "online")


def test_the_report_of_a_sweep_is_uploaded_where_its_jobs_were_online(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    run, asked = Run(), {}
    monkeypatch.setattr(wandb, "init", lambda **settings: asked.update(settings) or run)
    job = write_run(tmp_path / "sweep" / "0_seed-0", logger={"wandb": {"project": "mine"}})
    page = tmp_path / "report.html"
    page.write_text("a page")
    assert not publish_sweep(page, tmp_path / "sweep")
    (job / "wandb" / "offline-run-1").mkdir(parents=True)
    assert not publish_sweep(page, tmp_path / "sweep")
    (job / "wandb" / "run-1").mkdir()
    assert publish_sweep(page, tmp_path / "sweep")
    assert (asked["project"], asked["group"], asked["job_type"]) == ("mine", "sweep", "report")
    assert len(run.artifacts) == 1
    assert run.finished


def test_a_package_that_is_not_installed_has_no_version():
    assert installed("torch") == version("torch")
    assert installed("no-such-package") is None


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_the_first_process(monkeypatch, name):
    assert is_first_process()
    monkeypatch.setenv(name, "1")
    assert not is_first_process()
    assert is_first_process(several=False), "one process is the first, whatever the rank of its allocation"


def test_rank_is_not_read_from_the_allocation(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # the rank that Lightning reads from SLURM_PROCID
    launch_by_command_line()
    assert rank_zero_only.rank == 0


def test_lightning_has_the_function_that_is_replaced():
    """`StopOnSignal` synchronises signals between ranks; Lightning's function waits for the device at every step.
    Lightning's observer kills rank 0 before it can save."""
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    assert callable(subprocess_script._launch_process_observer)
