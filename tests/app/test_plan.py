"""What a training would cost."""

import pytest
from omegaconf import OmegaConf

from src.app.plan import measured, span
from src.app.sweep.jobs import composed
from tests.conftest import QUICK


def test_lengths_of_time_have_fitting_units():
    assert [span(hours) for hours in (0.001, 0.1, 1.4, 12.345)] == ["4 s", "6.0 min", "84.0 min", "12.35 h"]


def test_a_cost_counts_steps_validations_previews_and_scores():
    config = composed("train", [*QUICK, "trainer.max_steps=1000", "validate_every=1000"])
    OmegaConf.set_struct(config, False)
    config.pop("hydra")
    cost = measured(config)
    assert cost.parameters > 1000
    assert cost.flops > 2 * cost.parameters  # each weight of a convolution is used for many pixels
    assert cost.steps == pytest.approx(cost.step * 1000 / 3600)
    assert 0 < cost.validations < cost.steps
    assert min(cost.previews, cost.scores, cost.memory, cost.disk) > 0
    # previews and scores every 20 steps, 50 times
    assert cost.hours > cost.steps + cost.previews
