"""Features and sums of the scores are computed on the device, without waiting before `compute`."""

import pytest
import torch

from src.evaluation.scores import ScoreSet
from src.metrics.features import ClassifierFeatures
from src.metrics.fidelity import Accuracy, FrechetDistance, KernelDistance, PrecisionRecall
from tests.device.lane import Float64Error, lane

SCORES = {
    "frechet": FrechetDistance,
    "kernel": lambda features: KernelDistance(features, subset_size=4),
    "precision_recall": PrecisionRecall,
    "accuracy": Accuracy,
}


def accumulated(device, make):
    """A set of one score on the device, which has seen two batches there."""
    scores = ScoreSet([make(ClassifierFeatures("digits"))], num_classes=2)
    scores.to("cuda")
    device.waits.clear()
    scores.reset()
    for size in (3, 2):
        scores.update(torch.zeros(size, 1, 8, 8, dtype=torch.uint8, device="cuda"), torch.arange(size) % 2)
    return scores


@pytest.mark.parametrize("make", SCORES.values(), ids=list(SCORES))
def test_accumulation_does_not_wait(make):
    with lane() as device:
        (score,) = accumulated(device, make).scores
        states = [getattr(score, name) for name in score.state_names]
        tensors = [tensor for state in states for tensor in (state if isinstance(state, list) else [state])]
        assert {tensor.device.type for tensor in tensors} == {"cuda"}
        assert device.waits == []


@pytest.mark.parametrize("name", [name for name in SCORES if name != "frechet"])
def test_accumulation_has_no_float64(name):
    with lane(float64=False) as device:
        accumulated(device, SCORES[name])


@pytest.mark.xfail(raises=Float64Error, strict=True, reason="the sums are float64, which MPS does not have")
def test_frechet_distance_has_no_float64_on_the_device():
    with lane(float64=False) as device:
        accumulated(device, FrechetDistance)
