"""Classifiers of noisy images, for guidance."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.conditioning import NO_CLASS

from .denoiser import BaseDenoiser, Denoiser
from .noise_level import NoiseLevel
from .parameterization import Parameterization
from .schedule import Schedule
from .variance import Small


class NoiseClassifier(Denoiser):
    """p(class | x_t) = softmax(network(c_in x_t, label)), in place of a denoiser (Dhariwal & Nichol 2021, sec. 4).

    It has the schedule, the input scaling c_in and the label of a denoiser, so that it trains as one. It has no
    prediction of x0.

    Args:
        network: maps (c_in x_t, label of shape (B,)) to logits of shape (B, classes).
        schedule: the noise schedule the network is trained on.
        parameterization: gives c_in and the label; its target is not used.
    """

    makes_images = False

    def __init__(self, network: nn.Module, schedule: Schedule, parameterization: Parameterization):
        BaseDenoiser.__init__(self)  # without the checks of a denoiser's output
        self.network, self.schedule, self.parameterization = network, schedule, parameterization
        self.variance = Small()
        parameterization.check(schedule)

    def logits(self, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """Logits of the classes of noisy images (B, C, H, W), shape (B, classes)."""
        self._count(x_t)
        return self.evaluate(x_t, level)

    def gradient(self, x_t: Tensor, level: NoiseLevel, labels: Tensor) -> Tensor:
        """The gradient of ln p(labels | x_t) with respect to x_t, shape (B, C, H, W); 0 for images without a class.

        Args:
            x_t: noisy images, shape (B, C, H, W).
            level: one level for all images, or levels of shape (B,).
            labels: classes, int64, shape (B,).
        """
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            loss = F.cross_entropy(self.logits(x_t, level), labels, ignore_index=NO_CLASS, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x_t)
        return -gradient

    def forward(self, x_t, level, condition=None, to=None):
        raise ValueError("a classifier predicts classes, not images")
