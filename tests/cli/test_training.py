"""Training through the command line: resuming, callbacks, devices, output files."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

from src.evaluation.record import Record
from tests.conftest import QUICK, ROOT

LABELS = ("conditioning=class", "conditioning.dropout=0.3")  # some of the labels are dropped
DROPOUT = ("model.dropout=0.2", *LABELS)  # makes the result depend on the global random state
# importance sampling with so few times that it differs from the uniform distribution after a few steps
IMPORTANCE = ("time_sampling=importance", "time_sampling.history=2", "schedule.T=10", "loss=vlb")

# a network whose weights are normalised after each step
MAGNITUDE = (
    "model=unet_edm2",
    "model.channel_multipliers=[1,1]",
    "model.blocks_per_level=1",
    "model.attention_factors=[2]",
    "model.head_channels=8",
    "parameterization=edm",
    "lr_schedule=edm2",
    "lr_schedule.warmup_steps=2",
)


def checkpoint(folder, step):
    return torch.load(folder / "checkpoints" / f"step_{step:08d}.ckpt", weights_only=True)


def flat(value, path=""):
    """The leaves of nested dicts and lists, by path."""
    if isinstance(value, dict):
        return {k: v for name, child in value.items() for k, v in flat(child, f"{path}/{name}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, child in enumerate(value) for k, v in flat(child, f"{path}/{i}").items()}
    return {path: value}


def training_state(folder, step):
    """Weights, averages, optimiser, learning rate and data position of a checkpoint."""
    content = checkpoint(folder, step)
    averages = next(state for name, state in content["callbacks"].items() if name.startswith("EMA"))
    kept = {
        name: content[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    }
    return flat({**kept, "ema": averages, "data": content["ImageDataModule"]})


def assert_identical(a, b):
    assert a.keys() == b.keys()
    different = [k for k in a if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])]
    assert not different, different


class TestResume:
    @pytest.fixture
    def uninterrupted(self, command, only_run, tmp_path):
        assert command("train", *QUICK, *DROPOUT, "trainer.max_steps=12") == 0
        return only_run().rename(tmp_path / "uninterrupted")

    @pytest.mark.parametrize("ckpt", ["last", "folder", "file"])
    def test_is_exact(self, command, only_run, uninterrupted, ckpt):
        assert command("train", *QUICK, *DROPOUT, "trainer.max_steps=7", "callbacks.checkpoints.every=5") == 0
        run = only_run()
        given = {"last": "last", "folder": str(run), "file": str(run / "checkpoints" / "step_00000007.ckpt")}
        assert command("train", f"ckpt={given[ckpt]}", "trainer.max_steps=12") == 0
        assert only_run() == run, "a resumed run must continue in the same folder"
        assert_identical(training_state(uninterrupted, 12), training_state(run, 12))

    def test_from_an_earlier_checkpoint(self, command, only_run, uninterrupted):
        assert command("train", *QUICK, *DROPOUT, "trainer.max_steps=9", "callbacks.checkpoints.every=5") == 0
        run = only_run()
        assert command("train", f"ckpt={run}/checkpoints/step_00000005.ckpt", "trainer.max_steps=12") == 0
        assert_identical(training_state(uninterrupted, 12), training_state(run, 12))

    def test_with_accumulation_and_workers(self, command, only_run, tmp_path):
        """Another division of the batch changes only rounding: images, times and noise are the same."""
        assert command("train", *QUICK, "trainer.max_steps=12") == 0
        only_whole = only_run().rename(tmp_path / "whole")
        overrides = ["max_device_batch=8", "workers=2", "trainer.max_steps=7"]
        assert command("train", *QUICK, *overrides) == 0
        run = only_run()
        assert (
            command("train", f"ckpt={run}", "trainer.max_steps=12", "max_device_batch=null", "workers=0") == 0
        )
        mixed, whole = training_state(run, 12), training_state(only_whole, 12)
        for name, weight in whole.items():
            if name.startswith("/state_dict"):
                torch.testing.assert_close(mixed[name], weight, rtol=1e-3, atol=5e-5)

    @pytest.mark.slow
    def test_with_importance_sampling(self, command, only_run, tmp_path):
        assert command("train", *QUICK, *IMPORTANCE, "trainer.max_steps=12") == 0
        whole = training_state(only_run().rename(tmp_path / "whole"), 12)
        assert command("train", *QUICK, *IMPORTANCE, "trainer.max_steps=7") == 0
        learned = training_state(only_run(), 7)
        assert learned["/state_dict/loss.time_sampling._extra_state/seen"].min() >= 2, (
            "the distribution is still uniform"
        )
        assert command("train", "ckpt=last", "trainer.max_steps=12") == 0
        assert_identical(whole, training_state(only_run(), 12))

    @pytest.mark.slow
    def test_with_weights_of_fixed_magnitude(self, command, only_run, tmp_path):
        overrides = [*QUICK, *MAGNITUDE, "callbacks=checkpoints", "model.dropout=0.2"]
        assert command("train", *overrides, "trainer.max_steps=12") == 0
        whole = training_state(only_run().rename(tmp_path / "whole"), 12)
        assert command("train", *overrides, "trainer.max_steps=7") == 0
        assert command("train", "ckpt=last", "trainer.max_steps=12") == 0
        assert_identical(whole, training_state(only_run(), 12))
        weights = {k: w for k, w in whole.items() if k.startswith("/state_dict") and k.endswith("weight")}
        assert len(weights) > 10
        for weight in weights.values():
            magnitude = weight.square().flatten(1).mean(1).sqrt()
            torch.testing.assert_close(magnitude, torch.ones_like(magnitude), rtol=0, atol=1e-3)

    def test_other_seed_differs(self, command, only_run, uninterrupted):
        """Shows that the comparison above can fail."""
        assert command("train", *QUICK, *DROPOUT, "trainer.max_steps=12", "seed=1") == 0
        with pytest.raises(AssertionError):
            assert_identical(training_state(uninterrupted, 12), training_state(only_run(), 12))


def test_accumulation_gives_the_same_weights(command, only_run, tmp_path):
    base = [*QUICK, "trainer.max_steps=6", "callbacks=none"]
    assert command("train", *base) == 0
    whole = training_state(only_run().rename(tmp_path / "whole"), 6)
    assert command("train", *base, "max_device_batch=8") == 0
    parts = training_state(only_run(), 6)
    for name, weight in whole.items():
        if name.startswith("/state_dict"):
            torch.testing.assert_close(parts[name], weight, rtol=1e-3, atol=2e-5)


def test_callbacks_do_not_change_the_training(command, only_run, tmp_path):
    """Previews, scores, validation and curves do not change weights, averages and optimiser state."""
    assert (
        command(
            "train", *QUICK, *DROPOUT, "callbacks.sample_images.every=3", "callbacks.track_fidelity.every=4"
        )
        == 0
    )
    watched = training_state(only_run().rename(tmp_path / "watched"), 20)
    assert command("train", *QUICK, *DROPOUT, "callbacks=none", "validate_every=1000") == 0
    assert_identical(watched, training_state(only_run(), 20))


def test_output_files(command, only_run):
    assert (
        command(
            "train", *QUICK, "trainer.max_steps=20", "callbacks.checkpoints.every=5", "logger=tensorboard"
        )
        == 0
    )
    run = only_run()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "best.ckpt",
        "best.ckpt.json",
        "best.json",
        "step_00000015.ckpt",
        "step_00000015.ckpt.json",
        "step_00000020.ckpt",
        "step_00000020.ckpt.json",
    ]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["image_size"] == 8
    assert "${" not in (run / "config.yaml").read_text(), "interpolations are resolved"
    assert set(json.loads((run / "environment.json").read_text())) >= {"git", "versions", "platform"}
    scores = Record.read(run / "scores.json").scores
    assert set(scores) == {"fd_digits", "val/loss", "val/loss_ema"}
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert best["scores"]["fd_digits"] == scores["fd_digits"]
    protocol = best["protocol"]
    assert protocol["num_images"] == 128
    assert protocol["reference"]["split"] == "train"
    assert protocol["recipe"]["weights"] == "ema"
    assert protocol["recipe"]["network_evaluations"] == 5
    assert len(protocol["features"]["sha256"]) == 64
    with (run / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [(int(row["step"]), float(row["train/loss"])) for row in rows if row["train/loss"]]
    assert [step for step, _ in losses] == [5, 10, 15, 20]
    assert [int(row["step"]) for row in rows if row["fd_digits"]] == [20]
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [10, 20]
    assert list((run / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((*LABELS, "guidance=classifier_free"), id="dropped labels"),
        pytest.param(IMPORTANCE, id="importance", marks=pytest.mark.slow),
        pytest.param(MAGNITUDE, id="magnitude", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one(tmp_path, overrides):
    """Data parallel over two processes (gloo): the same draws, and so the same weights up to rounding.

    Importance sampling receives the losses of both ranks, in the order of one process.
    """

    def train(name, *devices):
        command = [
            sys.executable,
            "-m",
            "src.train",
            *QUICK,
            *overrides,
            f"runs={tmp_path / name}",
            "trainer.max_steps=6",
            "callbacks.track_fidelity.every=6",
            "validate_every=3",
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DIFFUSION_LAB_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [*command, *devices], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        runs = list((tmp_path / name).iterdir())
        assert len(runs) == 1, "the processes have different run folders"
        return training_state(runs[0], 6), Record.read(runs[0] / "scores.json").scores

    one, one_scores = train("one")
    two, two_scores = train("two", "trainer=ddp", "trainer.devices=2", "trainer.precision=32-true")
    for name, weight in one.items():
        if name.startswith(("/state_dict", "/ema/weights")):
            torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=2e-5)
    assert two["/data/samples"] == one["/data/samples"] == 6 * 32
    assert two_scores["fd_digits"] == pytest.approx(one_scores["fd_digits"], rel=1e-3)
    assert two_scores["val/loss"] == pytest.approx(one_scores["val/loss"], rel=1e-3)
