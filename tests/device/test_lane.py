"""The lane sees what it is there for: stray CPU tensors, waits, float64, and nothing else."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from src.diffusion.denoiser import Denoiser
from src.diffusion.loss import DenoisingLoss
from src.diffusion.parameterization import Eps
from src.diffusion.schedule import Linear
from src.diffusion.time_sampling import Uniform
from src.diffusion.weighting import Simple
from tests.device.lane import Float64Error, lane
from tests.diffusion.sampler.networks import Wavy


class Synchronising(DenoisingLoss):
    def forward(self, x0, draws, eps, condition=None):
        losses = super().forward(x0, draws, eps, condition)
        return losses / losses.mean().item()


class Stray(DenoisingLoss):
    def forward(self, x0, draws, eps, condition=None):
        return super().forward(x0, draws, eps, condition) * torch.ones(len(x0))


class Copying(DenoisingLoss):
    def forward(self, x0, draws, eps, condition=None):
        return super().forward(x0, draws, eps, condition) * draws.to(x0.device, x0.dtype)


class Precise(DenoisingLoss):
    def forward(self, x0, draws, eps, condition=None):
        return super().forward(x0, draws, eps, condition).double()


def evaluate(loss):
    """The loss of two images on the device."""
    loss = loss(Denoiser(Wavy(), Linear(), Eps()), Simple(), Uniform())
    x0 = torch.zeros(2, 1, 4, 4, device="cuda")
    return loss(x0, torch.tensor([1.0, 1000.0], dtype=torch.float64), torch.zeros_like(x0))


def test_a_loss_as_it_should_be_passes():
    with lane(float64=False) as device:
        assert evaluate(DenoisingLoss).device.type == "cuda"
        assert device.waits == []


def test_a_read_value_raises_and_is_noted():
    with lane() as device:
        with pytest.raises(DataDependentOutputException):
            evaluate(Synchronising)
        assert len(device.waits) == 1


@pytest.mark.parametrize("read", [bool, float, lambda x: x.tolist(), lambda x: x.cpu().item()])
def test_all_ways_of_reading_are_seen(read):
    with lane() as device:
        x = torch.zeros((), device="cuda")
        with pytest.raises(DataDependentOutputException):
            read(x)
        assert device.waits


def test_reads_can_be_answered_and_are_counted():
    with lane(answers=True) as device:
        x = torch.zeros(2, device="cuda")
        assert x.isfinite().all()
        assert x.sum().item() == 0
        assert len(device.waits) == 2


def test_a_stray_cpu_tensor_raises():
    with lane(), pytest.raises(RuntimeError, match="same device"):
        evaluate(Stray)


def test_a_blocking_copy_is_noted():
    with lane() as device:
        evaluate(Copying)
        (wait,) = device.waits
        assert "_to_copy" in wait


def test_a_copy_into_a_tensor_is_noted():
    with lane() as device:
        x = torch.zeros(2, device="cuda")
        x.copy_(torch.ones(2), non_blocking=True)
        assert device.waits == []
        x.copy_(torch.ones(2))
        assert len(device.waits) == 1


def test_float64_raises_where_there_is_none():
    with lane():
        assert evaluate(Precise).dtype == torch.float64
    with lane(float64=False), pytest.raises(Float64Error):
        evaluate(Precise)


def test_the_cpu_stays_what_it_is():
    with lane(float64=False) as device:
        x = torch.arange(3, dtype=torch.float64)
        assert x.sum().item() == 3
        drawn = torch.rand(2, generator=torch.Generator().manual_seed(0))
        assert device.waits == []
    torch.testing.assert_close(drawn, torch.rand(2, generator=torch.Generator().manual_seed(0)))


def test_nothing_is_left_behind():
    own = torch.Generator
    with pytest.raises(ZeroDivisionError), lane():
        raise ZeroDivisionError
    assert torch.Generator is own
    assert torch.zeros(1).item() == 0
