"""A stored configuration is data: what it may name, and what comes from the command line instead."""

import os
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from src.app.build import resolve
from src.app.load import load_with
from src.app.options import CONF
from src.app.stored import CONTINUED, continue_with, read_config
from src.app.sweep.jobs import LONGEST_NAME, Sweep, folder_name
from src.app.sweep.jobs import composed as composition
from src.app.sweep.run import refuse_harmful, run_sweep
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
    continue_with(path, list(arguments))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve(compose(CONTINUED, list(arguments)), "config")


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


def test_a_stored_callback_of_another_package_can_be_left_out(stored):
    path = stored(callbacks__mine={"_target_": "lightning.pytorch.callbacks.EarlyStopping"})
    assert "mine" not in composed(path, "~callbacks.mine")["callbacks"]


def test_the_cache_of_the_data_is_that_of_the_class(stored):
    folder = {"_target_": "src.data.image_folder.ImageFolder", "root": "/x", "image_size": 8, "channels": 1}
    content = torch.load(stored(data=folder | {"num_classes": 10, "cache": "/elsewhere"}), weights_only=True)
    assert read_config(content, Path("x.ckpt"))["data"]["cache"] == "~/.cache/diffusion-lab"


def test_the_cache_of_a_text_encoder_is_that_of_the_class_and_its_folder_may_move(stored, monkeypatch):
    monkeypatch.setattr("src.app.stored._check_network", lambda *_: None)
    encoder = {"_target_": "src.data.text_encoder.Pretrained", "name": "minilm", "cache": "/elsewhere"}
    conditioning = {"_target_": "src.conditioning.ByText", "encoder": encoder, "dropout": 0.1}
    path = stored(conditioning=conditioning, codec={"_target_": "src.data.codec.Pixels"})
    content = torch.load(path, weights_only=True)
    del content["config"]["class_conditional"]
    found = read_config(content, path, "/moved")["conditioning"]["encoder"]
    assert found["cache"] == "~/.cache/diffusion-lab"
    assert found["name"] == "/moved"
    with pytest.raises(UserError, match="no text encoder"):
        read_config(torch.load(stored(conditioning=None), weights_only=True), path, "/moved")


def test_a_launcher_is_not_taken_from_a_run(stored):
    launcher = {"_target_": "src.app.sweep.cluster.Slurm"}
    assert composed(stored(launcher=launcher))["launcher"]["_target_"] == "src.app.sweep.launcher.Serial"


@pytest.mark.parametrize("kind", ["pipe", "foreign class", "nothing"])
def test_the_second_run_of_a_stored_guidance_is_checked_like_the_first(stored, tmp_path, kind):
    weak = tmp_path / "weak.ckpt"
    if kind == "pipe":
        os.mkfifo(weak)
    elif kind == "foreign class":
        stored(schedule={"_target_": "torch.nn.modules.module.torch.load"}).rename(weak)
    guidance = {"_target_": "src.diffusion.guidance.AutoGuidance", "_partial_": True, "run": str(weak)}
    path = stored(guidance=guidance | {"scale": 2.0})
    word = "not allowed" if kind == "foreign class" else r"guidance\.run=.*no such run"
    with pytest.raises(UserError, match=word):
        load_with(composition("sample", [f"run={path}"]))


@pytest.mark.parametrize(
    "option",
    [
        "hydra.run.dir=/elsewhere",
        "+hydra.callbacks.evil={_target_: os.makedirs, name: /elsewhere}",
        "+optimizer@_global_.hydra.callbacks.evil=adam",
        "experiment='../../evil'",
        "--config-dir=evil",
        "trust=[os]",
        "cache=/elsewhere",
        "data.cache=/elsewhere",
        "out=/elsewhere",
        "run=/elsewhere",
        "logger.tensorboard.name=../elsewhere",
        "+callbacks.mine={_target_: lightning.pytorch.callbacks.ModelCheckpoint}",
        "name=${oc.env:HOME}",
        "sampler._target_=os.system",
        "hparams_search.space={data.cache: /elsewhere}",
    ],
)
def test_stored_options_of_a_sweep_that_are_refused(option):
    with pytest.raises(UserError, match="not taken from a folder"):
        refuse_harmful(["seed=0,1", option], Path("sweep"))


def test_stored_options_of_a_sweep_that_are_kept():
    kept = ["runs=/a/b", "logger=csv", "seed=0,1", "weights=0.07,raw", "metrics=none", "data.root=/a"]
    refuse_harmful([*kept, "+metrics@metrics.fid=fid", "callbacks.checkpoints.every=10"], Path("sweep"))


def test_a_sweep_whose_job_is_a_link_to_elsewhere_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    sweep = Sweep("train", tmp_path / "sweep", ["seed=0,1"])
    sweep.write()
    sweep.jobs[1].folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="link out of"):
        run_sweep("train", [f"sweep={sweep.folder}"])
    assert not list((tmp_path / "elsewhere").iterdir())


def test_folder_names_keep_what_differs():
    long = "a=" + "ä" * 300
    first, second = folder_name(f"{long},seed=0"), folder_name(f"{long},seed=1")
    assert first != second
    assert max(len(first.encode()), len(second.encode())) <= LONGEST_NAME
    assert folder_name("seed=0,lr=1") == "seed-0_lr-1"
