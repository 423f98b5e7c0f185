"""Writes the files of docs/your_own.md outside the repository and runs its commands as printed."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "your_own.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if "mylab" in line]
SHORT = ["trainer=cpu", "logger=csv", "callbacks.sample_images.n=4", "callbacks.track_fidelity.n=20"]


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder with the page's package and, after the first command, its run."""
    folder = tmp_path_factory.mktemp("outside")
    for _, text in BLOCKS:
        if match := re.match(r"# (mylab/\S+)\n", text):
            file = folder / match[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as handle:
                handle.write(text)
    (folder / "mylab" / "__init__.py").write_text("")
    return folder


def run(outside, command: str, *more: str):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{outside}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "DIFFUSION_LAB_CACHE": str(outside / "cache"),
    }
    _, *arguments = shlex.split(command)
    return subprocess.run(
        [sys.executable, *arguments, *more],
        cwd=outside,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_page_has_a_command_for_each_entry_point():
    assert [command.split()[2] for command in COMMANDS] == [
        "src.train",
        "src.train",
        "src.sample",
        "src.evaluate",
    ]


def test_external_classes_are_trained_resumed_sampled_and_scored(outside):
    train, resume, sample, evaluate = COMMANDS
    for command, more in ((train, SHORT), (resume, []), (sample, ["device=cpu"]), (evaluate, ["device=cpu"])):
        done = run(outside, command, *more)
        assert done.returncode == 0, done.stderr
        if command == resume:
            # everything else is equal, but the effect of a user's callback is unknown
            assert (
                "resume      approximate from step 60 (callbacks.norm: mylab.parts.WeightNorm may"
                in done.stdout
            )
    folder = outside / "runs" / "stripes"
    assert (folder / "checkpoints" / "step_00000080.ckpt").is_file()
    (csv,) = (folder / "csv").rglob("version_0/metrics.csv")
    assert "train/weight_norm" in csv.read_text().splitlines()[0]
    (made,) = (folder / "samples").glob("*/recipe.json")
    recipe = json.loads(made.read_text())
    assert recipe["guidance"] == "Contrast(factor=1.2)"
    assert recipe["network_evaluations"] == 19  # two per step, one at the last step
    (record,) = (folder / "scores").glob("*/scores.json")
    assert set(json.loads(record.read_text())["scores"]) == {"brightness"}


@pytest.mark.parametrize(
    "name",
    ["src.train", *(pytest.param(name, marks=pytest.mark.slow) for name in ("src.sample", "src.evaluate"))],
)
def test_trust_is_not_read_from_the_run(outside, name):
    command = next(c for c in COMMANDS[1:] if c.split()[2] == name).replace("trust=[mylab] ", "")
    command = re.sub(r" sampler=midpoint| 'metrics=\[brightness\]'| '\+wrappers\.[^']*'", "", command)
    done = run(outside, command)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "error: " in done.stderr


def test_a_package_that_does_not_exist_is_named(outside):
    done = run(outside, "python -m src.train trust=[nosuchlab] trainer=cpu")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "trust=nosuchlab: cannot be imported" in done.stderr
