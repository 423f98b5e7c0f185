"""The evaluation of memorisation, on images whose truth is known."""

import json

import numpy as np
import pytest
import torch

from src.data.digits import Digits
from src.evaluation.memorisation import Memorisation, compare, embed, picture
from src.metrics.features import ClassifierFeatures
from tests.conftest import QUICK


@pytest.fixture(scope="module")
def memorisation():
    return Memorisation(ClassifierFeatures("digits"))


@pytest.fixture(scope="module")
def sets(memorisation):
    splits = [Digits().split(name) for name in ("train", "test", "validation")]
    return [embed(split.images(range(len(split))), memorisation.features) for split in splits]


def test_held_out_images_are_no_copies(memorisation, sets):
    train, held_out, fresh = sets
    scores, curve = compare(fresh, train, held_out, memorisation)
    for space in ("pixels", "digits"):
        assert scores[f"copied_{space}"] < 0.02
        assert 0.01 < scores[f"membership_p_{space}"] < 0.99
        assert 0.01 < scores[f"copying_p_{space}"] < 0.99
        assert scores[f"distance_train_{space}"] == pytest.approx(
            scores[f"distance_heldout_{space}"], rel=0.1
        )
        assert len(curve[f"ratio_{space}"]) == len(curve[f"nearest_{space}"]) == len(fresh)


def test_copies_are_found_with_the_image_that_was_copied(memorisation, sets):
    train, held_out, _ = sets
    noise = torch.randint(-8, 9, (600, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    copies = embed((train.pixels[:600].int() + noise).clamp(0, 255).byte(), memorisation.features)
    scores, curve = compare(copies, train, held_out, memorisation)
    assert scores["copied_pixels"] == 1
    assert max(scores["membership_p_pixels"], scores["copying_p_pixels"]) < 1e-6
    assert scores["distance_all_train_pixels"] < 0.3 * scores["distance_heldout_train_pixels"]
    assert curve["nearest_pixels"] == list(range(600))
    shown = picture(copies, train, held_out, np.array(curve["ratio_pixels"]), shown=4)
    assert shown.size[0] > shown.size[1]


def test_images_of_both_sets_are_not_compared(memorisation, sets):
    train, held_out, fresh = (each.pixels for each in sets)
    both = torch.cat([held_out, train[:200], train[:200]])
    found = compare(*(embed(each, memorisation.features) for each in (fresh, train, both)), memorisation)[0]
    expected = compare(
        *(embed(each, memorisation.features) for each in (fresh, train[200:], held_out)), memorisation
    )[0]
    assert found["membership_z_pixels"] == expected["membership_z_pixels"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"held_out": "train"}, "held_out=train: choose"),
        ({"threshold": 1.0}, "threshold must be"),
        ({"neighbours": 0}, "neighbours must be"),
        ({"cells": 0}, "cells must be"),
    ],
)
def test_bad_arguments(memorisation, arguments, message):
    with pytest.raises(ValueError, match=message):
        Memorisation(memorisation.features, **arguments)


def test_evaluate_writes_a_record_and_a_picture(command, tmp_path, capsys):
    assert command("train", *QUICK, "callbacks=none", "metrics=none", "trainer.max_steps=1") == 0
    (run,) = (tmp_path / "runs").iterdir()
    plain = (f"run={run}", "device=cpu", "n=20", "sampler.steps=2")
    assert command("evaluate", *plain, "metrics=[memorisation_digits]") == 0
    (folder,) = (run / "scores").glob("memorisation*")
    record = json.loads((folder / "scores.json").read_text())
    assert record["protocol"]["train"]["distinct"] <= record["protocol"]["train"]["images"] == 1504
    assert record["protocol"]["held_out"]["distinct"] <= record["protocol"]["held_out"]["images"]
    assert record["protocol"]["in_both"] >= 0
    assert record["protocol"]["recipe"]["steps"] == 2
    assert len(record["curve"]["ratio_digits"]) == 20
    assert 0 < len(record["curve"]["attractive_pixels"]) <= 20
    assert (folder / "nearest.png").is_file()
    capsys.readouterr()
    for options, message in (
        (["metrics=[memorisation_digits,fd_digits]"], "metrics: memorisation is computed by itself"),
        (["metrics=memorisation_digits", "bytes=truncate"], "bytes=truncate: has no effect on this metric"),
        (["metrics=memorisation_digits", "devices=2"], "metrics: memorisation is computed by itself"),
        (["metrics=memorisation_fashion_mnist"], "metrics: images for the features"),
        (["metrics=memorisation_digits", "metrics.neighbours=2000"], "metrics.neighbours=2000: there are"),
    ):
        assert command("evaluate", *plain, *options) == 2
        assert message in capsys.readouterr().err
