"""`python -m src.runs`: status, filters, order."""

import fcntl
import os
import subprocess
import sys
import time

import pytest

from src.evaluation.record import Record
from src.report.run import read_run
from src.runs.files import write_json
from tests.conftest import ROOT
from tests.report.simulated import protocol, write_run, write_sweep


def later(path, seconds=60):
    os.utime(path, (time.time() + seconds,) * 2)


def test_the_status_of_a_run(tmp_path):
    assert read_run(write_run(tmp_path / "finished")).status == "finished"
    assert read_run(write_run(tmp_path / "killed", score=None, steps=100)).status == "stopped"
    early = write_run(tmp_path / "early stopping", steps=200)
    assert read_run(early).status == "finished"
    later(early / "config.yaml")
    assert read_run(early).status == "stopped", "continued since, and stopped"
    failed = write_run(tmp_path / "failed", score=None)
    write_json(failed / "error.json", {"error": "loss is NaN"})
    assert (read_run(failed).status, read_run(failed).error) == ("failed", "loss is NaN")


def test_a_run_whose_lock_is_held_is_running(tmp_path):
    run = write_run(tmp_path / "run", score=None, steps=120)
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'a+'); fcntl.lockf(file, fcntl.LOCK_EX);"
        " print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(run / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        found = read_run(run)
        assert (found.status, found.step, found.max_steps) == ("running", 120, 300)
        process.stdin.close()
    assert read_run(run).status == "stopped"
    with (run / "lock").open("a+") as file:  # asking has taken no lock
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_cost_of_a_run(tmp_path):
    cost = read_run(write_run(tmp_path / "run")).cost
    assert cost.images == 300 * 64
    assert cost.seconds == pytest.approx(19.2)
    assert (cost.hardware, cost.parameters) == ("EPYC, 1 thread", 72113)


def test_damaged_files_are_named_and_the_rest_is_read(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "scores.json").write_text('{"scores": 5}')
    (run / "environment.json").write_text("{")
    (run / "config.yaml").write_text("a: [")
    found = read_run(run)
    assert found.best.scores == {"fd_digits": 5.0}
    assert [line.rpartition("/")[2].partition(" ")[0] for line in found.problems] == [
        *("config.yaml:", "environment.json", "scores.json"),
    ]


@pytest.fixture
def listed(tmp_path, command, capsys, monkeypatch):
    """Runs the command; the status, the names of the runs in order, and what was printed."""
    monkeypatch.setenv("COLUMNS", "400")

    def call(*arguments):
        status = command("runs.__main__", *arguments)
        output = capsys.readouterr()
        names = [
            line.split("│")[1].strip().rpartition("/")[2] for line in output.out.splitlines() if "│" in line
        ]
        return status, names, output.out + output.err

    return call


def test_the_best_runs_first_and_filters(tmp_path, listed):
    for name, score, options in (
        *(
            ("a", 3.0, {"seed": 1}),
            ("b", 1.0, {}),
            ("c", 2.0, {"schedule___target_": "src.diffusion.schedule.Linear"}),
        ),
        *(("d", None, {"seed": 1}), ("e", 4.0, {"optimizer__lr": 2e-4})),
    ):
        later(write_run(tmp_path / "runs" / name, score, **options) / "config.yaml", -ord(name))
    assert listed()[:2] == (0, ["e", "d", "c", "b", "a"]), "the oldest first"
    assert listed("--best")[1] == ["b", "c", "a", "e", "d"]
    assert listed("best=fd_digits", "n=2")[1] == ["b", "c"]
    assert listed("schedule=linear")[1] == ["c"]
    assert listed("seed=1")[1] == ["d", "a"]
    assert listed("seed=1", "status=stopped")[1] == ["d"]
    assert listed("optimizer.lr=2e-4,5e-4")[1] == ["e"]
    assert listed("optimizer=adam", "optimizer.lr=1e-3", "best=fd_digits", "n=1")[1] == ["b"]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("sedule=linear", "sedule: no run has such an option; did you mean schedule?"),
        ("schedule=sigmoid", "schedule=sigmoid: no run has this value; there is Cosine"),
        ("best=fid", "best=fid: no run has this score; there is fd_digits"),
        ("status=done", "status=done: choose finished, running, stopped, failed"),
        ("n=0", "n=0: give a number of runs, at least 1"),
        ("gone", "gone: no such folder"),
        ("--worst", "--worst: no such flag"),
    ],
)
def test_mistakes_are_one_line(tmp_path, listed, argument, words):
    write_run(tmp_path / "runs" / "a")
    status, _, output = listed(argument)
    assert status == 2
    assert words in output
    assert len(output.strip().splitlines()) == 1


def test_scores_of_different_protocols_are_marked(tmp_path, listed):
    for name in "abc":
        write_run(tmp_path / "runs" / name)
    Record({"fd_digits": 0.1}, protocol(num_images=64)).write(tmp_path / "runs" / "c" / "scores.json")
    _, names, output = listed("--best")
    assert names == ["a", "b", "c"], "a better value of another protocol is not the best"
    assert "2 ways (protocol), whose values cannot be compared" in output


def test_the_jobs_of_a_sweep_are_listed_also_those_that_failed(tmp_path, listed):
    sweep = write_sweep(
        tmp_path / "runs" / "sweep", schedule=["linear", "cosine"], parameterization=["eps"], seed=[0]
    )
    failed = sweep / "0_schedule-linear_parameterization-eps_seed-0"
    for path in sorted(failed.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    write_json(failed / "outcome.json", {"overrides": [], "error": "schedule [red]impossible"})
    status, names, output = listed()
    assert status == 0
    assert failed.name in names
    assert "schedule [red]impossible" in output, "markup of an untrusted text is shown as it is"


def test_a_folder_that_leads_out_of_itself_is_not_read(tmp_path, listed):
    run = write_run(tmp_path / "runs" / "a")
    (tmp_path / "secret.csv").write_text("step,secret\n1,2\n")
    (run / "csv" / "version_0" / "metrics.csv").unlink()
    (run / "csv" / "version_0" / "metrics.csv").symlink_to(tmp_path / "secret.csv")
    _, _, output = listed()
    column = "".join(
        line.split("│")[1].strip() for line in output.splitlines() if "│" in line
    )  # folded anywhere
    assert "isalinkoutoftherunfolder" in column.replace(" ", "")


def test_the_list_loads_no_torch(tmp_path):
    write_run(tmp_path / "a")
    code = (
        "import sys; from src.report.command import main; main('runs', [sys.argv[1]]);"
        " assert not {'torch', 'hydra', 'lightning'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_direction_of_a_score_is_that_of_its_record(tmp_path, listed):
    for name, value in (("a", 1.0), ("b", 3.0), ("c", 2.0)):
        record = Record({"fd_digits": value}, protocol(higher_is_better={"fd_digits": True}))
        run = write_run(tmp_path / "runs" / name)
        record.write(run / "scores.json")
        record.write(run / "checkpoints" / "best.json")
    assert listed("--best")[1] == ["b", "c", "a"]
