"""SIGKILL at critical instants: the resumed run ends with weights bit-identical to those of an uninterrupted run."""

import os
import signal
import time

import pytest

from tests.faults import processes
from tests.faults.processes import DDP, STEPS, Fault, resume, run_folder, train
from tests.faults.states import differences, training_state

# name -> the function and the number of its call
KILLS = {
    "before the first step": Fault("src.training.module:DiffusionModule.training_step", 1),
    "in the backward pass": Fault("torch:Tensor.backward", 8),
    "between optimiser and average": Fault("src.training.ema:EMA.on_train_batch_end", 8),
    "in validation": Fault("src.training.module:DiffusionModule.validation_step", 7),
    "with the averages in place": Fault("src.generation.recipe:Recipe.start", 3),
    "in the bytes of a checkpoint": Fault("src.training.checkpoint:_Hashing.write", 4500),
    "between checkpoint and its record": Fault("src.training.checkpoint:write_json", 3),
}


@pytest.mark.parametrize("place", KILLS)
def test_killed_and_resumed(tmp_path, uninterrupted, place):
    killed = train(tmp_path, faults=[KILLS[place]])
    assert killed.status == 128 + signal.SIGKILL, killed.output
    done = resume(tmp_path)
    assert done.status == 0, done.output
    assert not differences(uninterrupted, training_state(run_folder(tmp_path), STEPS))
    assert not list(tmp_path.glob("runs/*/checkpoints/.*")), "temporary files of the killed process remain"


@pytest.mark.slow  # part of `make faults`
def test_killed_repeatedly_with_workers(tmp_path, uninterrupted):
    for step in (5, 4):
        fault = Fault("src.training.module:DiffusionModule.training_step", step)
        killed = resume(tmp_path, "workers=2", faults=[fault])
        assert killed.status == 128 + signal.SIGKILL, killed.output
        processes.wait_for(lambda killed=killed: not processes.members(killed.process.pid), 20)
    assert resume(tmp_path, "workers=2").status == 0
    assert not differences(uninterrupted, training_state(run_folder(tmp_path), STEPS))


def test_other_seed_differs(tmp_path, uninterrupted):
    """Shows that the comparison can fail."""
    assert train(tmp_path, "seed=1").status == 0
    assert differences(uninterrupted, training_state(run_folder(tmp_path), STEPS))


@pytest.fixture(scope="session")
def uninterrupted_ddp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted_ddp")
    leader = processes.start_command(folder, *DDP)
    assert leader.wait(300) == 0, (folder / "output.txt").read_text()
    return training_state(run_folder(folder), STEPS)


@pytest.mark.slow  # part of `make faults`
@pytest.mark.parametrize("rank", [1])
def test_one_of_two_processes_killed(tmp_path, uninterrupted_ddp, rank):
    leader = processes.start_command(tmp_path, *DDP)
    try:
        processes.wait_for(lambda: list(tmp_path.glob("runs/*/checkpoints/step_*.ckpt")))
        os.kill(processes.ranks(leader)[rank], signal.SIGKILL)
        began = time.monotonic()
        assert leader.wait(30) != 0
        assert time.monotonic() - began < 25, "the other process waited for the killed one"
        output = (tmp_path / "output.txt").read_text()
        assert "error: process 1 of 2 was killed by SIGKILL" in output
        assert "Traceback" not in output
    finally:
        processes.leave_nothing(leader)
    assert processes.start_command(tmp_path, "ckpt=last").wait(300) == 0, (
        tmp_path / "output.txt"
    ).read_text()
    assert not differences(uninterrupted_ddp, training_state(run_folder(tmp_path), STEPS))
