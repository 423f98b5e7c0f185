"""Checks single-step DPM-Solvers, with the inner levels of the authors' code, against numpy."""

import math

import numpy as np
import pytest

from src.diffusion.denoiser import Denoiser
from src.diffusion.parameterization import Eps
from src.diffusion.sampler import SinglestepDPMSolver
from src.diffusion.schedule import VP
from src.diffusion.spacing import QuadraticTime, UniformLogSNR, UniformTime
from tests.diffusion.sampler.networks import Wavy, standard_normal


def level(t):
    """alpha, sigma and lambda of the VP process (Song et al. 2021, eq. 33)."""
    log_alpha = -(t**2) * 19.9 / 4 - t * 0.1 / 2
    sigma = math.sqrt(-math.expm1(2 * log_alpha))
    return math.exp(log_alpha), sigma, log_alpha - math.log(sigma)


def time_of(lam):
    """The inverse of lambda by bisection."""
    low, high = 1e-9, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if level(middle)[2] > lam else (low, middle)
    return (low + high) / 2


def eps_of(x, t):
    return np.tanh(x * (0.5 + 999 * t / 1000)) + 0.1 * x[..., ::-1]


def inner_times(t, s, order, nodes):
    """The authors' get_time_steps between two times (skip_type time_uniform, time_quadratic, logSNR)."""
    shares = np.arange(1, order) / order
    if nodes == "time":
        return [t + share * (s - t) for share in shares]
    if nodes == "sqrt_time":
        return [(math.sqrt(t) + share * (math.sqrt(s) - math.sqrt(t))) ** 2 for share in shares]
    lam_t, lam_s = level(t)[2], level(s)[2]
    return [time_of(lam_t + share * (lam_s - lam_t)) for share in shares]


def step(x, t, s, order, plus_plus, nodes):
    """DPM-Solver-2, -3 (Lu et al. 2022a, algorithms 4 and 5 for any r1, r2) and their ++ versions."""
    (alpha_t, sigma_t, lam_t), (_, _, lam_s) = level(t), level(s)
    h = lam_s - lam_t

    def model(x, t):
        alpha, sigma, _ = level(t)
        return (x - sigma * eps_of(x, t)) / alpha if plus_plus else eps_of(x, t)

    def moved(to, *terms):
        """(a_to/a_t) x - b_to sum of coefficient times estimate."""
        alpha, sigma, _ = level(to)
        scale, b = (sigma / sigma_t, alpha) if plus_plus else (alpha / alpha_t, sigma)
        return scale * x - b * sum(coefficient * m for coefficient, m in terms)

    sign = -1.0 if plus_plus else 1.0
    phi_1 = lambda h: math.expm1(sign * h)  # noqa: E731
    phi_2 = lambda h: phi_1(h) / (sign * h) - 1  # noqa: E731
    m, times = model(x, t), inner_times(t, s, order, nodes)
    r = [(level(time)[2] - lam_t) / h for time in times]
    m1 = model(moved(times[0], (phi_1(r[0] * h), m)), times[0])
    if order == 2:
        return moved(s, (phi_1(h), m), (phi_1(h) / (2 * r[0]), m1 - m))
    m2 = model(moved(times[1], (phi_1(r[1] * h), m), (r[1] / r[0] * phi_2(r[1] * h), m1 - m)), times[1])
    return moved(s, (phi_1(h), m), (phi_2(h) / r[1], m2 - m))


GRIDS = {"time": UniformTime(1e-3), "sqrt_time": QuadraticTime(1e-3), "log_snr": UniformLogSNR(1e-3)}


@pytest.mark.parametrize("plus_plus", [False, True])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("nodes", GRIDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_inner_levels_are_uniform_in_the_chosen_variable(grid, nodes, order, plus_plus):
    times = GRIDS[grid](VP(), 7)[:-1]
    x = standard_normal((2, 1, 3, 4)).double()
    sampler = SinglestepDPMSolver(order, plus_plus, nodes=nodes)
    ours = sampler(Denoiser(Wavy(), VP(), Eps()), x, times).numpy()
    expected = x.numpy()
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        expected = step(expected, t, s, order, plus_plus, nodes)
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("nodes", ["time", "sqrt_time"])
@pytest.mark.parametrize("order", [2, 3])
def test_chosen_variable_changes_the_images(order, nodes):
    x, times = standard_normal((2, 1, 3, 4)).double(), GRIDS["time"](VP(), 7)[:-1]
    denoiser = Denoiser(Wavy(), VP(), Eps())
    ours, even = (
        SinglestepDPMSolver(order, nodes=choice)(denoiser, x, times) for choice in (nodes, "log_snr")
    )
    assert (ours - even).abs().max() > 1e-3
