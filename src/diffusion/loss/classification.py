"""The loss of a classifier of noisy images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from src.conditioning import NO_CLASS, Condition

from ..classifier import NoiseClassifier
from ..forward import diffuse
from ..time_sampling import TimeSampling
from .base import TimedLoss

# Accuracy is reported by quarters of the schedule's range, as the training loss; quarter 0 has the least noise.
QUARTERS = 4


class ClassificationLoss(TimedLoss):
    """The cross-entropy -ln p(class | x_t) in nats; 0 for images without a class (Dhariwal & Nichol 2021, sec. 4).

    Args:
        denoiser: the classifier that is trained.
        time_sampling: the distribution of times.

    Raises:
        ValueError: `denoiser` is no classifier.
    """

    measures = ("accuracy", *(f"accuracy_q{quarter}" for quarter in range(QUARTERS)))

    def __init__(self, denoiser: NoiseClassifier, time_sampling: TimeSampling):
        super().__init__(denoiser, time_sampling)
        if not isinstance(denoiser, NoiseClassifier):
            raise ValueError("denoiser must be a NoiseClassifier")

    def forward(self, x0, draws, eps, condition=None):
        labels = _labels(condition)
        return F.cross_entropy(
            self._logits(x0, draws, eps), labels, ignore_index=NO_CLASS, reduction="none"
        ).to(x0.dtype)

    def measure(self, x0, draws, eps, condition=None):
        labels = _labels(condition)
        correct = (self._logits(x0, draws, eps).argmax(dim=1) == labels).to(x0.dtype)
        correct = correct.masked_fill(labels == NO_CLASS, torch.nan)
        quarters = (self.quantile(draws) * QUARTERS).long().clamp(0, QUARTERS - 1).to(labels.device)
        of_quarters = {f"accuracy_q{q}": correct.where(quarters == q, torch.nan) for q in range(QUARTERS)}
        return {"accuracy": correct, **of_quarters}

    def _logits(self, x0: Tensor, draws: Tensor, eps: Tensor) -> Tensor:
        level = self.denoiser.schedule(draws)
        return self.denoiser.logits(diffuse(x0, eps, level), level)


def _labels(condition: Condition | None) -> Tensor:
    if condition is None or condition.labels is None:
        raise ValueError("a classifier is trained on classes: choose conditioning=class")
    return condition.labels
