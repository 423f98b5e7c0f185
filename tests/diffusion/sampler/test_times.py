"""Times below the t_min of the schedule and levels beyond its ends are exact or refused, never clamped."""

import math

import pytest
import torch

from src.diffusion.sampler import (
    DDIM,
    DEIS,
    DPM2,
    PLMS,
    Dopri5,
    EulerMaruyama,
    Heun,
    MultistepDPMSolver,
    PredictorCorrector,
    Restart,
    SinglestepDPMSolver,
    UniPC,
)
from src.diffusion.schedule import EDM, VP, Linear
from src.diffusion.spacing import Karras, UniformLogSNR
from src.errors import UserError
from tests.diffusion.mixture import MixtureDenoiser, three_modes
from tests.diffusion.sampler.networks import recorded_noise

SAMPLERS = {
    "DDIM": DDIM(1.0),
    "Heun, churned": Heun(s_churn=40.0),
    "DPM2": DPM2(),
    "DPM2, churned": DPM2(s_churn=40.0),
    "DPM-Solver-2": SinglestepDPMSolver(2, plus_plus=False),
    "DPM-Solver-3": SinglestepDPMSolver(3, plus_plus=False),
    "DPM-Solver++(2S)": SinglestepDPMSolver(2),
    "DPM-Solver++(3S)": SinglestepDPMSolver(3),
    "DPM-Solver++(3S), uniform in time": SinglestepDPMSolver(3, nodes="time"),
    "DPM-Solver++(3S), ancestral": SinglestepDPMSolver(3, eta=1.0),
    "DPM-Solver++(3M)": MultistepDPMSolver(3),
    "UniPC": UniPC(),
    "DEIS": DEIS(),
    "PNDM": PLMS(runge_kutta=True),
    "Euler-Maruyama": EulerMaruyama(),
    "predictor-corrector": PredictorCorrector(DDIM(1.0)),
    "Restart": Restart(SinglestepDPMSolver(3), sigma_min=0.01),
    "dopri5": Dopri5(),
}
# a process, the same with a larger t_min, and times that end below that t_min
PAIRS = {
    "EDM": (EDM(), EDM(sigma_min=0.1), Karras()(EDM(), 18)),
    "VP": (VP(), VP(t_min=1e-2), UniformLogSNR()(VP(), 25)),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_times_below_t_min_are_exact(name, pair):
    whole, shorter, times = PAIRS[pair]
    times[-2] = whole.t_min  # remove the rounding error of the spacing
    assert times[-2] < shorter.t_min / 10
    x_T = whole(times[:1]).sigma.item() * recorded_noise(0)(torch.empty(16, 1, 1, 2))

    def images(schedule, times):
        return SAMPLERS[name](MixtureDenoiser(three_modes(), schedule), x_T, times, noise=recorded_noise())

    assert torch.equal(images(shorter, times), images(whole, times))
    # also if sampling starts below it
    below = times[times < shorter.t_min]
    if name != "Restart":
        assert torch.equal(images(shorter, below), images(whole, below))


@pytest.mark.parametrize("schedule", [Linear(), EDM()], ids=lambda s: type(s).__name__)
def test_churn_at_the_noisiest_level_adds_noise(schedule):
    # churn raises the noise level of x_T from sigma_max to (sqrt 2) sigma_max, beyond the end of the schedule
    class Zero(MixtureDenoiser):
        def forward(self, x_t, level, condition=None):
            seen.append(level)
            return super().forward(x_t, level)

    seen, denoiser = [], Zero(three_modes(), schedule)
    Heun(s_churn=1000.0)(denoiser, torch.zeros(1, 1, 1, 2).double(), [schedule.t_max, schedule.t_min, 0.0])
    (noisiest,) = schedule([schedule.t_max]).scalars()
    assert seen[0].sigma / seen[0].alpha == pytest.approx(
        math.sqrt(2) * noisiest.sigma / noisiest.alpha, rel=1e-12
    )
    assert (seen[0].alpha, seen[0].label) == (noisiest.alpha, noisiest.label)


def test_restart_beyond_the_schedule_is_refused():
    schedule = EDM(sigma_max=20.0)
    sampler = Restart(Heun(), sigma_min=1.0, sigma_max=30.0)
    with pytest.raises(
        UserError, match=r"^sampler.sigma_max=30 is above 20, the schedule's largest .*: lower it"
    ):
        sampler(MixtureDenoiser(three_modes(), schedule), torch.zeros(1, 1, 1, 2), Karras()(schedule, 18))


@pytest.mark.parametrize("time", [-0.1, 81.0])
def test_times_outside_the_schedule_are_refused(time):
    with pytest.raises(ValueError, match=r"^times must be in \[0, 80\], got"):
        DDIM()(
            MixtureDenoiser(three_modes(), EDM()), torch.zeros(1, 1, 1, 2), sorted([1.0, time], reverse=True)
        )


@pytest.mark.parametrize("bh", [1, 2])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("steps", [5, 10])
def test_unipc_with_count_clean_step_false_equals_the_published_code(steps, order, bh):
    # the authors' code takes `steps` steps to the last noisy time; test_diffusers compares these with diffusers
    denoiser = MixtureDenoiser(three_modes(), VP())
    times = UniformLogSNR(1e-3)(VP(), steps + 1)
    x_T = recorded_noise(0)(torch.empty(16, 1, 1, 2))
    published = UniPC(order, bh)(denoiser, x_T, times[:-1])
    *_, state, last = UniPC(order, bh, count_clean_step=False).trajectory(denoiser, x_T, times)
    assert torch.equal(state.x, published)
    # the step to clean data returns the estimate of x0 at that time
    (level,) = VP()(times[-2:-1]).scalars()
    assert torch.equal(last.x, denoiser(published, level).x0)
    *_, state, _ = UniPC(order, bh).trajectory(denoiser, x_T, times)
    assert not torch.equal(state.x, published)
