"""Training continues if output is lost or memory for previews is missing, and with Lightning's callbacks."""

import csv

import torch

from tests.faults import processes
from tests.faults.processes import STEPS, TINY, Replacement, run_folder, train
from tests.faults.states import differences, training_state


def no_memory_for_three(original, call, self, denoiser, indices, *rest):
    if len(indices) > 2:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
    return original(self, denoiser, indices, *rest)


START = "src.generation.recipe:Recipe.start"
QUIET = ("metrics=none", "callbacks.sample_images.every=3")


def test_preview_is_skipped_without_memory(tmp_path, uninterrupted):
    done = train(tmp_path, *QUIET, faults=[Replacement(START, no_memory_for_three)])
    assert done.status == 0, done.output
    assert done.output.count("preview failed: out of memory with 4 images per batch") == 1
    assert not list(run_folder(tmp_path).glob("samples/*.png"))
    state = training_state(run_folder(tmp_path), STEPS)
    assert not [leaf for leaf in differences(uninterrupted, state) if leaf.startswith("/state_dict")]


def test_preview_in_batches_is_identical(tmp_path):
    whole = train(tmp_path / "whole", *QUIET)
    batches = "+callbacks.sample_images.batch_size=2"
    parts = train(tmp_path / "parts", *QUIET, batches, faults=[Replacement(START, no_memory_for_three)])
    assert whole.status == parts.status == 0, parts.output
    pictures = [sorted(run_folder(tmp_path / each).glob("samples/*.png")) for each in ("whole", "parts")]
    assert len(pictures[0]) == len(pictures[1]) == 4
    for one, other in zip(*pictures, strict=True):
        assert one.read_bytes() == other.read_bytes()


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
