"""A stored configuration is data: what it may name, and what comes from the command line instead."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from src.app.build import resolve
from src.app.options import CONF
from src.app.stored import CONTINUED, continue_with, read_config
from src.app.sweep import LONGEST_NAME, folder_name
from src.errors import UserError
from tests.faults.hostile import nested

CHECKPOINT = next((Path(__file__).parent / "earlier_run" / "checkpoints").glob("*.ckpt"))


@pytest.fixture
def stored(tmp_path):
    """A copy of a checkpoint with other options: stored(optimizer__lr=1) -> its path."""

    def write(**options):
        content = torch.load(CHECKPOINT, weights_only=True)
        for name, value in options.items():
            *parents, last = name.split("__")
            node = content["config"]
            for parent in parents:
                node = node[parent]
            node[last] = value
        torch.save(content, tmp_path / "step_00000020.ckpt")
        return tmp_path / "step_00000020.ckpt"

    return write


def composed(path, *arguments):
    left = continue_with(path, list(arguments))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve(compose(CONTINUED, left), "config")


def test_the_stored_options_are_composed_with_the_command_line(stored):
    config = composed(stored(), "sampler=ddpm", "optimizer.lr=0.5", "+callbacks.curves.every=3")
    assert config["schedule"] == {
        "_target_": "src.diffusion.schedule.Cosine",
        "T": 100,
        "s": 0.008,
        "beta_max": 0.999,
    }
    assert config["sampler"] == {"_target_": "src.diffusion.sampler.DDPM", "steps": 100}
    assert (config["optimizer"]["lr"], config["seed"], config["batch_size"]) == (0.5, 0, 16)
    assert config["callbacks"]["curves"] == {"every": 3}
    assert config["logger"] == {}
    assert config["cache"] != "/tmp/oldcache"


def test_presets_replace_stored_choices(stored):
    config = composed(stored(), "debug=overfit")
    assert not config["ema"]
    assert config["trainer"]["max_steps"] == 500


def test_a_following_option_follows(stored):
    cosine = {
        "_target_": "src.training.lr_schedule.WarmUpCosine",
        "_partial_": True,
        "warmup_steps": 5,
        "total_steps": 20,
        "final": 0.0,
    }
    path = stored(lr_schedule=cosine)
    assert composed(path, "trainer.max_steps=40")["lr_schedule"]["total_steps"] == 40
    path = stored(lr_schedule=cosine | {"total_steps": 30})
    assert composed(path, "trainer.max_steps=40")["lr_schedule"]["total_steps"] == 30


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "\\${seed}", "\\\\${seed}", "a${", "${.}", "\\", "plain"])
def test_texts_are_literal(stored, text):
    assert composed(stored(name=text))["name"] == text


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"trainer__profiler": {"_target_": "lightning.pytorch.profilers.SimpleProfiler"}}, None),
        ({"trainer__strategy": {"_target_": "lightning.pytorch.strategies.DDPStrategy"}}, "not allowed"),
        ({"logger__wandb": {"_target_": "os.system", "project": "mine", "dir": "/"}}, None),
        ({"logger__mine": {"_target_": "lightning.pytorch.loggers.CSVLogger"}}, "logger.mine"),
        ({"callbacks__mine": {"_target_": "src.training.checkpoint.Checkpoints"}}, "callbacks.mine"),
        ({"callbacks__progress": 5}, "callbacks.progress"),
        ({"sampler__defaults": ["/hydra/x"]}, "sampler.defaults"),
        ({"model__base_channels": 1 << 20}, "model"),
        ({"model__blocks_per_level": 10**9}, "model"),
        ({"schedule": {"_target_": "torch.nn.modules.module.torch.load"}}, "not allowed"),
        ({"ema": {"_target_": "src.training.ema.torch.load"}}, "not allowed"),
        ({"data": "digits"}, "does not contain a configuration"),
        ({"sampler": nested(3)}, "does not contain a configuration"),
        ({"name": "x" * 2_000_000}, "does not contain a configuration"),
    ],
)
def test_what_a_stored_configuration_may_name(stored, options, word):
    path = stored(**options)
    if word:
        with pytest.raises(UserError, match=word) as error:
            composed(path)
        assert "\n" not in str(error.value)
        return
    config = composed(path)
    assert "profiler" not in config["trainer"]
    if config["logger"]:
        assert config["logger"]["wandb"]["_target_"] == "src.training.dashboard.Dashboard"
        assert config["logger"]["wandb"]["project"] == "mine"
        assert "dir" not in config["logger"]["wandb"]


def test_checkpoints_are_saved_unless_the_command_line_says_otherwise(stored):
    path = stored(callbacks={})
    assert composed(path)["callbacks"]["checkpoints"]["every"] == 1000
    assert "checkpoints" not in composed(path, "~callbacks.checkpoints")["callbacks"]


def test_the_cache_of_the_data_is_that_of_the_class(stored):
    folder = {"_target_": "src.data.image_folder.ImageFolder", "root": "/x", "image_size": 8, "channels": 1}
    content = torch.load(stored(data=folder | {"num_classes": 10, "cache": "/elsewhere"}), weights_only=True)
    assert read_config(content, Path("x.ckpt"))["data"]["cache"] == "~/.cache/diffusion-lab"


def test_folder_names_keep_what_differs():
    long = "a=" + "x" * 300
    first, second = folder_name(f"{long},seed=0"), folder_name(f"{long},seed=1")
    assert first != second
    assert max(len(first.encode()), len(second.encode())) <= LONGEST_NAME
    assert folder_name("seed=0,lr=1") == "seed-0_lr-1"
