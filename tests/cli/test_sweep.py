"""Sweeps and dashboards: folders, wandb runs, seeds, failures, the table of scores, and the logged data."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from PIL import Image

from tests.conftest import QUICK, ROOT


def start(tmp_path, *overrides, common=(*QUICK, "logger=wandb")):
    """Runs python -m src.train in a separate process, offline, with all files under tmp_path."""
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("WANDB")},
        "OMP_NUM_THREADS": "1",
        "HOME": str(tmp_path),  # without a key in ~/.netrc
        "WANDB_DATA_DIR": str(tmp_path / "wandb-data"),
        "DIFFUSION_LAB_CACHE": str(tmp_path / "cache"),
        "COLUMNS": "200",
    }
    command = [
        sys.executable,
        "-m",
        "src.train",
        *([f"runs={tmp_path / 'runs'}"] if common else []),
        *common,
        *overrides,
    ]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )


def inspect(folder):
    """The records of an offline wandb run, read with `wandb leet inspect`."""
    leet = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    (run,) = folder.glob("wandb/offline-run-*")
    done = subprocess.run([*leet, str(run)], capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("sweep")
    # the jobs with 700 steps fail: 700 quadratic steps are not distinct
    done = start(tmp_path, "-m", "seed=0,1", "sampler.steps=5,700", "spacing=quadratic")
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    jobs = {int(path.name.split("_")[0]): path for path in folder.iterdir() if path.is_dir()}
    return done, folder, jobs


def test_a_sweep_writes_its_report(sweep):
    done, folder, jobs = sweep
    assert f"report      {folder / 'report.html'}" in done.stdout
    text = (folder / "report.html").read_text()
    assert "sampler.steps: 4 runs" in text
    assert "distinct" in text, "why the others failed"
    assert "quantisation" in json.dumps(inspect(jobs[0])), "the protocol is in the summary of the offline run"


def test_each_job_has_its_folder(sweep):
    _, _, jobs = sweep
    assert sorted(jobs) == [0, 1, 2, 3]
    assert "seed-1" in jobs[2].name


@pytest.mark.slow
def test_the_printed_commands_work(sweep):
    done, _, jobs = sweep
    (command,) = [
        line.strip() for line in done.stdout.splitlines() if "src.sample" in line and str(jobs[2]) in line
    ]
    arguments = shlex.split(command)[1:]
    again = subprocess.run(
        [sys.executable, *arguments, "n=2"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert again.returncode == 0, again.stderr


def test_failing_job_does_not_affect_the_others(sweep):
    done, _, jobs = sweep
    assert done.returncode == 1
    assert "cannot run  seed=0 sampler.steps=700" in done.stdout
    outcomes = {number: json.loads((job / "outcome.json").read_text()) for number, job in jobs.items()}
    assert sorted(number for number in outcomes if "error" in outcomes[number]) == [1, 3]
    assert "distinct" in outcomes[1]["error"]
    assert {"fd_digits", "val/loss"} <= set(outcomes[2]["scores"])


def test_jobs_have_different_seeds(sweep):
    _, _, jobs = sweep
    losses = [json.loads((jobs[i] / "outcome.json").read_text())["scores"]["val/loss"] for i in (0, 2)]
    assert losses[0] != losses[1]


def test_the_table_lists_jobs_overrides_and_scores(sweep):
    done, folder, _ = sweep
    table = done.stdout
    assert "fd_digits" in table
    assert "seed=1 sampler.steps=5" in table
    assert "failed: sampler.steps=700" in table
    assert len(json.loads((folder / "sweep.json").read_text())) == 4


def test_what_differs_is_compared_over_seeds(sweep):
    done, _, _ = sweep
    assert "what matters" not in done.stdout  # only one number of steps has scores


def test_a_finished_sweep_has_nothing_left_to_run(sweep, tmp_path):
    _, folder, jobs = sweep
    before = {number: (job / "outcome.json").stat().st_mtime_ns for number, job in jobs.items()}
    again = start(tmp_path, "-m", f"sweep={folder}", common=())
    assert "4, 0 to run" in again.stdout
    assert again.returncode == 1
    assert before == {number: (job / "outcome.json").stat().st_mtime_ns for number, job in jobs.items()}
    other = start(tmp_path, "-m", f"sweep={folder}", "seed=0,2", common=())
    assert other.returncode == 2
    assert "belongs to another command" in other.stderr


def test_each_job_has_its_wandb_run_in_the_sweeps_group(sweep):
    _, folder, jobs = sweep
    for number in (0, 2):
        records = inspect(jobs[number])
        (run,) = [record["run"] for record in records if record["type"] == "run"]
        assert run["run_group"] == folder.name
        varied = [f"seed={number // 2}", "sampler.steps=5"]
        assert (run["display_name"], run["job_type"]) == (" ".join(varied), "train")
        assert run["tags"] == varied
        assert run["run_id"] == (jobs[number] / "wandb_run_id").read_text()
        # the run ended before the next began and has exactly the curves of its job
        assert records[-1]["type"] == "exit"
        history = [record["history"]["item"] for record in records if record["type"] == "history"]
        assert [item["trainer/global_step"] for item in history if "train/loss" in item] == [5, 10, 15, 20]


@pytest.mark.slow  # the runs of a sweep are read by a test above
def test_data_logged_to_the_dashboard(tmp_path):
    done = start(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "offline" in done.stdout, "the offline mode was not reported"
    (folder,) = (tmp_path / "runs").iterdir()
    records = inspect(folder)
    history = [record["history"]["item"] for record in records if record["type"] == "history"]

    def steps(key):
        return [item["trainer/global_step"] for item in history if key in item]

    for curve in ("loss", "gradient_norm", "learning_rate", "images_per_second", "samples", "passes"):
        assert steps(f"train/{curve}") == [5, 10, 15, 20]
    assert all(steps(f"train/loss_q{quarter}") for quarter in range(4)), "the loss by noise level is missing"
    assert steps("val/loss") == steps("val/loss_ema") == [10, 20]
    assert steps("fd_digits") == [20]
    # the optimiser's step is the x axis of every curve
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert any(m.get("glob_name") == "*" and m.get("step_metric") == "trainer/global_step" for m in metrics)

    (shown,) = [item["samples.filenames"] for item in history if "samples.filenames" in item]
    assert steps("samples.filenames") == [20]
    (run,) = folder.glob("wandb/offline-run-*")
    with (
        Image.open(run / "files" / shown[0]) as picture,
        Image.open(folder / "samples" / "step_00000020.png") as grid,
    ):
        assert picture.convert("L").tobytes() == grid.convert("L").tobytes()

    config = {}
    for record in records:
        config |= record.get("config", {}).get("update", {})
    assert config["schedule"]["_target_"].endswith("Cosine")
    assert config["batch_size"] == 32
    assert config["environment"]["git"], "the git revision is missing"
