"""Images that are wider than high go through data, network, sampling, grid and score, and are resumed."""

import json

import numpy as np
import pytest
from PIL import Image

HEIGHT, WIDTH = 8, 16
SMALL = [
    "model.base_channels=8",
    "model.groups=4",
    "batch_size=8",
    "sampler.steps=3",
    "trainer=cpu",
    "logger=csv",
]
PIXELS = [
    "trust=[tests]",
    "metrics=fd_digits",
    "metrics.features._target_=tests.metrics.pixels.PixelFeatures",
]
PIXELS += ["~metrics.features.weights", f"+metrics.features.pixels={HEIGHT * WIDTH}"]


@pytest.fixture
def pictures(tmp_path):
    """Forty grey pictures, brighter on the right."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(40):
        pixels = np.linspace(0, 200, WIDTH)[None] + random.integers(0, 55, (HEIGHT, WIDTH))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def test_the_whole_way(command, only_run, pictures, tmp_path):
    data = [
        "data=image_folder",
        f"data.root={pictures}",
        f"data.image_size=[{HEIGHT},{WIDTH}]",
        "data.channels=1",
    ]
    data += [f"data.cache={tmp_path}/cache"]
    callbacks = ["callbacks.sample_images.n=4", "callbacks.track_fidelity.n=10", "trainer.max_steps=2"]
    assert command("train", *data, *SMALL, *PIXELS, *callbacks) == 0
    run = only_run()
    assert "fd_pixels" in json.loads((run / "scores.json").read_text())["scores"]
    preview = Image.open(run / "samples" / "step_00000002.png")
    assert preview.width / preview.height == pytest.approx((2 * WIDTH + 3) / (2 * HEIGHT + 3), rel=0.02)

    assert command("train", "trust=[tests]", f"ckpt={run}", "trainer.max_steps=3") == 0
    moved = pictures.rename(tmp_path / "moved")
    options = ["trust=[tests]", f"run={run}", "device=cpu", "sampler.steps=2"]
    assert command("sample", *options, "n=3", f"out={tmp_path}/out") == 0
    assert Image.open(tmp_path / "out" / "images" / "000000.png").size == (WIDTH, HEIGHT)
    # the reference set and the images to edit are where the data lie now
    assert command("evaluate", *options, "n=10", f"data.root={moved}") == 0
    edited = [f"data.root={moved}", "task=img2img", "task.split=train", "n=2", f"out={tmp_path}/edited"]
    assert command("sample", *options, *edited) == 0


def test_data_that_have_moved_are_named(command, only_run, pictures, capsys):
    data = [
        "data=image_folder",
        f"data.root={pictures}",
        "data.image_size=8",
        "data.channels=1",
        "metrics=none",
    ]
    assert command("train", *data, *SMALL, "trainer.max_steps=1", "callbacks=none") == 0
    run = only_run()
    pictures.rename(pictures.with_name("moved"))
    capsys.readouterr()
    assert command("evaluate", f"run={run}", "metrics=nll", "device=cpu") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"data.root={pictures}" in line
    assert command("evaluate", f"run={run}", "metrics=nll", "device=cpu", "data.holdout=0.1") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "data.holdout: no such option" in line
