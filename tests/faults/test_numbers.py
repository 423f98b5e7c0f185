"""Non-finite losses and gradients: all ranks skip the step, it is counted, and it never reaches a checkpoint."""

import csv
import os
from pathlib import Path

import pytest
import torch

from src.runs.files import damage
from tests.faults import processes
from tests.faults.processes import DDP, TINY, Replacement, run, run_folder, train
from tests.faults.states import differences, training_state

LOSS = "src.diffusion.loss:DenoisingLoss.forward"
EACH_STEP = (
    "callbacks.checkpoints.every=1",
    "callbacks.checkpoints.keep=20",
    "metrics=none",
    "validate_every=100",
)


def nan_at_5(original, call, *arguments):
    losses = original(*arguments)
    return losses * float("nan") if call == 5 else losses


def infinite_constant_at_5(original, call, *arguments):
    """The gradient of this loss is finite; only the loss itself is not."""
    losses = original(*arguments)
    return losses + float("inf") if call == 5 else losses


def nan_from_5(original, call, *arguments):
    losses = original(*arguments)
    return losses * float("nan") if call >= 5 else losses


def skipped_steps(run: Path) -> list[str]:
    with (run / "csv" / "version_0" / "metrics.csv").open() as file:
        return [row["train/skipped_steps"] for row in csv.DictReader(file) if row.get("train/skipped_steps")]


def test_one_step_is_skipped(tmp_path):
    for name, poison in (("nan", nan_at_5), ("constant", infinite_constant_at_5)):
        command = train(tmp_path / name, *EACH_STEP, faults=[Replacement(LOSS, poison)])
        assert command.status == 0, command.output
        folder = run_folder(tmp_path / name)
        before, after = training_state(folder, 4), training_state(folder, 5)
        changed = {
            leaf
            for leaf in differences(before, after)
            if leaf.startswith(("/state_dict", "/optimizer", "/ema/w"))
        }
        assert not {leaf for leaf in changed if "param_groups" not in leaf}, (
            "weights, moments or averages changed"
        )
        assert differences(after, training_state(folder, 6))
        assert all(
            value.isfinite().all() for value in training_state(folder, 12).values() if torch.is_tensor(value)
        )
        assert skipped_steps(folder) == ["1"]


def test_accumulated_step_is_skipped_completely(tmp_path):
    command = train(tmp_path, *EACH_STEP, "max_device_batch=8", faults=[Replacement(LOSS, nan_at_5)])
    assert command.status == 0, command.output
    folder = run_folder(tmp_path)  # the fifth micro-batch belongs to step 3
    changed = differences(training_state(folder, 2), training_state(folder, 3))
    assert not [leaf for leaf in changed if leaf.startswith(("/state_dict", "/ema/w"))]
    assert skipped_steps(folder) == ["1"]


def test_stops_after_consecutive_failures(tmp_path):
    command = train(tmp_path, "callbacks.skip_nonfinite.stop_after=3", faults=[Replacement(LOSS, nan_from_5)])
    assert command.status == 2, command.output
    assert "not finite 3 times in a row" in command.output.splitlines()[-1]
    kept = list(tmp_path.glob("runs/*/checkpoints/*.ckpt"))
    steps = {path.name for path in kept if "step" in path.name}
    assert steps == {"step_00000003.ckpt", "step_00000006.ckpt", "step_00000007.ckpt"}
    assert "an error at step 7 ends the training; continue with ckpt=" in command.output
    for path in kept:
        assert damage(path) is None
        weights = torch.load(path, weights_only=True)["state_dict"].values()
        assert all(weight.isfinite().all() for weight in weights)


@pytest.mark.slow  # two processes
def test_failure_on_one_rank_skips_the_step_on_both(tmp_path):
    poison = Replacement(LOSS, nan_at_5, rank=1)
    leader = processes.start_command(tmp_path, *DDP, *EACH_STEP, "trainer.max_steps=6", faults=[poison])
    try:
        assert leader.wait(200) == 0, (tmp_path / "output.txt").read_text()
    finally:
        processes.leave_nothing(leader)
    processes.check_reached(tmp_path)
    folder = run_folder(tmp_path)
    changed = differences(training_state(folder, 4), training_state(folder, 5))
    assert not [leaf for leaf in changed if leaf.startswith(("/state_dict", "/ema/w"))]
    assert skipped_steps(folder) == ["1"]


def nan_score(original, call, *arguments):
    scores = original(*arguments)
    return {name: float("nan") for name in scores} if call == 2 else scores


def test_nan_score_is_never_the_best(tmp_path):
    fault = Replacement("src.metrics.fidelity:FidelityScore.compute", nan_score)
    command = run(
        tmp_path, "train", *TINY, "callbacks.track_fidelity.every=4", "trainer.max_steps=8", faults=[fault]
    )
    assert command.status == 0, command.output
    best = torch.load(run_folder(tmp_path) / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 4
    assert os.path.exists(run_folder(tmp_path) / "checkpoints" / "step_00000008.ckpt")
