"""Untrusted checkpoints: no code in them is executed, and a one-line error gives the reason."""

import os
import pickle
import shutil

import pytest
import torch
import yaml

from src.app.overrides import OVERRIDES_FILE
from src.runs.files import sidecar_path
from tests.faults.processes import ROOT, run, run_folder, train

# Targets in a stored configuration. Each would create a file "marker" in the working directory.
TARGETS = {
    "os.system": {"command": "touch marker"},
    "subprocess.run": {"args": ["touch", "marker"]},
    "builtins.open": {"file": "marker", "mode": "w"},
    "builtins.exec": {"object": "open('marker', 'w')"},
    "os.makedirs": {"name": "marker"},
    "pathlib.Path.touch": {"self": "marker"},
    "torch.load": {"f": "evil.pickle", "weights_only": False},
    "torch.nn.modules.module.torch.load": {"f": "evil.pickle", "weights_only": False},
    "torch.optim.adam.torch.load": {"f": "evil.pickle", "weights_only": False},
    "lightning.pytorch.trainer.trainer.os.system": {"command": "touch marker"},
    "src.runs.machine.subprocess.run": {"args": ["touch", "marker"]},
    "src.runs.files.write_json": {"path": "marker", "content": 1},
}
SLOTS = ("model", "schedule")


class Evil:
    def __reduce__(self):
        return os.system, ("touch marker",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert train(folder, "trainer.max_steps=1", "metrics=none").status == 0
    return run_folder(folder) / "checkpoints" / "step_00000001.ckpt"


def refused(tmp_path, content):
    torch.save(content, tmp_path / "untrusted.ckpt")
    (tmp_path / "evil.pickle").write_bytes(pickle.dumps(Evil()))
    for command in (["sample", "run=untrusted.ckpt"], ["evaluate", "run=untrusted.ckpt"]):
        done = run(tmp_path, *command)
        assert done.status == 2, done.output
        lines = [line for line in done.output.splitlines() if line.strip()]
        assert len(lines) == 1, done.output
        assert lines[0].startswith("error: ")
    assert not (tmp_path / "marker").exists()
    return lines[0]


@pytest.mark.parametrize("target", TARGETS)
def test_target_in_a_stored_configuration(tmp_path, trained, target):
    content = torch.load(trained, weights_only=True)
    slot = SLOTS[len(target) % 2]
    content["config"][slot] = {"_target_": target, **TARGETS[target]}
    line = refused(tmp_path, content)
    assert f"{slot}._target_={target}" in line
    assert "not allowed" in line


@pytest.mark.parametrize("slot", ["channel_multipliers", "dropout"])
def test_target_where_no_object_is_allowed(tmp_path, trained, slot):
    """Also an allowed class is built only where an object of its kind is expected."""
    content = torch.load(trained, weights_only=True)
    content["config"]["model"][slot] = {"_target_": "lightning.pytorch.Trainer", "default_root_dir": "marker"}
    assert f"model.{slot}._target_=lightning.pytorch.Trainer" in refused(tmp_path, content)


@pytest.mark.parametrize(
    ("option", "choice"), [("data.root", "data=image_folder"), ("+logger.wandb.anything", "logger=wandb")]
)
def test_target_for_a_text_or_an_unknown_setting(tmp_path, option, choice):
    command = train(
        tmp_path, choice, f"{option}={{_target_: lightning.pytorch.Trainer}}", WANDB_MODE="offline"
    )
    assert command.status == 2, command.output
    assert f"{option.lstrip('+')}._target_=lightning.pytorch.Trainer" in command.output.splitlines()[-1]


@pytest.mark.parametrize("entry", ["state_dict", "config", "callbacks", "origin"])
def test_object_in_a_checkpoint(tmp_path, trained, entry):
    content = torch.load(trained, weights_only=True)
    content[entry] = Evil()
    assert "untrusted.ckpt" in refused(tmp_path, content)


def test_resuming_executes_no_code(tmp_path, trained):
    place = tmp_path / "runs" / "untrusted"
    shutil.copytree(trained.parent.parent, place)
    checkpoint = place / "checkpoints" / trained.name
    content = torch.load(checkpoint, weights_only=True)
    content["origin"] = Evil()
    torch.save(content, checkpoint)
    sidecar_path(checkpoint).unlink()
    assert run(tmp_path, "train", f"ckpt={place}", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="0").status == 2
    assert not (tmp_path / "marker").exists()


# Stored overrides with which Hydra would create the file "marker" or read files outside the run.
LINES = {
    "a callback": "+hydra.callbacks.evil={_target_: os.makedirs, name: marker}",
    "a forced callback": "++hydra.callbacks.evil={_target_: os.makedirs, name: marker}",
    "a log file": "hydra.job_logging.handlers.file.filename=marker",
    "a log handler": "+hydra.job_logging.handlers.evil={class: logging.FileHandler, filename: marker}",
    "a deletion": "~hydra.callbacks",
    "a group of Hydra's": "hydra/job_logging=none",
    "a group moved into hydra": "+optimizer@hydra.callbacks.evil=adam",
    "a group moved into hydra via _global_": "+optimizer@_global_.hydra.callbacks.evil=adam",
    "a file outside conf/": "experiment={folder}/evil",
    "the same, quoted": "experiment='{folder}/evil'",
    "a flag": "--config-dir={folder}",
    "trust": "trust=[os]",
    "a file outside conf/ as a new group": "+newgroup=../../evil",
    "not a string": 5,
}
EVIL = "# @package _global_\nhydra:\n  callbacks:\n    evil: {_target_: os.makedirs, name: marker}\n"


@pytest.mark.parametrize("case", LINES)
def test_stored_options_do_not_reach_hydra(tmp_path, trained, case):
    place = tmp_path / "runs" / "untrusted"
    shutil.copytree(trained.parent.parent, place)
    (place / "evil.yaml").write_text(EVIL)
    line = LINES[case]
    if isinstance(line, str):
        line = line.replace("{folder}", os.path.relpath(place, ROOT / "conf" / "experiment"))
    file = place / OVERRIDES_FILE
    file.write_text(yaml.safe_dump([*yaml.safe_load(file.read_text()), line]))
    done = run(tmp_path, "train", "ckpt=last", "trainer.max_steps=2")
    assert not (tmp_path / "marker").exists()
    assert done.status == 2, done.output
    assert "is not allowed in stored options" in done.output
    assert len(done.output.strip().splitlines()) == 1
