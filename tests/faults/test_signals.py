"""Signals: training saves at the next step boundary and exits with status 128 + signal, without hanging."""

import csv
import ctypes
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from src.runs.files import sidecar_path
from src.runs.folder import find_run
from src.training import signals
from tests.faults import processes
from tests.faults.processes import (
    DDP,
    STEPS,
    TINY,
    Command,
    Fault,
    Replacement,
    resume,
    run,
    run_folder,
    train,
)
from tests.faults.states import differences, training_state

STEP = "src.training.module:DiffusionModule.training_step"
VALIDATION = "src.training.module:DiffusionModule.validation_step"
WRITING = "src.training.checkpoint:_Hashing.write"

# name -> the fault and the step of the checkpoint that must be saved
SIGNALS = {
    "SIGTERM in a step": (Fault(STEP, 5, signal.SIGTERM), 5),
    "SIGUSR1 in a step": (Fault(STEP, 5, signal.SIGUSR1), 5),
    "SIGHUP in a step": (Fault(STEP, 5, signal.SIGHUP), 5),
    "SIGINT in validation, the averages in place": (Fault(VALIDATION, 2, signal.SIGINT), 5),
    "SIGTERM while a checkpoint is written": (Fault(WRITING, 100, signal.SIGTERM), 3),
}


@pytest.mark.parametrize("case", SIGNALS)
def test_saves_and_exits(tmp_path, uninterrupted, case):
    fault, step = SIGNALS[case]
    stopped = train(tmp_path, faults=[fault])
    assert stopped.status == 128 + fault.signum, stopped.output
    assert "Traceback" not in stopped.output
    assert find_run(run_folder(tmp_path)).checkpoint.name == f"step_{step:08d}.ckpt"
    done = resume(tmp_path)
    assert done.status == 0, done.output
    assert "bit-exact" in done.output
    assert not differences(uninterrupted, training_state(run_folder(tmp_path), STEPS))


@pytest.mark.parametrize(
    "place",
    [
        "src.app.assemble:denoiser_of",
        "src.training.resume:code_fingerprints",
        "src.data.digits:Digits._load",
    ],
)
def test_interrupt_before_the_training_starts(tmp_path, place):
    """Interrupts the assembly, the check of a resumed run and the loading of images."""
    stopped = train(tmp_path, faults=[Fault(place, 1, signal.SIGINT)])
    assert stopped.status == 128 + signal.SIGINT, stopped.output
    # the output is at most the summary and one line
    assert "Traceback" not in stopped.output
    assert "Interrupt" not in stopped.output
    assert "error" not in stopped.output


def test_second_interrupt_ends_at_once(tmp_path):
    stopped = train(tmp_path, faults=[Fault(STEP, 5, signal.SIGINT, again=2)])
    assert stopped.status == 128 + signal.SIGINT
    assert find_run(run_folder(tmp_path)).checkpoint.name == "step_00000003.ckpt", "step 5 was saved"


def ignore_hangups(original, call, *arguments):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return original(*arguments)


def test_an_ignored_hangup_stays_ignored(tmp_path, uninterrupted):
    nohup = Replacement("src.training.signals:StopOnSignal.on_fit_start", ignore_hangups)
    done = train(tmp_path, faults=[nohup, Fault(STEP, 5, signal.SIGHUP)])
    assert done.status == 0, done.output
    assert not differences(uninterrupted, training_state(run_folder(tmp_path), STEPS))


def one_second(original, call, *arguments):
    signals.PATIENCE = 1.0
    return original(*arguments)


def hang(original, call, *arguments):
    """Hangs like a queue without a writer: signal handlers run, then waiting continues."""
    if call == 5:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
    return original(*arguments)


def block(original, call, *arguments):
    """Hangs like a collective without the other rank: the main thread is in C and runs no signal handlers."""
    if call == 5:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
        for _ in range(2):  # the second call blocks
            library.pthread_mutex_lock(mutex)
    return original(*arguments)


@pytest.mark.parametrize(
    ("place", "how"), [(STEP, hang), (STEP, block), ("src.data.datamodule:_already_a_batch", hang)]
)
def test_hang_is_ended(tmp_path, place, how):
    patience = Replacement("src.training.signals:StopOnSignal.on_fit_start", one_second)
    ended = train(tmp_path, faults=[patience, Replacement(place, how)])
    assert ended.status == 128 + signal.SIGTERM, ended.output
    assert "SIGTERM: no progress for" in ended.output
    assert find_run(run_folder(tmp_path)).checkpoint.name == "step_00000003.ckpt"


def slow_preview(original, call, *arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    return original(*arguments)


def test_long_preview_is_not_a_hang(tmp_path):
    patience = Replacement("src.training.signals:StopOnSignal.on_fit_start", one_second)
    preview = Replacement("src.training.callbacks.sample_images:SampleImages.act", slow_preview)
    stopped = train(tmp_path, faults=[patience, preview])
    assert stopped.status == 128 + signal.SIGTERM
    assert find_run(run_folder(tmp_path)).checkpoint.name == "step_00000004.ckpt", (
        "saved before the preview ended"
    )


def test_slurm_job_is_requeued_and_continues(tmp_path, uninterrupted):
    binary = tmp_path / "bin" / "scontrol"
    binary.parent.mkdir()
    binary.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    binary.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "4711", "PATH": f"{binary.parent}:{os.environ['PATH']}"}
    stopped = train(tmp_path, faults=[Fault(STEP, 5, signal.SIGUSR1)], **slurm)
    assert stopped.status == 128 + signal.SIGUSR1, stopped.output
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    # SLURM starts the same command line again
    again = train(tmp_path, SLURM_RESTART_COUNT="1", **slurm)
    assert again.status == 0, again.output
    assert len(list((tmp_path / "runs").iterdir())) == 1, "the requeued job must continue in the same folder"
    assert not differences(uninterrupted, training_state(run_folder(tmp_path), STEPS))


def validations(folder):
    """The steps with a logged val/loss, over all starts of the run."""
    rows = [
        row for file in run_folder(folder).glob("csv/*/metrics.csv") for row in csv.DictReader(file.open())
    ]
    return sorted(int(row["step"]) for row in rows if row.get("val/loss"))


@pytest.mark.parametrize("place", [STEP, VALIDATION])
def test_no_validation_is_lost_to_a_signal(tmp_path, uninterrupted, place):
    # the signal arrives in step 5, after which a validation is due, or in that validation, which runs exactly once
    stopped = train(tmp_path, faults=[Fault(place, 5, signal.SIGTERM)])
    assert stopped.status == 128 + signal.SIGTERM, stopped.output
    assert "saving at step 5 " in stopped.output
    assert validations(tmp_path) == [5]
    assert resume(tmp_path).status == 0
    assert validations(tmp_path) == [5, 10]
    assert not differences(uninterrupted, training_state(run_folder(tmp_path), STEPS))


def test_requeued_job_of_two_trainings_continues_the_right_one(tmp_path):
    """Each command continues the run with the same options, in any folder."""
    slurm = {"SLURM_JOB_ID": "4711"}
    swept = tmp_path / "runs" / "sweeps" / "today" / "0_seed-1"
    assert train(tmp_path, "trainer.max_steps=2", "seed=1", f"hydra.run.dir={swept}", **slurm).status == 0
    assert train(tmp_path, "trainer.max_steps=2", "seed=2", **slurm).status == 0
    again = {**slurm, "SLURM_RESTART_COUNT": "1"}
    new = train(tmp_path, "trainer.max_steps=2", "seed=3", **again)
    assert new.status == 0, new.output
    assert "resume " not in new.output
    for seed, folder in ((1, swept), (2, None)):
        found = train(tmp_path, "trainer.max_steps=2", f"seed={seed}", **again)
        assert found.status == 2
        assert "is at step 2 already" in found.output
        assert folder is None or str(folder.relative_to(tmp_path)) in found.output
    assert len(list(tmp_path.glob("runs/*/checkpoints"))) == 2


@pytest.mark.slow  # part of `make faults`
def test_sigterm_to_one_of_two_processes(tmp_path):
    """SIGTERM to rank 1 only: rank 0 is informed, and both save at the same step and exit."""
    leader = processes.start_command(tmp_path, *DDP, "trainer.max_steps=100000", "validate_every=100000")
    try:
        processes.wait_for(lambda: list(tmp_path.glob("runs/*/checkpoints/step_*.ckpt")))
        pids = processes.ranks(leader)
        assert len(pids) == 2
        began = time.monotonic()
        os.kill(pids[1], signal.SIGTERM)
        assert leader.wait(60) == 128 + signal.SIGTERM, (tmp_path / "output.txt").read_text()
        assert time.monotonic() - began < 30
        processes.wait_for(lambda: not Path(f"/proc/{pids[1]}").exists(), 10)
    finally:
        processes.leave_nothing(leader)
    saved = find_run(run_folder(tmp_path)).checkpoint
    record = json.loads(sidecar_path(saved).read_text())
    assert record["world_size"] == 2
    assert record["samples"] == record["step"] * 16
    assert f"saving at step {record['step']}" in (tmp_path / "output.txt").read_text()


def test_second_job_in_a_run_folder_is_refused(tmp_path):
    first = Command(tmp_path, ["train", *TINY, "trainer.max_steps=100000"]).start()
    try:
        processes.wait_for(lambda: list(tmp_path.glob("runs/*/checkpoints/step_*.ckpt")))
        folder = run_folder(tmp_path)
        for arguments in ([f"ckpt={folder}"], [*TINY, f"hydra.run.dir={folder}"]):
            second = run(tmp_path, "train", *arguments)
            assert second.status == 2, second.output
            assert f"in use by process {first.process.pid}" in second.output
            assert len(second.output.strip().splitlines()) == 1
    finally:
        first.kill()
    step = int(max(path.stem for path in folder.glob("checkpoints/step_*.ckpt")).removeprefix("step_"))
    again = run(tmp_path, "train", f"ckpt={folder}", f"trainer.max_steps={step + 2}")
    assert again.status == 0, f"the lock outlived its process: {again.output}"
