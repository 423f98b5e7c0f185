"""trainer=fsdp: two processes with half of the weights each train like one, save whole checkpoints, and continue."""

import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from src.app.assemble import assemble
from src.app.sweep.jobs import composed
from src.errors import UserError
from src.model import DiT
from src.training.sharded import blocks_of
from tests.conftest import ROOT

PLAIN = ("logger=csv", "trainer.accelerator=cpu", "callbacks=none", "metrics=none", "model.base_channels=16")
PLAIN = (*PLAIN, "batch_size=16", "trainer.max_steps=12", "callbacks.checkpoints.every=6")
SHARDED = ("trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu")


def train(folder, *options):
    place = [] if options[0].startswith("ckpt=") else [f"hydra.run.dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "src.train", *options, *place],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return state(folder)


def state(folder, step=12):
    content = torch.load(folder / "checkpoints" / f"step_{step:08}.ckpt", weights_only=True)
    moments = [value for each in content["optimizer_states"][0]["state"].values() for value in each.values()]
    return [*content["state_dict"].values(), *content["callbacks"]["EMA"]["weights"].values(), *moments]


def largest_difference(a, b):
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.slow  # five processes that import the framework
def test_two_processes_with_half_of_the_weights_train_like_one(tmp_path):
    one = train(tmp_path / "one", *PLAIN)
    two = train(tmp_path / "two", *PLAIN, *SHARDED)
    assert largest_difference(one, two) < 1e-6
    # continued from the middle
    (tmp_path / "two" / "checkpoints" / "step_00000012.ckpt").unlink()
    again = train(tmp_path / "two", f"ckpt={tmp_path / 'two'}")
    assert all(torch.equal(a, b) for a, b in zip(two, again, strict=True))
    # and with one device
    (tmp_path / "two" / "checkpoints" / "step_00000012.ckpt").unlink()
    alone = train(tmp_path / "two", f"ckpt={tmp_path / 'two'}", "trainer.devices=1", "trainer.strategy=auto")
    assert largest_difference(alone, two) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["callbacks=default"], "SampleImages need the whole network"),
        (["trainer.limit_val_batches=null"], "trainer.limit_val_batches=0"),
        (["compile=true"], "compile=true is not supported"),
        (["weighting=learned_uncertainty"], "weights of its own"),
        (["model=unet_edm2", "model.blocks_per_level=1"], "changes its weights after each step"),
        (["ema.device=cpu"], "ema.device=null"),
        (["trainer.strategy=fsdp"], r"strategy|GPU"),
    ],
)
def test_what_needs_the_whole_network_is_refused_in_one_line(tmp_path, options, message):
    plain = ["logger=csv", "callbacks=none", "metrics=none", "batch_size=16", "trainer=fsdp"]
    config = composed("train", [*plain, "trainer.accelerator=cpu", "trainer.devices=1", *options])
    OmegaConf.set_struct(config, False)
    config.pop("hydra")
    with pytest.raises(UserError, match=message) as error:
        assemble(config, tmp_path)
    assert "\n" not in str(error.value)


def test_the_blocks_of_a_network_are_divided_one_by_one():
    network = DiT(8, 1, width=32, depth=3, heads=2)
    assert list(blocks_of(network)) == list(network.blocks)
