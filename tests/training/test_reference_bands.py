"""Reference bands: calibration on runs with a known distribution, and the callback."""

import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src.runs.files import Damaged
from src.training.callbacks import ReferenceBands
from src.training.reference_bands import Band, Mistake, fit_curves, largest_z, limit_of

STEPS = range(10, 210, 10)


def correct(seed, shift=0.0, name="level_0"):
    """A run whose values are log-normal around a falling curve, with an offset of its own; ln is shifted in `name`."""
    rng = np.random.default_rng(seed)
    own = 0.02 * rng.normal()
    runs = {
        level: {k: math.exp(-k / 100 + own + 0.05 * rng.normal()) for k in STEPS}
        for level in ("level_0", "level_1")
    }
    runs[name] = {k: value * math.exp(shift) for k, value in runs[name].items()}
    return runs


def band_of(runs, **changes):
    content = {
        "recipe": {"batch_size": 4},
        "scoring": {},
        "every": 10,
        "images": 4,
        "seeds": len(runs),
        "limit": limit_of(runs),
        "alarms": (0, 0),
        "curves": fit_curves(runs),
        "mistakes": {},
        "command": "",
    }
    return Band(**content | changes)


def test_curves_have_the_moments_of_the_logarithm():
    curves = fit_curves([correct(k) for k in range(400)])
    curve = curves["level_0"]
    assert curve["steps"] == list(STEPS)
    np.testing.assert_allclose(curve["mean"], [-k / 100 for k in STEPS], atol=0.01)
    np.testing.assert_allclose(curve["deviation"], (0.02**2 + 0.05**2) ** 0.5, rtol=0.1)
    spread = np.log(curve["high"]) - np.log(curve["low"])
    np.testing.assert_allclose(spread, 2 * 1.645 * (0.02**2 + 0.05**2) ** 0.5, rtol=0.25)


def test_a_correct_run_rarely_has_any_alarm_and_a_shifted_one_has():
    alarms = found = 0
    for k in range(10):
        runs = [correct(100 * k + i) for i in range(20)]
        curves, limit = fit_curves(runs), limit_of(runs)
        alarms += sum(largest_z(curves, correct(100 * k + 50 + i)) > limit for i in range(10))
        found += largest_z(curves, correct(100 * k + 99, shift=0.4)) > limit
    assert alarms <= 8  # of 100
    assert found == 10


def test_causes_are_those_with_the_same_pattern():
    band = band_of([correct(k) for k in range(20)])
    for name, where, shift in (("a", "level_0", 0.5), ("b", "level_1", 0.5), ("c", "level_1", -0.5)):
        values = correct(50, shift, where)
        shifts = {
            n: {str(k): band.shift(n, k, v)[0] for k, v in steps.items()} for n, steps in values.items()
        }
        band.mistakes[name] = Mistake(cause=f"cause {name}", shift=shifts)
    assert band.causes(correct(51, 1.0, "level_1"))[0][0] == "cause b"
    assert band.causes(correct(52, -0.3, "level_1"))[0][0] == "cause c"
    assert band.causes({"level_0": {10: 1.0}, "other": {10: 1.0}}) is not None


def test_a_band_is_read_as_it_was_written(tmp_path):
    band = band_of([correct(k) for k in range(5)])
    band.write(tmp_path / "band.json")
    again = Band.read(tmp_path / "band.json")
    assert again.recipe == band.recipe
    assert again.limit == pytest.approx(band.limit, rel=1e-3)
    assert again.z("level_0", 50, 1.0) == pytest.approx(band.z("level_0", 50, 1.0), abs=0.05)
    assert again.z("level_0", 55, 1.0) is None
    assert again.z("level_0", 50, math.nan) is None
    path = tmp_path / "band.json"
    path.write_text(path.read_text().replace('"every": 10', '"every": 20'))
    with pytest.raises(Damaged):
        Band.read(path)


class Trainer(SimpleNamespace):
    """What the callback reads of a trainer."""

    def __init__(self):
        strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
        super().__init__(
            global_step=0, max_steps=100, world_size=1, is_global_zero=True, strategy=strategy, callbacks=[]
        )


def train(callback, first, last, loss=1.0, batch=4):
    """Steps first + 1 ... last with losses exp(-step / 100) times `loss`, all at the least noise."""
    trainer, module = Trainer(), SimpleNamespace(device=torch.device("cpu"), gradient_norm=torch.tensor(1.0))
    trainer.global_step = first
    callback.on_train_start(trainer, module)
    for step in range(first + 1, last + 1):
        trainer.global_step = step
        losses = torch.full((batch,), loss * math.exp(-10 * math.ceil(step / 10) / 100))
        outputs = {"losses": losses, "times": torch.zeros(batch)}
        callback.on_train_batch_end(trainer, module, outputs, None, step)
    return trainer


@pytest.fixture
def callback(tmp_path):
    def make():
        return ReferenceBands(band_of([correct(k) for k in range(20)]), "tiny", tmp_path)

    return make


def test_the_first_departure_warns_once_and_all_are_recorded(callback, tmp_path, caplog):
    bands = callback()
    with caplog.at_level(logging.WARNING):
        train(bands, 0, 20)
        assert not bands.departures
        assert not (tmp_path / "bands.json").exists()
        train(bands, 20, 50, loss=2.0)
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith(
        "bands: step 30: the loss at noise level 1 of 8 (least noise) is 1.48; the band tiny has 0."
    )
    assert "Likely: none of the known mistakes" in text
    assert text.endswith(f"The training continues; {tmp_path / 'bands.json'} lists all")
    content = json.loads((tmp_path / "bands.json").read_text())
    assert [each["step"] for each in content["departures"]] == [30, 40, 50]
    # a resumed training does not warn again, and leaves out the window that it enters in its middle
    again = callback()
    again.load_state_dict(bands.state_dict())
    with caplog.at_level(logging.WARNING):
        train(again, 55, 60, loss=2.0)
        assert len(again.departures) == 3
        train(again, 60, 70, loss=2.0)
    assert len(again.departures) == 4
    assert len(caplog.records) == 1


def test_another_number_of_images_per_step_is_reported(callback, caplog):
    with caplog.at_level(logging.WARNING):
        train(callback(), 0, 10, batch=2)
    assert (
        "the number of images per step is 2; the band tiny has 4. Likely: batch_size is over all"
        in caplog.text
    )


def test_validation_compares_the_averaged_weights_with_the_raw_ones(callback):
    bands = callback()
    trainer = train(bands, 0, 10)
    trainer.callback_metrics = {"val/loss": torch.tensor(0.5), "val/loss_ema": torch.tensor(0.4)}
    bands.on_validation_end(trainer, None)
    assert bands.values["ema_gain"] == pytest.approx({10: 0.8})
    trainer.callback_metrics = {"val/loss": torch.tensor(0.5)}
    bands.on_validation_end(trainer, None)
    assert bands.values["ema_gain"] == {10: 1.0}
    trainer.callback_metrics = {}
    bands.on_validation_end(trainer, None)


def test_without_a_band_values_are_collected(tmp_path):
    bands = ReferenceBands(None, "none", tmp_path, every=10)
    train(bands, 0, 20)
    assert bands.values["level_0"] == pytest.approx({10: math.exp(-0.1), 20: math.exp(-0.2)})
    assert set(bands.values) == {"level_0", "gradient_norm", "images"}
