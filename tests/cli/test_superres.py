"""Super-resolution through the command line: training, previews, scores and files."""

import json

import numpy as np
from PIL import Image

from tests.cli.test_bad_input import assert_one_line
from tests.conftest import QUICK


def test_superres(command, only_run, tmp_path, capsys):
    assert command("train", *QUICK, "conditioning=low_resolution", "conditioning.noise=0.1") == 0
    run = only_run()
    assert json.loads((run / "scores.json").read_text())["scores"]["fd_digits"] > 0
    base = ["sample", f"run={run}", "sampler.steps=3", "n=3"]
    assert command(*base, f"out={tmp_path}/drawn") == 0
    recipe = json.loads((tmp_path / "drawn" / "recipe.json").read_text())
    assert recipe["labels"].startswith("image i has the low resolution (1/2) of validation image i")
    assert command(*base, "task=superres", f"out={tmp_path}/test") == 0
    assert "psnr" in capsys.readouterr().out
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "small.png")
    file = f"task.images={tmp_path}/small.png"
    assert command(*base, "task=superres", file, f"out={tmp_path}/out") == 0
    (image,) = (tmp_path / "out" / "images").iterdir()
    assert np.asarray(Image.open(image)).shape == (8, 8)
    assert command(*base, "task=img2img", f"out={tmp_path}/edited") == 0
    assert command(*base, "task=upsample") == 2
    assert_one_line(capsys.readouterr().err, ["task=superres"])
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "small.png")
    assert command(*base, "task=superres", file) == 2
    assert_one_line(capsys.readouterr().err, ["8 x 8 pixels and must have 4 x 4"])


def test_a_factor_that_does_not_divide_is_refused(command, capsys):
    assert command("train", *QUICK, "conditioning=low_resolution", "conditioning.factor=3") == 2
    assert_one_line(capsys.readouterr().err, ["conditioning.factor=3 must divide", "8 x 8"])
