"""Orders of convergence for a Gaussian mixture with the exact denoiser, against an accurate reference solution."""

import math
from itertools import pairwise

import pytest
import torch

from benchmarks.sampler_orders import SCHEDULES, SOLVERS, Problem
from src.diffusion.sampler import Dopri5, Euler, Heun
from src.diffusion.schedule import RectifiedFlow
from tests.diffusion.mixture import MixtureDenoiser, three_modes

PNDM = next(solver.sampler for solver in SOLVERS if solver.name.startswith("PNDM"))


@pytest.fixture(scope="module")
def problems():
    return {name: Problem(schedule) for name, schedule in SCHEDULES.items()}


# The first steps of multi-step methods have lower order; the path starts where their error is negligible.
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
def test_order_of_convergence(solver, problems):
    measured = problems["VP linear"].measure(solver.sampler)
    assert measured.errors == sorted(measured.errors, reverse=True)
    assert measured.order == pytest.approx(solver.order, abs=0.35)


OTHERS = [name for name in SCHEDULES if name != "VP linear"]


# excluded: PNDM's Runge-Kutta steps, and Heun's on a flow, are uniform in t, which differs between schedules
@pytest.mark.parametrize(
    ("solver", "name"),
    [
        pytest.param(solver, name, id=f"{solver.name}-{name}")
        for solver in SOLVERS
        for name in OTHERS
        if solver.sampler != PNDM and (solver.name, name) != ("Heun", "rectified flow")
    ],
)
def test_every_schedule_gives_the_same_error(solver, name, problems):
    # so the order is the same; `python -m benchmarks.sampler_orders` prints the full table
    steps = 24
    reference, other = problems["VP linear"], problems[name]
    alpha, alpha_there = (p.schedule(p.times(steps)[-1:]).alpha.item() for p in (reference, other))
    _, error = reference.solve(solver.sampler, steps)
    _, error_there = other.solve(solver.sampler, steps)
    assert error_there / alpha_there == pytest.approx(error / alpha, rel=1e-4)


@pytest.mark.parametrize(
    ("sampler", "name"), [*((PNDM, name) for name in OTHERS), (Heun(), "rectified flow")]
)
def test_order_of_samplers_that_step_in_time_on_other_schedules(sampler, name, problems):
    assert problems[name].measure(sampler).order == pytest.approx(2, abs=0.35)


@pytest.mark.parametrize("start", [1.0, 0.999, 0.7])
def test_heun_on_a_flow_steps_in_t(start):
    # dx/dt = eps - x0, from pure noise and from lower noise levels
    denoiser = MixtureDenoiser(three_modes(), RectifiedFlow())
    x = torch.randn(4, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(start, 0.1, 6, dtype=torch.float64)

    def velocity(x, t):
        prediction = denoiser(x, denoiser.schedule([t]).scalars()[0])
        return prediction.eps - prediction.x0

    expected = x
    for t, s in pairwise(times.tolist()):
        slope = velocity(expected, t)
        expected = expected + (s - t) / 2 * (slope + velocity(expected + (s - t) * slope, s))
    torch.testing.assert_close(Heun()(denoiser, x, times), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("sampler", "order"), [(Euler(), 1), (Heun(), 2)])
def test_flow_from_pure_noise(sampler, order):
    # at t = 1, x/alpha does not exist, so the methods step in t
    schedule = RectifiedFlow()
    denoiser = MixtureDenoiser(three_modes(), schedule)
    x = torch.randn(32, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def end(sampler, steps):
        return sampler(denoiser, x, torch.linspace(1.0, 0.4, steps + 1, dtype=torch.float64))

    reference = end(Dopri5(1e-12), 1)
    errors = [(end(sampler, n) - reference).square().mean().sqrt().item() for n in (80, 160, 320, 640)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes == pytest.approx([order] * 3, abs=0.2)
