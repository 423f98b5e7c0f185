"""Sweeps and dashboards: folders, wandb runs, seeds, failures, the table, and what wandb would show."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from tests.conftest import QUICK, ROOT


def start(tmp_path, *overrides):
    """python -m src.train in a process of its own, offline, with all files under tmp_path."""
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("WANDB")},
        "OMP_NUM_THREADS": "1",
        "HOME": str(tmp_path),  # no key in ~/.netrc
        "WANDB_DATA_DIR": str(tmp_path / "wandb-data"),
        "DIFFUSION_LAB_CACHE": str(tmp_path / "cache"),
        "COLUMNS": "200",
    }
    command = [
        sys.executable,
        "-m",
        "src.train",
        f"runs={tmp_path / 'runs'}",
        *QUICK,
        "logger=wandb",
        *overrides,
    ]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )


def inspect(folder):
    """The records of an offline wandb run, by wandb's own reader."""
    leet = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    (run,) = folder.glob("wandb/offline-run-*")
    done = subprocess.run([*leet, str(run)], capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("sweep")
    # the second choice of spacing fails: 700 quadratic steps are not distinct
    done = start(tmp_path, "-m", "seed=0,1", "sampler.steps=5,700", "spacing=quadratic")
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    jobs = {int(path.name.split("_")[0]): path for path in folder.iterdir() if path.is_dir()}
    return done, folder, jobs


def test_each_job_has_its_folder(sweep):
    _, _, jobs = sweep
    assert sorted(jobs) == [0, 1, 2, 3]
    assert "seed=1" in jobs[2].name


def test_a_failing_job_leaves_the_others_alone(sweep):
    done, _, jobs = sweep
    assert done.returncode == 1
    outcomes = {number: json.loads((job / "outcome.json").read_text()) for number, job in jobs.items()}
    assert [number for number in outcomes if "error" in outcomes[number]] == [1, 3]
    assert "distinct" in outcomes[1]["error"]
    assert {"fd_digits", "val/loss"} <= set(outcomes[2]["scores"])


def test_jobs_have_their_own_seeds(sweep):
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


def test_each_job_has_its_wandb_run_in_the_sweeps_group(sweep):
    _, folder, jobs = sweep
    records = [next(r for r in inspect(jobs[i]) if "run" in json.dumps(r)[:60]) for i in (0, 2)]
    text = [json.dumps(record) for record in records]
    assert all(folder.name in record for record in text), "the group is the sweep"
    ids = [(jobs[i] / "wandb_run_id").read_text() for i in (0, 2)]
    assert ids[0] != ids[1]
    assert all(run_id in record for run_id, record in zip(ids, text, strict=True))


def test_what_the_dashboard_shows(tmp_path):
    done = start(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "offline" in done.stderr + done.stdout
    (folder,) = (path for path in (tmp_path / "runs").iterdir())
    records = inspect(folder)
    dump = "\n".join(json.dumps(record) for record in records)
    print(dump[:6000])
    raise AssertionError
