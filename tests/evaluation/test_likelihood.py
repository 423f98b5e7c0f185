"""The record of a likelihood."""

from types import SimpleNamespace

import pytest
import torch

from src.evaluation.likelihood import Likelihood, score_likelihood


class Known(Likelihood):
    """The bits of an image are its first value and 1."""

    def terms(self, denoiser, x0, condition, noise):
        yield x0[:, 0, 0, 0]
        yield torch.ones(len(x0))

    def values(self, summands):
        return {"bits": summands.sum(dim=0)}


def run_with(images):
    """What is read of a run with these images."""
    source = SimpleNamespace(
        name="known", prepare=lambda: None, split=lambda name: images, fingerprint=lambda name: "ab"
    )
    return SimpleNamespace(
        source=source,
        recipe=SimpleNamespace(wrappers=()),
        denoiser=None,
        data=lambda split, chosen: (images[list(chosen)], None),
        record=lambda evaluations: {"training_steps": 1, "weights": "raw", "ema_decay": None},
    )


def test_a_score_is_a_mean_with_its_standard_error():
    images = torch.tensor([1.0, 2.0, 3.0, 6.0]).reshape(4, 1, 1, 1)
    record = score_likelihood(run_with(images), Known(), n=10, batch_size=3, seed=0)
    assert record.scores == {"bits": 4.0}
    deviation = (14 / 3) ** 0.5  # of 1, 2, 3, 6: squares 4 + 1 + 0 + 9 over 3
    assert record.intervals["bits"] == pytest.approx(
        [4 - 1.959964 * deviation / 2, 4 + 1.959964 * deviation / 2]
    )
    assert record.curve == {"bits_per_dim": [3.0, 1.0]}
    assert score_likelihood(run_with(images[:1]), Known(), 1, 1, 0).intervals is None
