"""Untrusted run folders: no code in them is executed, and a one-line error gives the reason."""

import os
import pickle
import shutil

import pytest
import torch

from src.runs.files import sidecar_path
from tests.faults import hostile
from tests.faults.processes import run, train

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
    return hostile.good_run(tmp_path_factory.mktemp("trained")) / hostile.STEP


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


CASES = list(hostile.cases())[5::24]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.kind}: {case.name[:60]}" for case in CASES])
def test_folders(tmp_path, trained, case):
    """A sample of the cases that `python -m tests.faults` runs."""
    assert hostile.problem(case, trained.parent.parent, tmp_path) is None


def test_a_case_that_does_harm_is_noticed(tmp_path, trained):
    """The harness itself."""
    good = trained.parent.parent
    outside = hostile.Case("places", "x", lambda *_: None, (*hostile.SAMPLE, "out=../outside/folder"))
    assert "changed outside" in hostile.problem(outside, good, tmp_path / "first")
    secret = hostile.Case("secrets", "x", hostile.text("notes", hostile.SECRET), hostile.SAMPLE)
    assert "secret in" in hostile.problem(secret, good, tmp_path / "second")


def test_callbacks_of_other_packages_are_given_again(tmp_path):
    """A resumed run takes none from its folder, says so, and prints a command that works."""
    stop = "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss}"
    first = train(tmp_path, stop, "trainer.max_steps=1", "metrics=none")
    assert first.status == 0, first.output
    assert "python -m src.train '+callbacks.stop={" in first.output
    refused = run(tmp_path, "train", "ckpt=last", "trainer.max_steps=2")
    assert refused.status == 2
    assert "callbacks.stop: lightning.pytorch.callbacks.EarlyStopping is not taken" in refused.output
    for argument in (stop, "~callbacks.stop"):
        done = run(tmp_path, "train", "ckpt=last", f"trainer.max_steps={2 + (argument != stop)}", argument)
        assert done.status == 0, done.output
