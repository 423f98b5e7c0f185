"""What a training step minimises and a validation step measures."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from src.data.stream import Batch
from src.diffusion.schedule import Cosine
from src.diffusion.time_sampling import Importance
from src.training.module import DiffusionModule

T = 8


class TimeItself(nn.Module):
    """A loss that is the time, whatever the image."""

    def __init__(self, time_sampling):
        super().__init__()
        self.time_sampling, self.denoiser = time_sampling, SimpleNamespace(schedule=Cosine(T))

    def forward(self, x0, t, eps, condition=None):
        return t.to(x0)


def test_the_preference_for_some_times_is_undone():
    # p_t ~ L_t is the estimate of least variance, none, of the mean loss over uniform times (T + 1)/2
    importance = Importance(bins=T, history=1, uniform=1e-6)
    times = torch.arange(1, T + 1, dtype=torch.float64)
    importance.update(times, times, Cosine(T))
    module = DiffusionModule(TimeItself(importance), lambda p: None, None, None, seed=0, batch_size=16)
    batch = Batch(torch.zeros(16, 1, 2, 2), torch.zeros(16, dtype=torch.long), torch.arange(16))
    assert module.training_step(batch, 0).item() == pytest.approx((T + 1) / 2, rel=1e-4)
