"""`devices=2`: two processes share the work of sampling and of evaluation, and give what one gives."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import QUICK, commands_in


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One short run."""
    tmp_path = tmp_path_factory.mktemp("devices")
    with pytest.MonkeyPatch.context() as patch:
        assert commands_in(tmp_path, patch)("train", *QUICK, "callbacks=none", "metrics=fd_digits") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def test_evaluation(command, run):
    options = [f"run={run}", "n=90", "batch_size=20", "sampler.steps=3", "metrics=[fd_digits,kd_digits]"]
    options += ["metrics.kd_digits.subset_size=40", "device=cpu"]
    records = []
    for devices in (1, 2):
        assert command("evaluate", *options, f"devices={devices}") == 0
        (path,) = (run / "scores").glob("*/scores.json")
        records.append(json.loads(path.read_text()))
        path.unlink()
    one, two = records
    assert set(one["scores"]) == {"fd_digits", "kd_digits", "kd_digits_std"}
    assert two["scores"] == pytest.approx(one["scores"], rel=1e-9)
    assert two["protocol"] == one["protocol"]


@pytest.mark.slow  # an evaluation samples too
def test_sampling(command, run, tmp_path):
    for devices in (1, 2):
        out = tmp_path / str(devices)
        options = [
            "n=10",
            "batch_size=3",
            "sampler.steps=3",
            "device=cpu",
            f"devices={devices}",
            f"out={out}",
        ]
        assert command("sample", f"run={run}", *options) == 0
        assert json.loads((out / "recipe.json").read_text())["network_evaluations"] == 3
    for path in sorted((tmp_path / "1" / "images").iterdir()):
        assert np.array_equal(Image.open(path), Image.open(tmp_path / "2" / "images" / path.name))
    assert len(list((tmp_path / "2" / "images").iterdir())) == 10
    assert (tmp_path / "1" / "grid.png").read_bytes() == (tmp_path / "2" / "grid.png").read_bytes()


@pytest.mark.parametrize(
    ("entry_point", "options", "words"),
    [
        ("sample", ["task=interpolate", "device=cpu"], "devices=2: Interpolate runs in one process"),
        (
            "evaluate",
            ["metrics=nll", "device=cpu"],
            "metrics: a likelihood is computed by itself, with devices=1",
        ),
        ("evaluate", ["device=meta"], "several processes need device=auto or cpu"),
        pytest.param(
            *("evaluate", ["metrics=kd_digits", "n=20", "device=cpu"], "subset_size"), marks=pytest.mark.slow
        ),
    ],
)
def test_what_two_processes_cannot_do_is_one_line(command, run, capfd, entry_point, options, words):
    assert command(entry_point, f"run={run}", "sampler.steps=2", *options, "devices=2") == 2
    error = capfd.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert words in line
    assert "Traceback" not in error
