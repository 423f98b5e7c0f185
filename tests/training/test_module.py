"""What a training step minimises and a validation step measures."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from src.data.stream import Batch
from src.diffusion.denoiser import Denoiser
from src.diffusion.loss import DenoisingLoss
from src.diffusion.parameterization import V
from src.diffusion.schedule import Cosine
from src.diffusion.time_sampling import Importance, Uniform
from src.diffusion.weighting import SNR, LearnedUncertainty
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
    assert module.training_step(batch, 0)["loss"].item() == pytest.approx((T + 1) / 2, rel=1e-4)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, label, condition=None):
        return self.scale * x


def test_validation_losses_are_not_balanced():
    batch = Batch(torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.long), torch.arange(4))
    balanced = LearnedUncertainty(SNR())
    nn.init.normal_(balanced.uncertainty.weight)
    found = []
    for weighting in (SNR(), balanced):
        loss = DenoisingLoss(Denoiser(Scale(), Cosine(T), V()), weighting, Uniform())
        module = DiffusionModule(loss, lambda p: None, None, None, seed=0, batch_size=4)
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
        )
        trainer.validate(module, DataLoader([batch], batch_size=None), verbose=False)
        found.append(trainer.callback_metrics["val/loss"].item())
    assert found[0] == found[1] > 0
