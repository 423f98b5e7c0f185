"""Training continues if the wandb server is missing, silent or lost during the run, or if wandb's process is killed."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.faults import processes
from tests.faults.processes import ROOT, STEPS, TINY, Replacement, run_folder
from tests.faults.states import differences, training_state

STEP = "src.training.module:DiffusionModule.training_step"
PATIENCE = 30


def kill_at_5(pid, original, call, *arguments):
    if call == 5:
        os.kill(pid, signal.SIGKILL)
    return original(*arguments)


def kill_service_at_5(original, call, *arguments):
    if call == 5:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                status = (process / "status").read_text()
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if f"\nPPid:\t{os.getpid()}\n" in status and b"wandb-core" in command:
                os.kill(int(process.name), signal.SIGKILL)
                break
        else:
            raise AssertionError("wandb-core is not running")
    return original(*arguments)


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def server(port):
    """Process ID of a fake server at the port."""
    process = subprocess.Popen([sys.executable, "-m", "tests.faults.fake_wandb", str(port)], cwd=ROOT)

    def answers():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    processes.wait_for(answers)
    yield process.pid
    process.kill()
    process.wait()


def seconds_of_training(tmp_path, uninterrupted, logger, faults=(), **environment):
    """Trains to the end, compares the state with that of a training without faults; returns (seconds, output)."""
    began = time.monotonic()
    process = processes.start_command(
        tmp_path,
        *TINY,
        logger,
        faults=faults,
        HOME=str(tmp_path),
        WANDB_DATA_DIR=str(tmp_path),
        **environment,
    )
    try:
        status = process.wait(240)
    finally:
        processes.leave_nothing(process)
    processes.check_reached(tmp_path)
    output = (tmp_path / "output.txt").read_text()
    assert status == 0, output
    assert "Traceback" not in output
    assert not differences(uninterrupted, training_state(run_folder(tmp_path), STEPS))
    with (run_folder(tmp_path) / "csv" / "version_0" / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]] == [2, 4, 6, 8, 10, 12]
    return time.monotonic() - began, output


@pytest.fixture(scope="module")
def usual(tmp_path_factory, uninterrupted):
    return seconds_of_training(tmp_path_factory.mktemp("usual"), uninterrupted, "logger=csv")[0]


def online(port):
    return {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_MODE": "online"}


@pytest.mark.slow  # waits for the server; the next test covers the same code
def test_server_is_missing(tmp_path, uninterrupted, usual, port):
    seconds, output = seconds_of_training(tmp_path, uninterrupted, "logger=wandb", **online(port))
    assert seconds < usual + PATIENCE
    assert "wandb       offline" in output
    assert "lost" not in output
    (kept,) = run_folder(tmp_path).glob("wandb/offline-run-*/*.wandb")
    assert b"train/loss" in kept.read_bytes()


@pytest.mark.slow  # waits for wandb's time limit
def test_server_does_not_answer(tmp_path, uninterrupted, usual, port):
    with socket.create_server(("127.0.0.1", port)):
        seconds, output = seconds_of_training(tmp_path, uninterrupted, "logger=wandb", **online(port))
    assert seconds < usual + PATIENCE
    assert "wandb       offline" in output


@pytest.mark.slow  # waits for wandb's time limit
def test_server_is_lost_during_the_run(tmp_path, uninterrupted, usual, port, server):
    """Training waits for the server only at the end, and not longer than the limit."""
    fault = Replacement(STEP, partial(kill_at_5, server))
    seconds, _ = seconds_of_training(tmp_path, uninterrupted, "logger=wandb", [fault], **online(port))
    assert seconds < usual + PATIENCE
    (kept,) = run_folder(tmp_path).glob("wandb/run-*/*.wandb")
    assert b"train/loss" in kept.read_bytes()


def test_wandb_process_is_killed(tmp_path, uninterrupted, usual):
    fault = Replacement(STEP, kill_service_at_5)
    seconds, output = seconds_of_training(
        tmp_path, uninterrupted, "logger=wandb", [fault], WANDB_MODE="offline"
    )
    assert seconds < usual + PATIENCE
    assert "wandb       lost" in output
