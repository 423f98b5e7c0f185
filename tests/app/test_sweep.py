"""Sweeps: the jobs of a command, their folders, leases, launchers, continuing, and the table of means."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from src.app.build import build
from src.app.options import CONF
from src.app.shared import shared, sharing
from src.app.sweep import cluster, local
from src.app.sweep import launcher as launchers
from src.app.sweep.cluster import Ray, Slurm
from src.app.sweep.jobs import CONSOLE_FILE, OUTCOME_FILE, Job, Sweep, combinations, composed, folder_name
from src.app.sweep.local import Local
from src.app.sweep.run import _checked, devices_of, run_sweep
from src.app.sweep.table import monitored, print_tables
from src.errors import UserError
from src.runs.files import write_json
from tests.conftest import ROOT

# A job that notes when it ran and on which device, and writes a score.
NOTING = """
import json, os, sys, time
begin = time.time()
time.sleep(float(sys.argv[2]))
record = {"begin": begin, "end": time.time(), "device": os.environ["CUDA_VISIBLE_DEVICES"], "pid": os.getpid()}
open(sys.argv[1], "w").write(json.dumps(record))
open(os.environ["DIFFUSION_LAB_SCORES_TO"], "w").write('{"fid": 1.5}')
"""


@pytest.fixture
def noting(monkeypatch):
    """Jobs that only note; the override seconds=... is how long one takes."""

    def command(job):
        (seconds,) = (o.partition("=")[2] for o in job.overrides if o.startswith("seconds="))
        return [sys.executable, "-c", NOTING, str(job.folder / "note.json"), seconds]

    monkeypatch.setattr(Job, "command", command)


def notes(sweep: Sweep) -> list[dict]:
    return [json.loads((job.folder / "note.json").read_text()) for job in sweep.jobs]


def overlapping(records: list[dict]) -> int:
    """Pairs of records that ran at the same time."""
    pairs = [(a, b) for i, a in enumerate(records) for b in records[:i]]
    return sum(a["begin"] < b["end"] and b["begin"] < a["end"] for a, b in pairs)


def test_the_jobs_are_all_combinations_in_order():
    jobs = combinations(["schedule=linear,cosine", "batch_size=8", "seed=range(3)"])
    assert [varied for _, varied in jobs] == [
        (f"schedule={schedule}", f"seed={seed}") for schedule in ("linear", "cosine") for seed in range(3)
    ]
    assert jobs[1][0] == ("schedule=linear", "batch_size=8", "seed=1")
    assert combinations(["seed=1", "name='a,b'"]) == [(("seed=1", "name='a,b'"), ())]
    with pytest.raises(UserError, match="give the values"):
        combinations(["optimizer.lr=interval(0,1)"])


def test_folders_are_named_by_what_differs_and_stay_apart_when_long(tmp_path):
    sweep = Sweep("train", tmp_path, ["seed=0,1", "batch_size=8"])
    assert [job.folder.name for job in sweep.jobs] == ["0_seed-0", "1_seed-1"]
    long = [folder_name("x" * 200 + end) for end in "ab"]
    assert long[0] != long[1]
    assert max(map(len, long)) <= 100


@pytest.mark.usefixtures("noting")
def test_two_gpus_never_have_two_jobs(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(local.tempfile, "gettempdir", lambda: str(tmp_path))
    sweep = Sweep("train", tmp_path / "sweep", ["seconds=0.7,0.1,0.4,0.1,0.3"])
    Local().run(sweep.jobs, 5)
    for device in ("0", "1"):
        here = [record for record in notes(sweep) if record["device"] == device]
        assert here
        assert overlapping(here) == 0
    assert overlapping(notes(sweep)) > 0, "the devices were not used at the same time"
    assert all(outcome["scores"] == {"fid": 1.5} for outcome in sweep.outcomes().values())


@pytest.mark.usefixtures("noting")
def test_a_second_sweep_waits_for_the_devices_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(local.tempfile, "gettempdir", lambda: str(tmp_path))
    # the first sweep's launcher has been killed, its job still runs
    first = Sweep("train", tmp_path / "first", ["seconds=1"])
    (job,) = first.jobs
    place = Local()._free_places(1)
    with job.begin() as lease:
        process = launchers.start(job, {"CUDA_VISIBLE_DEVICES": "0"}, [lease, place[0][1]])
    place[0][1].close()
    second = Sweep("train", tmp_path / "second", ["seconds=0"])
    Local().run(second.jobs, 1)
    process.wait()
    assert overlapping(notes(first) + notes(second)) == 0
    # continuing the first sweep takes over what its job has left
    Local().run(first.waiting(rerun_failed=False), 1)
    assert first.outcomes()[0]["scores"] == {"fid": 1.5}
    assert notes(first)[0]["pid"] == process.pid, "the job was run twice"


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONF / "launcher").glob("*.yaml")))
def test_every_launcher_is_built(choice):
    launcher = build(composed("train", [f"launcher={choice}"]).launcher, launchers.Launcher, "launcher")
    assert choice in type(launcher).__module__ + type(launcher).__name__.lower()


def test_wrong_devices_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ValueError, match="jobs=3: there are 2 GPUs"):
        Local(jobs=3)
    with pytest.raises(ValueError, match="no GPU 2"):
        Local(devices=[0, 2])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="there are: none"):
        Local(devices=[0])


def test_a_failed_job_says_why_and_a_killed_one_stays_open(tmp_path, monkeypatch):
    ways = {
        "line": "import sys; print('training: 3/9 error: lr=-1: too small'); sys.exit(2)",
        "bug": "raise RuntimeError('CUDA out of memory')",
        "killed": "import os; os.kill(os.getpid(), 9)",
        "stopped": "import sys; sys.exit(143)",
    }
    monkeypatch.setattr(
        Job, "command", lambda job: [sys.executable, "-c", ways[job.overrides[0].partition("=")[2]]]
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    sweep = Sweep("train", tmp_path, ["way=line,bug,killed,stopped"])
    Local(jobs=1).run(sweep.jobs, 4)
    errors = {number: outcome["error"] for number, outcome in sweep.outcomes().items()}
    assert errors == {0: "lr=-1: too small", 1: "RuntimeError: CUDA out of memory"}
    assert [job.number for job in sweep.waiting(rerun_failed=False)] == [2, 3]
    assert [job.number for job in sweep.waiting(rerun_failed=True)] == [0, 1, 2, 3]
    assert sweep.unfinished() == 4
    sweep.jobs[2].close({"fid": 1.0})
    assert sweep.unfinished() == 3


def test_a_job_with_checkpoints_continues_and_the_last_one_is_dropped(tmp_path):
    (job,) = Sweep("train", tmp_path, ["trainer.max_steps=20"]).jobs
    assert job.arguments()[-1].startswith("hydra.run.dir=")
    checkpoints = job.folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    for step in (10, 20):
        (checkpoints / f"step_{step:08}.ckpt").touch()
    assert job.arguments()[-1].startswith("ckpt=")
    replace(job, steps=20).begin().close()
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000010.ckpt"]


def test_a_signal_stops_the_jobs_and_the_status_names_it(tmp_path):
    script = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
os.environ["CUDA_VISIBLE_DEVICES"] = ""
from pathlib import Path
from src.app.sweep.jobs import Job, Sweep
from src.app.sweep.local import Local
Job.command = lambda job: [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
Local(jobs=1).run(Sweep("train", Path({str(tmp_path)!r}), ["seed=0,1"]).jobs, 2)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    console = tmp_path / "0_seed-0" / CONSOLE_FILE
    deadline = time.monotonic() + 60
    while not (console.is_file() and console.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob(f"*/{OUTCOME_FILE}"))
    assert not (tmp_path / "1_seed-1").exists(), "a job was started after the signal"


@pytest.mark.slow  # each job imports torch
def test_submitit_runs_the_jobs(tmp_path):
    pytest.importorskip("submitit")
    sweep = Sweep("sample", tmp_path, ["run=nowhere", "seed=0,1"])
    Slurm(cluster="local", gpus=0, cpus=1, jobs=2).run(sweep.jobs, 2)
    assert {outcome["error"] for outcome in sweep.outcomes().values()} == {
        "run=nowhere: no such run folder or checkpoint file"
    }


def test_clusters_that_are_not_there_are_refused_in_one_line(tmp_path, monkeypatch):
    jobs = Sweep("sample", tmp_path, ["run=nowhere"]).jobs
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    pytest.importorskip("submitit")
    with pytest.raises(UserError, match="no sbatch on this machine"):
        Slurm().run(jobs, 1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"the package ray is missing.*\[ray\]"):
        Ray().run(jobs, 1)


def test_a_ray_cluster_that_does_not_answer_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9"):
        with pytest.raises(
            UserError, match=rf"launcher.address={address}: no Ray cluster answers there \(.*\)"
        ) as error:
            Ray(address=address).check()
        assert "\n" not in str(error.value)


def test_results_of_a_sweep_are_its_first_scores(tmp_path):
    sweep = Sweep("train", tmp_path, ["schedule=a,b", "seed=0,1", "model=x"])
    outcomes = {job.number: {"scores": {"fid": float(job.number), "kid": 0.0}} for job in sweep.jobs}
    del outcomes[2]  # failed
    name, results = monitored(sweep.jobs, outcomes)
    assert name == "fid"
    assert [(r.options, r.seed, r.score) for r in results] == [
        ({"schedule": "a"}, "0", 0.0),
        ({"schedule": "a"}, "1", 1.0),
        ({"schedule": "b"}, "1", 3.0),
    ]
    assert monitored(sweep.jobs, {}) == ("", [])


def test_the_table_prints_intervals_of_records_and_what_matters(tmp_path, capsys):
    sweep = Sweep("train", tmp_path, ["schedule=a,b", "model=x,y"])
    outcomes = {job.number: {"scores": {"fid": 10.0 + job.number}} for job in sweep.jobs}
    job = sweep.jobs[0]
    job.folder.mkdir(parents=True)
    record = {"scores": {"fid": 10.0}, "intervals": {"fid": [9.5, 10.5]}}
    record["protocol"] = {"higher_is_better": {"fid": True}}  # as if
    (job.folder / "scores.json").write_text(json.dumps(record))
    print_tables(sweep, outcomes, pairs=True)
    shown = capsys.readouterr().out
    assert "10.0 ± 0.5" in shown
    assert re.search(r"schedule=b\W+12.5\W+best", shown), "in the direction of the record"
    for words in ("schedule=b", "difference from the best", "interactions"):
        assert words in shown


def test_a_job_with_more_devices_than_there_are_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (job,) = Sweep("train", tmp_path, ["trainer.devices=4"]).jobs
    with pytest.raises(UserError, match=r"trainer.devices=4 of job 0: launcher=local has 2 GPUs"):
        Local().run([replace(job, devices=4)], 1)


def test_a_job_of_several_processes_takes_as_many_places(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setattr(local.tempfile, "gettempdir", lambda: str(tmp_path))
    launcher = Local()
    places = launcher._free_places(2)
    assert launcher._settings(places)["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert launcher._free_places(2) is None
    assert launcher._settings(launcher._free_places(1))["CUDA_VISIBLE_DEVICES"] == "2"


WORKER = """
import os, sys, time
sys.path.insert(0, {root!r})
from src.app.sweep import worker
def run_here(job):
    print("job", job.number)
    if "way=killed" in job.overrides:
        os.kill(os.getpid(), 9)
    job.close({{"pid": os.getpid(), "threads": int(os.environ["OMP_NUM_THREADS"])}})
worker.run_here = run_here
worker.main(sys.argv[1])
"""


def test_jobs_of_evaluation_share_a_process(tmp_path, monkeypatch):
    """A job that ends its process is not repeated, and does not take the others along."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(local.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)))
    popen = subprocess.Popen
    monkeypatch.setattr(
        local.subprocess,
        "Popen",
        lambda arguments, **options: popen([sys.executable, str(script), arguments[-1]], **options),
    )
    sweep = Sweep("evaluate", tmp_path / "sweep", ["way=a,b,killed,c,d"])
    Local(jobs=1).run(sweep.jobs, 5)
    outcomes = sweep.outcomes()
    assert sorted(outcomes) == [0, 1, 3, 4]
    pids = [outcomes[number]["scores"]["pid"] for number in (0, 1, 3, 4)]
    assert pids[0] == pids[1] != pids[2] == pids[3]
    assert (sweep.jobs[1].folder / CONSOLE_FILE).read_text() == "job 1\n"
    assert [job.number for job in sweep.waiting(rerun_failed=False)] == [2]


def test_objects_are_shared_only_where_it_is_wanted():
    made = iter(range(10))
    assert [shared("network", 1, lambda: next(made)) for _ in range(2)] == [0, 1]
    with sharing():
        assert [shared("network", key, lambda: next(made)) for key in (1, 1, 2, 2, 1)] == [2, 2, 3, 3, 4]
        assert shared("scores", 1, lambda: next(made)) == 5
    assert shared("network", 1, lambda: next(made)) == 6


def test_a_full_disk_ends_the_running_jobs_and_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(local.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(Job, "command", lambda job: [sys.executable, "-c", "import time; time.sleep(60)"])
    started = []
    start = launchers.start

    def keep(*arguments):
        started.append(start(*arguments))
        return started[-1]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local, "start", keep)
    monkeypatch.setattr(local, "POLL", 0.01)
    monkeypatch.setattr(Local, "_free_places", lambda self, n: [("cpu-0", open(os.devnull))])  # noqa: SIM115
    sweep = Sweep("train", tmp_path / "sweep", ["seed=0,1"])
    monkeypatch.setattr(Local, "_settings", lambda self, *places: full() if started else {})
    begin = time.monotonic()
    with pytest.raises(OSError, match="No space left"):
        Local(jobs=2).run(sweep.jobs, 2)
    assert started[0].poll() is not None
    assert time.monotonic() - begin < 20


def test_a_job_for_another_machine_is_checked_without_its_devices(tmp_path):
    options = ["data=digits", "trainer.accelerator=gpu", "trainer.devices=4", "trainer.precision=16-mixed"]
    (job,) = Sweep("train", tmp_path, options).jobs
    checked, error = _checked(job, elsewhere=True)
    assert error is None
    assert checked.devices == 4
    (bad,) = Sweep("train", tmp_path, ["data=digits", "batch_size=0"]).jobs
    assert "batch_size" in _checked(bad, elsewhere=True)[1]


@pytest.mark.parametrize(
    ("value", "count"), [(2, 2), ("2", 2), ([0, 1, 3], 3), (-1, 1), ("auto", 1), ("-1", 1)]
)
def test_devices_that_a_job_orders(value, count):
    assert devices_of(value) == count


@pytest.mark.parametrize(("visible", "found"), [("0,1", ["0", "1"]), ("-1", []), ("", []), ("1,-1,2", ["1"])])
def test_visible_devices_end_at_the_first_impossible_one(monkeypatch, visible, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local.visible_devices() == found


def test_a_device_counts_once(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ValueError, match=r"devices=\[0, 0\]: each GPU only once"):
        Local(devices=[0, 0])


def test_the_table_shows_brackets(tmp_path, capsys):
    sweep = Sweep("train", tmp_path, ["metrics=[fid],[kid]", "data=digits"])
    sweep.jobs[0].folder.mkdir()
    sweep.jobs[0].close(error="[/data/a] is no folder")
    sweep.jobs[1].folder.mkdir()
    print_tables(sweep, sweep.outcomes())
    shown = capsys.readouterr().out
    for words in ("metrics=[fid]", "metrics=[kid]", "failed: [/data/a] is no folder"):
        assert words in shown
    assert shown.count("failed") == 1


def test_without_records_the_direction_of_a_score_follows_from_its_name(tmp_path, capsys):
    """In sweeps of earlier releases."""
    sweep = Sweep("evaluate", tmp_path, ["sampler.steps=5,10", "run=x"])
    for job, value in zip(sweep.jobs, (0.2, 0.9), strict=True):
        job.folder.mkdir()
        job.close(scores={"accuracy_digits": value})
    print_tables(sweep, sweep.outcomes())
    means = capsys.readouterr().out.partition("what matters")[2]
    assert means.index("sampler.steps=10") < means.index("sampler.steps=5")


def test_the_reason_of_a_failure_is_that_of_the_last_start(tmp_path, monkeypatch):
    (job,) = Sweep("train", tmp_path, ["data=digits"]).jobs
    job.folder.mkdir()
    for script in ("print('error: the first')", "print('nothing')"):
        monkeypatch.setattr(Job, "command", lambda job, s=script: [sys.executable, "-c", f"{s}; exit(1)"])
        status = launchers.start(job, {}).wait()
    launchers.collect(job, status)
    assert job.outcome()["error"].startswith("exit status 1")


class Submitted:
    """A job of submitit that has ended with a status, and SLURM's state of it."""

    def __init__(self, status, state):
        self.status, self.state = status, state

    def done(self):
        return True

    def exception(self):
        return self.status if isinstance(self.status, Exception) else None

    def result(self):
        return self.status


def test_a_job_that_is_back_in_the_queue_has_not_ended(tmp_path):
    from submitit.core.utils import FailedJobError, UncompletedJobError

    (job,) = Sweep("train", tmp_path, ["data=digits"]).jobs
    job.folder.mkdir()
    assert not cluster._ended(job, Submitted(138, "PENDING"))
    assert not cluster._ended(job, Submitted(138, "RUNNING"))
    assert cluster._ended(job, Submitted(138, "COMPLETED"))
    assert cluster._ended(job, Submitted(1, "RUNNING"))
    assert cluster._result(Submitted(FailedJobError(), "FAILED")) == 1
    assert cluster._result(Submitted(UncompletedJobError(), "CANCELLED")) == -signal.SIGKILL
    write_json(job.scores_file, {"fd": 1.0})  # of its second run
    assert cluster._ended(job, Submitted(138, "RUNNING"))


def test_a_submission_that_is_refused_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.Slurm, "check", lambda self: None)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    (job,) = Sweep("train", tmp_path / "sweep", ["data=digits"]).jobs
    job.folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"launcher=slurm: the jobs were not accepted: .*invalid partition"):
        Slurm(partition="x").run([job], 1)


def test_ray_is_not_left_waiting_for_what_the_machine_lacks():
    with pytest.raises(UserError, match=r"launcher.gpus=2: this machine has 0 for Ray"):
        Ray(gpus=2)._check_resources({"CPU": 4.0})


def test_a_sweep_with_a_killed_job_does_not_end_as_finished(tmp_path, monkeypatch):
    """A killed job has no outcome, and so no error."""
    script = "import os; os.kill(os.getpid(), 9)"
    monkeypatch.setattr(Job, "command", lambda job: [sys.executable, "-c", script])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = ["data=digits", "logger=csv", "trainer.accelerator=cpu", "seed=0,1"]
    assert run_sweep("train", [*options, "launcher=local", "launcher.jobs=1", f"runs={tmp_path}"]) == 2
