"""A sample of the faults in every phase: signals, lost output, errors, precisions. All: python -m tests.faults."""

import signal

import pytest

from tests.faults import phases
from tests.faults.phases import Case, lost_outputs
from tests.faults.processes import STEPS, run, run_folder, train
from tests.faults.states import differences, training_state


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    assert train(folder, "trainer.max_steps=2").status == 0
    return run_folder(folder)


@pytest.mark.parametrize(
    "case",
    [
        Case("start", signal.SIGTERM),
        Case("data", signal.SIGUSR1),
        Case("the end", signal.SIGHUP),
        Case("sampling", signal.SIGTERM),
        Case("evaluation", signal.SIGINT),
    ],
    ids=lambda case: case.name,
)
def test_signals_outside_the_steps(tmp_path, trained, case):
    assert phases.problem_of(tmp_path, case, trained) is None


@pytest.mark.slow  # part of `make faults`
@pytest.mark.parametrize(
    "case",
    [
        Case("launch", signal.SIGINT, "group"),
        pytest.param(Case("launch", signal.SIGKILL, 0), marks=pytest.mark.slow),
        pytest.param(Case("data", signal.SIGTERM, 1), marks=pytest.mark.slow),
    ],
    ids=lambda case: case.name,
)
def test_signals_to_two_processes_that_start(tmp_path, trained, case):
    assert phases.problem_of(tmp_path, case, trained) is None


LOST = dict(lost_outputs())


@pytest.mark.parametrize(
    "name",
    [
        "standard output and error, closed pipe, at the start",
        "standard output and error, full disk, in a score",
    ],
)
def test_lost_output(tmp_path, uninterrupted, name):
    assert phases.problem_without_output(tmp_path, LOST[name], uninterrupted) is None


@pytest.mark.parametrize("name", ["the backward pass", "the optimiser", "a score", "a logger"])
def test_errors_in_a_training(tmp_path, uninterrupted, name):
    assert phases.problem_after_error(tmp_path, name, uninterrupted) is None


@pytest.mark.parametrize("precision", ["bf16-true", pytest.param("64-true", marks=pytest.mark.slow)])
def test_precisions(tmp_path, precision):
    assert phases.problem_of_precision(tmp_path, precision) is None


LIGHTNING = (
    "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, patience: 100}",
    "+callbacks.kept={_target_: lightning.pytorch.callbacks.ModelCheckpoint, monitor: val/loss}",
    "+callbacks.rate={_target_: lightning.pytorch.callbacks.LearningRateMonitor}",
    "+trainer.profiler=simple",
    "+trainer.limit_val_batches=2",
    "+trainer.inference_mode=false",
    "+trainer.log_every_n_steps=3",
)


def test_lightning_callbacks_and_options_are_resumed(tmp_path, uninterrupted):
    stopped = train(tmp_path, *LIGHTNING, "trainer.max_steps=6")
    assert stopped.status == 0, stopped.output
    assert "FIT Profiler Report" in stopped.output
    (kept,) = run_folder(tmp_path).glob("checkpoints/epoch*.ckpt")
    again = [
        option for option in LIGHTNING if option.startswith("+callbacks")
    ]  # a run folder may not name them
    done = run(tmp_path, "train", f"ckpt='{kept}'", f"trainer.max_steps={STEPS}", *again)
    assert done.status == 0, done.output
    assert "bit-exact from step 5" in done.output
    state = training_state(run_folder(tmp_path), STEPS)
    assert not [
        leaf for leaf in differences(uninterrupted, state) if leaf.startswith(("/state", "/opt", "/ema"))
    ]
    assert "lr-Adam" in "".join(path.read_text() for path in run_folder(tmp_path).glob("csv/*/metrics.csv"))


def test_early_stopping_ends_and_saves(tmp_path):
    stop = (
        "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, patience: 1"
    )
    ended = train(tmp_path, stop + ", min_delta: 100.0}", "metrics=none", "validate_every=2")
    assert ended.status == 0, ended.output
    assert "step_00000004.ckpt" in ended.output, "stopped at the second validation, and saved there"
