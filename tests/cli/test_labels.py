"""Classes of sampled images, and scores of each class, from the command line."""

import json

import numpy as np
import pytest
from PIL import Image

from src.evaluation.record import Record
from tests.cli.test_bad_input import assert_one_line
from tests.conftest import QUICK, commands_in


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short class-conditional run, shared by all tests of this file."""
    tmp_path = tmp_path_factory.mktemp("conditional")
    with pytest.MonkeyPatch.context() as patch:
        options = ["conditioning=class", "callbacks=none", "labels=random"]
        assert commands_in(tmp_path, patch)("train", *QUICK, *options) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def test_classes_of_samples(command, run, tmp_path, capsys):
    def recipe(*options):
        assert (
            command("sample", f"run={run}", "n=12", "sampler.steps=1", *options, f"out={tmp_path}/out") == 0
        )
        return json.loads((tmp_path / "out" / "recipe.json").read_text())["labels"]

    def classes():
        return capsys.readouterr().out.partition("classes     ")[2].splitlines()[0].strip()

    assert recipe("labels=[3,5,5]") == "image i has entry i mod 3 of [3, 5, 5]"
    assert classes() == "columns: 3, 5, 5"
    narrow = Image.open(tmp_path / "out" / "grid.png")
    assert np.isclose(narrow.height / narrow.width, (4 * 9 + 1) / (3 * 9 + 1)), "a column for each entry"
    assert recipe("labels='7'") == "image i has entry i mod 1 of [7]", "a class by its name"
    assert classes() == "class: 7"
    assert "drawn" in recipe(), "without the option, the classes are as in training"
    assert recipe("labels=balanced") == "image i has label i mod 10"


@pytest.mark.parametrize("task", ["img2img", "inpaint"])
def test_files_take_classes_and_images_of_the_data_keep_theirs(command, run, tmp_path, capsys, task):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    base = [f"run={run}", f"task={task}", "sampler.steps=2", "n=2", f"out={tmp_path}/out"]

    def recorded(*options):
        assert command("sample", *base, *options) == 0
        return json.loads((tmp_path / "out" / "recipe.json").read_text())["labels"]

    assert recorded(f"task.images={tmp_path}/a.png", "labels=3") == "image i has entry i mod 1 of [3]"
    assert recorded() == "image i has its own condition"
    assert command("sample", *base, "labels=3") == 2
    assert_one_line(capsys.readouterr().err, ["labels=3", "leave labels out, or give files in task.images"])


def test_scores_of_each_class(command, run, capsys):
    options = [f"run={run}", "n=20", "sampler.steps=1", "per_class=true", "labels=[3,5]"]
    assert command("evaluate", *options, "metrics=accuracy_digits") == 0
    (path,) = (run / "scores").glob("*/scores.json")
    record = Record.read(path)
    names = ["accuracy_digits", "accuracy_digits/class_3", "accuracy_digits/class_5"]
    assert list(record.scores) == names
    whole, three, five = record.scores.values()
    assert whole == pytest.approx((three + five) / 2)
    assert record.protocol["recipe"]["labels"] == "image i has entry i mod 2 of [3, 5]"
    assert record.protocol["per_class"]["accuracy_digits"]["5"] == {"num_images": 10, "reference": None}
    capsys.readouterr()
    assert command("evaluate", *options, "metrics=fd_digits") == 2
    assert_one_line(capsys.readouterr().err, ["fd_digits of class 3", "at least 65", "n=20", "per_class"])
