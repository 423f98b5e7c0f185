"""Learning-rate schedules against their formulas."""

import pytest
import torch

from src.training.lr_schedule import InverseSquareRoot


def test_inverse_square_root_with_warm_up():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    schedule = InverseSquareRoot(optimizer, warmup_steps=4, reference_steps=10)
    rates = []
    for _ in range(41):
        rates.append(schedule.get_last_lr()[0] / 0.01)
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:11] == pytest.approx([1.0] * 7)
    assert (rates[20], rates[40]) == pytest.approx((0.5**0.5, 0.5))


def test_reference_steps_below_one_are_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    with pytest.raises(ValueError, match=r"^reference_steps"):
        InverseSquareRoot(optimizer, warmup_steps=0, reference_steps=0)
