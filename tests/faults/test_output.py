"""Training continues if output is lost or memory for previews is missing, and with Lightning's callbacks."""

import csv
import os

import pytest
import torch

from tests.faults import processes
from tests.faults.processes import STEPS, TINY, Replacement, run_folder, train
from tests.faults.states import differences, training_state

START = "src.training.signals:StopOnSignal.on_fit_start"


def close_the_pipe(original, call, *arguments):
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(writer)
    os.close(reader)
    return original(*arguments)


def fill_the_disk(original, call, *arguments):
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    return original(*arguments)


@pytest.mark.parametrize("lose", [close_the_pipe, fill_the_disk])
def test_lost_output_does_not_end_a_training(tmp_path, uninterrupted, lose):
    done = train(tmp_path, faults=[Replacement(START, lose)])
    assert done.status == 0, done.output
    assert "Traceback" not in done.output
    assert not differences(uninterrupted, training_state(run_folder(tmp_path), STEPS))


def no_memory_for_three(original, call, self, denoiser, indices):
    if len(indices) > 2:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
    return original(self, denoiser, indices)


TRAJECTORY = "src.generation.recipe:Recipe.trajectory"
QUIET = ("metrics=none", "callbacks.sample_images.every=3")


def test_preview_is_skipped_without_memory(tmp_path, uninterrupted):
    done = train(tmp_path, *QUIET, faults=[Replacement(TRAJECTORY, no_memory_for_three)])
    assert done.status == 0, done.output
    assert done.output.count("preview: out of memory with 4 images per batch") == 1
    assert not list(run_folder(tmp_path).glob("samples/*.png"))
    state = training_state(run_folder(tmp_path), STEPS)
    assert not [leaf for leaf in differences(uninterrupted, state) if leaf.startswith("/state_dict")]


def test_preview_in_batches_is_identical(tmp_path):
    whole = train(tmp_path / "whole", *QUIET)
    batches = "+callbacks.sample_images.batch_size=2"
    parts = train(tmp_path / "parts", *QUIET, batches, faults=[Replacement(TRAJECTORY, no_memory_for_three)])
    assert whole.status == parts.status == 0, parts.output
    pictures = [sorted(run_folder(tmp_path / each).glob("samples/*.png")) for each in ("whole", "parts")]
    assert len(pictures[0]) == len(pictures[1]) == 4
    for one, other in zip(*pictures, strict=True):
        assert one.read_bytes() == other.read_bytes()


def other_failure(original, call, *arguments):
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_other_failures_of_a_preview_are_not_hidden(tmp_path):
    assert train(tmp_path, *QUIET, faults=[Replacement(TRAJECTORY, other_failure)]).status == 1


def test_state_of_early_stopping_is_saved(tmp_path):
    """The initial best score of the callback is infinite, which must not prevent saving."""
    stop = "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss}"
    done = train(tmp_path, stop, "metrics=none")
    assert done.status == 0, done.output
    assert training_state(run_folder(tmp_path), STEPS)


def test_tasks_of_one_allocation_are_independent(tmp_path):
    """srun -n 2 with a single-process training in each task: the second task also writes all files."""
    slurm = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "1"}
    process = processes.start_command(
        tmp_path, *TINY, "trainer.max_steps=4", "metrics=none", "callbacks.curves.every=1", **slurm
    )
    try:
        assert process.wait(240) == 0, (tmp_path / "output.txt").read_text()
    finally:
        processes.leave_nothing(process)
    folder = run_folder(tmp_path)
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["train/loss"]] == ["1", "2", "3", "4"]
    assert (folder / "csv" / "version_0" / "hparams.yaml").stat().st_size > 10
    assert list(folder.glob("samples/*.png"))
    assert torch.load(folder / "checkpoints" / "step_00000004.ckpt", weights_only=True)["global_step"] == 4
