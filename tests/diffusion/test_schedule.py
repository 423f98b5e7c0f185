"""Schedules against independent tables, and their inverses."""

import numpy as np
import pytest
import torch

from src.diffusion import schedule as schedules
from tests.diffusion import reference_numpy as reference

DISCRETE = {
    "linear": (schedules.Linear, lambda T: reference.alphabar_of(reference.betas_linear(T))),
    "scaled_linear": (
        schedules.ScaledLinear,
        lambda T: reference.alphabar_of(reference.betas_scaled_linear(T)),
    ),
    "quadratic": (
        schedules.Quadratic,
        lambda T: reference.alphabar_of(reference.betas_scaled_linear(T, 1e-4, 0.02)),
    ),
    "cosine": (schedules.Cosine, lambda T: reference.alphabar_of(reference.betas_cosine(T))),
    "sigmoid": (schedules.Sigmoid, reference.alphabar_sigmoid),
}


@pytest.mark.parametrize("T", [100, 1000, 4000])
@pytest.mark.parametrize("name", DISCRETE)
def test_tables_equal_the_papers_formulas(name, T):
    make, alphabar = DISCRETE[name]
    schedule, expected = make(T=T), alphabar(T)
    rows = [0, 1, 2, T // 2, T]
    level = schedule(torch.tensor(rows, dtype=torch.float64))
    np.testing.assert_allclose(schedule.alphabar, expected, rtol=1e-10)
    np.testing.assert_allclose(level.alpha, np.sqrt(expected[rows]), rtol=1e-10)
    np.testing.assert_allclose(level.sigma[1:], np.sqrt(1 - expected[rows[1:]]), rtol=1e-10)
    assert level.alpha[0] == 1 and level.sigma[0] == 0
    assert level.label.tolist() == [row - 1 for row in rows]


def test_published_values():
    # alphabar_T of the published settings (computed from the papers' formulas by several codes):
    # DDPM 4.0358e-05, Stable Diffusion 4.6602e-03, improved DDPM's cosine 2.4288e-09
    assert schedules.Linear().alphabar[-1].item() == pytest.approx(4.0358e-05, rel=1e-4)
    assert schedules.ScaledLinear().alphabar[-1].item() == pytest.approx(4.6602e-03, rel=1e-4)
    assert schedules.Cosine().alphabar[-1].item() == pytest.approx(2.4288e-09, rel=1e-3)


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_schedules_invert_their_log_snr(name):
    schedule = DISCRETE[name][0](T=200)
    t = torch.linspace(1, 200, 777, dtype=torch.float64)
    torch.testing.assert_close(schedule.time_of_log_snr(schedule(t).log_snr), t, rtol=1e-7, atol=1e-7)
    extremes = torch.tensor([1e3, -1e3], dtype=torch.float64)
    assert schedule.time_of_log_snr(extremes).tolist() == [1, 200]


def test_uniform_times_of_a_table():
    schedule = schedules.Cosine(T=4)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.9999], dtype=torch.float64)
    assert schedule.time_at(u).tolist() == [1, 1, 2, 4]


@pytest.mark.parametrize("t", [-1.0, 0.5, 1001.0])
def test_times_outside_the_table_are_refused(t):
    with pytest.raises(ValueError, match=r"times must be 0 \(clean\) or in \[1, 1000\]"):
        schedules.Linear()(torch.tensor([t]))


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="beta_end"):
        schedules.Linear(T=10)
    with pytest.raises(ValueError, match="T must be at least 1"):
        schedules.Cosine(T=-1)
