"""A run folder of release 0.1, which had other package paths, is sampled, scored and resumed with unchanged results.

`expected.json` holds the results of that release.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.app.stored import upgrade

FOLDER = Path(__file__).parent / "earlier_run"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture
def run(tmp_path):
    """A copy of the run folder."""
    return shutil.copytree(FOLDER, tmp_path / "run")


def test_images(command, run, tmp_path):
    options = ["n=6", "sampler=ddpm", "sampler.steps=5", "device=cpu", f"out={tmp_path}/out"]
    assert command("sample", f"run={run}", *options) == 0
    images = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out" / "images").iterdir())]
    expected = np.array(EXPECTED["bytes of n=6 sampler=ddpm sampler.steps=5"])
    assert (np.stack(images).ravel() == expected).mean() > 0.98  # rounding differs between CPUs


def test_score(command, run):
    assert command("evaluate", f"run={run}", "n=50", "sampler.steps=5", "device=cpu") == 0
    (path,) = (run / "scores").glob("*/scores.json")
    expected = EXPECTED["scores of n=50 sampler.steps=5"]
    assert json.loads(path.read_text())["scores"] == pytest.approx(expected, rel=1e-4)


def test_resumed_training_equals_an_uninterrupted_one(command, run, capsys):
    assert command("train", f"ckpt={run}", "trainer.max_steps=30") == 0
    assert "resume      " in capsys.readouterr().out
    content = torch.load(run / "checkpoints" / "step_00000030.ckpt", weights_only=True)
    raw = content["state_dict"]["loss.denoiser.network.conv_out.weight"]
    averaged = content["callbacks"]["EMA"]["weights"]["conv_out.weight"]
    for weight, name in ((raw, "conv_out at step 30"), (averaged, "average of conv_out at step 30")):
        torch.testing.assert_close(weight.flatten(), torch.tensor(EXPECTED[name]), rtol=1e-3, atol=1e-6)
    assert content["config"]["conditioning"]["_target_"] == "src.conditioning.ByClass"


def test_configuration_is_upgraded():
    stored = torch.load(next(FOLDER.glob("checkpoints/*.ckpt")), weights_only=True)["config"]
    before = json.dumps(stored)
    config = upgrade(stored)
    assert json.dumps(stored) == before
    assert "class_conditional" not in config
    assert config["conditioning"] == {
        "_target_": "src.conditioning.ByClass",
        "num_classes": 10,
        "dropout": 0.0,
    }
    assert config["codec"] == {"_target_": "src.data.codec.Pixels"}
    assert "out_channels" not in config["model"]
    assert upgrade(config) == config
