"""The bands that come with the project, and which training is compared with them."""

import json
from functools import cache

import pytest
import torch

from benchmarks.bands import injected, label_injections
from src.app.bands import bands_of, recipe_of_losses, recipe_of_scores
from src.data.source import InMemoryImages
from src.data.stream import FixedOrder, TrainingStream
from src.errors import UserError
from src.training.reference_bands import FOLDER, Band
from tests.conftest import commands_in
from tests.test_conf import composed

NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


@cache
def config_of(*overrides):
    return composed("train", *overrides)


def name_of(tmp_path, *overrides):
    found = bands_of(config_of(*overrides), tmp_path)
    return found and (found.name, found.scores)


@pytest.mark.parametrize("name", NAMES)
def test_short_recipe_is_compared_by_its_scores_too(tmp_path, name):
    assert name_of(tmp_path, f"experiment={name}_short") == (name, True)


def test_label_mistakes_change_the_labels_and_nothing_else():
    pixels, labels = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1), torch.arange(12) % 10
    images = InMemoryImages(pixels, labels)
    sets = (TrainingStream(images, 0, 4, horizontal_flip=False), FixedOrder(images))
    right = [each.__getitems__(range(4)) for each in sets]
    for name, injection in label_injections().items():
        with injected(injection):
            wrong = [each.__getitems__(range(4)) for each in sets]
        for place, before, after in zip(("training", "validation"), right, wrong, strict=True):
            assert torch.equal(before.images, after.images)
            own = before.condition.labels
            moved = (own + 1) % 10 if "+ 1" in name else own.roll(1)
            changed = place == "training" or "everywhere" in name
            assert torch.equal(after.condition.labels, moved if changed else own)


@pytest.mark.parametrize("name", NAMES)
def test_stored_band_is_of_the_recipe_that_is_shipped(name):
    """If it fails because the recipe has changed: python -m benchmarks.bands <name>."""
    band, config = Band.read(FOLDER / f"{name}.json"), config_of(f"experiment={name}_short")
    assert band.recipe == recipe_of_losses(config)
    assert band.scoring == recipe_of_scores(config)
    assert band.images == config.batch_size
    score = f"fd_{name.removesuffix('_class')}"
    assert {"level_0", "level_7", "gradient_norm", "val_loss_ema", "ema_gain", score} <= set(band.curves)
    assert band.alarms == (0, 5 if name.endswith("_class") else 20)


@pytest.mark.parametrize(("name", "by_step"), [("digits", {20: 8, 100: 19}), ("digits_class", {100: 4})])
def test_stored_mistakes_leave_the_band_in_time(name, by_step):
    """As in docs/results.md; the number of images per step, which is not stored, catches one more at step 20."""
    band = Band.read(FOLDER / f"{name}.json")
    first = []
    for mistake in band.mistakes.values():
        outside = [
            int(step)
            for value, shifts in mistake["shift"].items()
            for step, shift in shifts.items()
            if abs(shift)
            > band.limit * band.curves[value]["deviation"][band.curves[value]["steps"].index(int(step))]
        ]
        first += [min(outside)] if outside else []
    for step, number in by_step.items():
        assert sum(each <= step for each in first) >= number


def test_default_training_is_compared_by_its_losses(tmp_path):
    assert name_of(tmp_path) == ("digits", False)


@pytest.mark.parametrize(
    "same", ["seed=7", "trainer.max_steps=77", "trainer.devices=2", "workers=1", "name=a"]
)
def test_what_a_band_tolerates(tmp_path, same):
    assert name_of(tmp_path, same) == ("digits", False)


def test_a_training_from_other_weights_is_not_compared(tmp_path):
    assert name_of(tmp_path, "init=some/run") is None
    assert name_of(tmp_path, "init=some/run", "bands=digits") == ("digits", False)


@pytest.mark.parametrize(
    "other", ["optimizer.lr=0.002", "batch_size=32", "schedule=linear", "model.dropout=0.1", "ema.decay=0.99"]
)
def test_another_recipe_is_compared_on_request_only(tmp_path, other):
    assert name_of(tmp_path, other) is None
    assert name_of(tmp_path, other, "bands=digits") == ("digits", False)


def test_none_and_an_unknown_band(tmp_path):
    assert name_of(tmp_path, "bands=none") is None
    with pytest.raises(UserError, match=f"^bands=digit: choose auto, none, {', '.join(NAMES)}$"):
        bands_of(config_of("bands=digit"), tmp_path)


def test_a_mistake_is_reported_in_training(tmp_path, monkeypatch, capsys):
    plain = ("trainer=cpu", "logger=csv", "callbacks=none", "metrics=none", "trainer.max_steps=40")
    assert commands_in(tmp_path, monkeypatch)("train", *plain, "optimizer.lr=0.01", "bands=digits") == 0
    printed = capsys.readouterr().out
    assert "band        digits: losses by noise level of" in printed
    assert printed.count("bands: step") == 1
    (run,) = (tmp_path / "runs").iterdir()
    assert "band" in printed.partition("Done.")[2]
    content = json.loads((run / "bands.json").read_text())
    assert content["departures"][0]["step"] <= 40
    assert content["causes"]
