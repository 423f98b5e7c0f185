"""`init=`: a new training from the weights of another run."""

import json

import pytest
import torch

from tests.cli.test_training import checkpoint
from tests.conftest import QUICK, commands_in

PREFIX = "loss.denoiser.network."
FEW = (*QUICK, "metrics=none", "trainer.max_steps=4")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        assert commands_in(folder, patch)("train", *FEW, "hydra.run.dir=run") == 0
    return folder / "run"


def network(content):
    weights = content["state_dict"].items()
    return {name.removeprefix(PREFIX): w for name, w in weights if name.startswith(PREFIX)}


def test_starts_from_the_averaged_weights_with_a_fresh_optimiser(first, command, only_run):
    # a rate so small that float32 weights stay what they are
    assert command("train", *FEW, f"init={first}", "optimizer.lr=1e-30", "trainer.max_steps=1") == 0
    before, after = checkpoint(first, 4), checkpoint(only_run(), 1)
    average = before["callbacks"]["EMA"]["weights"]
    assert any(not torch.equal(weight, average[name]) for name, weight in network(before).items())
    assert all(torch.equal(weight, average[name]) for name, weight in network(after).items())
    assert after["optimizer_states"][0]["state"][0]["step"] == 1
    assert after["ImageDataModule"]["samples"] == 32
    record = json.loads((only_run() / "init.json").read_text())
    assert (record["training_steps"], record["weights"]) == (4, "ema")
    assert after["config"]["init"] == str(first)


def test_raw_weights_and_resuming(first, command, only_run, tmp_path, capsys):
    raw = ("init_weights=raw", "trainer.max_steps=2", "callbacks.checkpoints.every=1")
    assert command("train", *FEW, f"init={first}", *raw) == 0
    whole = only_run().rename(tmp_path / "whole")
    assert command("train", *FEW, f"init={first}", *raw[:1], "trainer.max_steps=1") == 0
    # the run continues without init, even if that run is gone or differs
    assert command("train", f"ckpt={only_run()}", "trainer.max_steps=2") == 0
    weights = network(checkpoint(only_run(), 2))
    assert all(torch.equal(weight, weights[name]) for name, weight in network(checkpoint(whole, 2)).items())
    assert checkpoint(only_run(), 2)["config"]["init"] == str(first)
    assert json.loads((only_run() / "init.json").read_text())["weights"] == "raw"
    capsys.readouterr()
    assert command("train", f"ckpt={only_run()}", "init=other", "trainer.max_steps=3") == 2
    assert "ckpt continues a run, and this one started from" in capsys.readouterr().err


def test_parts_that_do_not_fit(first, command, only_run, capsys):
    by_class = (*FEW, f"init={first}", "conditioning=class", "trainer.max_steps=1")
    assert command("train", *by_class, "hydra.run.dir=refused") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "1 parts do not fit: class_embedding.weight (not in init)" in error
    assert "init_partial=true" in error
    assert command("train", *by_class, "init_partial=true", "optimizer.lr=1e-30") == 0
    weights, average = network(checkpoint(only_run(), 1)), checkpoint(first, 4)["callbacks"]["EMA"]["weights"]
    assert all(torch.equal(weights[name], weight) for name, weight in average.items())
    assert json.loads((only_run() / "init.json").read_text())["untrained"] == ["class_embedding.weight"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model.base_channels=24"], "parts do not fit"),
        (
            ["model=dit_tiny", "~model.base_channels", "init_partial=true"],
            "its network is UNet, and this training's is DiT",
        ),
        (["init_weights=0.1"], "0.1"),
        (["init=nowhere"], "init=nowhere: no such run folder"),
    ],
)
def test_refusals_are_one_line(first, command, capsys, options, words):
    quick = [
        option for option in FEW if not ("~model.base_channels" in options and "base_channels" in option)
    ]
    options = [option for option in options if not option.startswith("~")]
    assert command("train", *quick, f"init={first}", *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
