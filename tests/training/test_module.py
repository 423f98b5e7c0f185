"""The losses of training and validation steps."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from src.conditioning import NO_CLASS, ByClass, Condition
from src.data.codec import Pixels
from src.data.stream import Batch
from src.diffusion.denoiser import Denoiser
from src.diffusion.forward import diffuse
from src.diffusion.loss import DenoisingLoss, Loss, TimedLoss
from src.diffusion.parameterization import V
from src.diffusion.schedule import Cosine
from src.diffusion.time_sampling import Importance, Uniform
from src.diffusion.weighting import SNR, LearnedUncertainty
from src.model import UNet
from src.training.module import DiffusionModule

T = 8


class TimeItself(TimedLoss):
    """A loss that equals the time and ignores the image."""

    def forward(self, x0, draws, eps, condition=None):
        return draws.to(x0)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, label, condition=None):
        return self.scale * x


def batch_of(n, **condition):
    """n grey images of 1 x 2 x 2 pixels, at the first positions of the stream."""
    return Batch(torch.full((n, 1, 2, 2), 128, dtype=torch.uint8), Condition(**condition), torch.arange(n))


def module_of(loss, batch_size, **arguments):
    return DiffusionModule(
        loss, lambda p: None, None, None, seed=0, batch_size=batch_size, codec=Pixels((1, 2, 2)), **arguments
    )


def test_importance_sampling_does_not_change_the_expected_loss():
    # p_t ~ L_t gives an estimate of zero variance for the mean loss over uniform times, (T + 1)/2
    importance = Importance(bins=T, history=1, uniform=1e-6)
    times = torch.arange(1, T + 1, dtype=torch.float64)
    importance.update(times, times, Cosine(T))
    module = module_of(TimeItself(Denoiser(Scale(), Cosine(T), V()), importance), batch_size=16)
    assert module.training_step(batch_of(16), 0)["loss"].item() == pytest.approx((T + 1) / 2, rel=1e-4)


def test_validation_losses_are_not_balanced():
    balanced = LearnedUncertainty(SNR())
    nn.init.normal_(balanced.uncertainty.weight)
    found = []
    for weighting in (SNR(), balanced):
        loss = DenoisingLoss(Denoiser(Scale(), Cosine(T), V()), weighting, Uniform())
        module = module_of(loss, batch_size=4)
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
        )
        trainer.validate(module, DataLoader([batch_of(4)], batch_size=None), verbose=False)
        found.append(trainer.callback_metrics["val/loss"].item())
    assert found[0] == found[1] > 0


class TwoTimes(Loss):
    """A loss that draws t and an earlier time s and passes both to the network."""

    def __init__(self, denoiser):
        super().__init__(denoiser)
        self.seen = []

    def draw(self, n, generator):
        t = self.denoiser.schedule.time_at(torch.rand(n, 2, dtype=torch.float64, generator=generator))
        return t.sort(dim=1, descending=True).values

    def forward(self, x0, draws, eps, condition=None):
        self.seen.append(draws)
        schedule = self.denoiser.schedule
        t, s = schedule(draws[:, 0]), schedule(draws[:, 1])
        output, _ = self.denoiser.output(diffuse(x0, eps, t), t, condition, to=s)
        return (output - eps).square().flatten(1).mean(dim=1)


class Between(nn.Module):
    """A network that records both labels."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.labels = []

    def forward(self, x, label, condition=None, to_label=None):
        self.labels.append((label, to_label))
        return self.scale * x


def test_a_loss_may_draw_two_times():
    network = Between()
    loss = TwoTimes(Denoiser(network, Cosine(T), V()))
    module = module_of(loss, batch_size=16)
    assert module.training_step(batch_of(16), 0)["loss"].isfinite()
    label, to_label = network.labels[-1]
    draws = loss.seen[-1]
    assert draws.shape == (16, 2)
    assert (draws[:, 0] >= draws[:, 1]).all()
    torch.testing.assert_close(label.double(), draws[:, 0] - 1)  # the label of a discrete time is t - 1
    torch.testing.assert_close(to_label.double(), draws[:, 1] - 1)
    # micro-batches see slices of the same draws
    whole = loss.seen.pop()
    half = Batch(batch_of(16).images[8:], Condition(), torch.arange(8, 16))
    module.training_step(half, 0)
    assert torch.equal(loss.seen[-1], whole[8:])


class Reading(nn.Module):
    """A network that records the class labels."""

    def __init__(self):
        super().__init__()
        self.scale, self.labels = nn.Parameter(torch.ones(())), []

    def forward(self, x, label, condition=None):
        self.labels.append(None if condition is None else condition.labels)
        return self.scale * x


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_condition_dropout_depends_on_the_position_in_the_stream(dropout):
    network = Reading()
    loss = DenoisingLoss(Denoiser(network, Cosine(T), V()), SNR(), Uniform())
    module = module_of(loss, batch_size=400, conditioning=ByClass(10, dropout))
    labels = torch.arange(400) % 10
    module.training_step(batch_of(400, labels=labels), 0)
    whole = network.labels[-1]
    assert (whole == NO_CLASS).double().mean().item() == pytest.approx(dropout, abs=0.07)
    assert torch.equal(whole[whole >= 0], labels[whole >= 0])
    quarter = batch_of(400, labels=labels)
    quarter = Batch(quarter.images[100:200], quarter.condition.index(slice(100, 200)), torch.arange(100, 200))
    module.training_step(quarter, 0)
    assert torch.equal(network.labels[-1], whole[100:200])
    # validation drops no condition
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    loader = DataLoader([batch_of(400, labels=labels)], batch_size=None)
    trainer.validate(module, loader, verbose=False)
    assert torch.equal(network.labels[-1], labels)


def test_the_embedding_of_no_class_learns_from_images_with_dropped_labels_only():
    network = UNet(
        2, 1, num_classes=4, base_channels=4, channel_multipliers=[1], attention_factors=[1], groups=2
    )
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    rows = network.class_embedding.weight

    def gradients(dropout, images):
        loss = DenoisingLoss(Denoiser(network, Cosine(T), V()), SNR(), Uniform())
        module = module_of(loss, batch_size=16, conditioning=ByClass(4, dropout))
        batch = batch_of(16, labels=torch.arange(16) % 4)
        step = module.training_step(Batch(images, batch.condition, batch.positions), 0)
        return torch.autograd.grad(step["loss"], rows)[0]

    images = torch.randint(256, (16, 1, 2, 2), generator=torch.Generator().manual_seed(1)).byte()
    conditioning = ByClass(4, 0.5)
    condition = Condition(labels=torch.arange(16) % 4)
    dropped = conditioning.of_training(condition, torch.zeros(16), torch.arange(16), 0, 16).labels == NO_CLASS
    assert 2 < dropped.sum() < 14
    none, some = gradients(0.0, images), gradients(0.5, images)
    assert (none[4] == 0).all(), "no label is dropped"
    assert (none[:4] != 0).any(dim=1).all()
    assert (some[4] != 0).any()
    # other images with a label leave its gradient as it is, and other images without a label those of the classes
    with_label = gradients(0.5, torch.where(dropped.view(-1, 1, 1, 1), images, 255 - images))
    without = gradients(0.5, torch.where(dropped.view(-1, 1, 1, 1), 255 - images, images))
    torch.testing.assert_close(with_label[4], some[4])
    torch.testing.assert_close(without[:4], some[:4])
    assert not torch.allclose(with_label[:4], some[:4])
    assert not torch.allclose(without[4], some[4])


class Halves(Pixels):
    """Images of 1 x 2 x 2 pixels as two channels of 1 x 2: another shape than the image."""

    def __init__(self):
        super().__init__((1, 2, 2))
        self.shape = (2, 1, 2)

    def encode(self, images):
        assert not torch.is_grad_enabled(), "a codec is not trained"
        return super().encode(images).reshape(-1, *self.shape)


def test_the_loss_is_given_what_the_codec_encodes():
    class Seen(TimedLoss):
        def forward(self, x0, draws, eps, condition=None):
            self.shapes = (x0.shape, eps.shape)
            return self.denoiser.network.scale * x0.flatten(1).mean(dim=1)

    loss = Seen(Denoiser(Scale(), Cosine(T), V()), Uniform())
    module = DiffusionModule(loss, lambda p: None, None, None, seed=0, batch_size=4, codec=Halves())
    module.training_step(batch_of(4), 0)
    assert loss.shapes == ((4, 2, 1, 2), (4, 2, 1, 2))
