"""Checks samplers against diffusers' schedulers with the same network, times and noise."""

import numpy as np
import pytest
import torch

from src.diffusion.denoiser import Denoiser
from src.diffusion.parameterization import Eps, Velocity
from src.diffusion.sampler import (
    DDIM,
    DEIS,
    DPM2,
    LMS,
    PLMS,
    Euler,
    Heun,
    MultistepDPMSolver,
    SinglestepDPMSolver,
    UniPC,
)
from src.diffusion.schedule import Linear, RectifiedFlow
from tests.diffusion.sampler.networks import Wavy, standard_normal

# warnings from diffusers' use of numpy
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SHAPE = (4, 1, 4, 4)


def assert_agree(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def _scheduler(name, **config):
    import diffusers

    if "Flow" not in name:
        config |= {"beta_start": 1e-4, "beta_end": 0.02}  # some schedulers have other defaults
    return getattr(diffusers, name)(num_train_timesteps=1000, **config)


def _theirs(scheduler, steps, x):
    """Images of a diffusers scheduler. x is in our coordinates; it is rescaled for schedulers with unscaled x."""
    scheduler.set_timesteps(steps)
    if scheduler.init_noise_sigma != 1:
        x = x / Linear()([float(scheduler.timesteps[0]) + 1]).alpha.float()
    network = Wavy()
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), torch.full((len(x),), float(t)))
        x = scheduler.step(output, t, x).prev_sample
    return x


def _ours(sampler, times, x, noise=()):
    replay = iter(noise)
    denoiser = Denoiser(Wavy(), Linear(), Eps())
    return sampler(denoiser, x, times, noise=lambda _: next(replay))


def _times(scheduler, end):
    """Our times for the scheduler's time steps: row i + 1, then `end`."""
    kept = dict.fromkeys(scheduler.timesteps.tolist())  # some schedulers list time steps twice
    return [t + 1.0 for t in kept] + [end]


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("midpoint", [True, False])
def test_dpm_solver_plus_plus_multistep(order, midpoint, steps):
    scheduler = _scheduler(
        "DPMSolverMultistepScheduler", solver_order=order, solver_type="midpoint" if midpoint else "heun"
    )
    x = standard_normal(SHAPE)
    expected = _theirs(scheduler, steps, x)
    # diffusers halves D2 (see the orders of convergence)
    ours = MultistepDPMSolver(order, midpoint=midpoint, half_curvature=True)
    assert_agree(_ours(ours, _times(scheduler, 0.0), x), expected)


@pytest.mark.parametrize("steps", [8, 14, 15, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_multistep_of_eps(order, steps):
    scheduler = _scheduler(
        "DPMSolverMultistepScheduler",
        solver_order=order,
        algorithm_type="dpmsolver",
        final_sigmas_type="sigma_min",
    )
    x = standard_normal(SHAPE)
    expected = _theirs(scheduler, steps, x)
    ours = MultistepDPMSolver(order, plus_plus=False, half_curvature=True)
    assert_agree(_ours(ours, _times(scheduler, 1.0), x), expected)


def test_sde_dpm_solver_plus_plus_2m(monkeypatch):
    from diffusers.schedulers import scheduling_dpmsolver_multistep

    noise = [standard_normal(SHAPE, 10 + i) for i in range(20)]
    replay = iter(noise)
    monkeypatch.setattr(scheduling_dpmsolver_multistep, "randn_tensor", lambda shape, **_: next(replay))
    scheduler = _scheduler("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")
    x = standard_normal(SHAPE)
    expected = _theirs(scheduler, 20, x)
    ours = MultistepDPMSolver(2, eta=1.0, lower_order_final=False)
    assert_agree(_ours(ours, _times(scheduler, 0.0), x, noise), expected)


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    # diffusers gives NaN in the step to clean data with bh1
    ("bh", "end", "name"),
    [(1, 1.0, "sigma_min"), (2, 1.0, "sigma_min"), (2, 0.0, "zero")],
)
def test_unipc(order, bh, end, name, steps):
    scheduler = _scheduler(
        "UniPCMultistepScheduler", solver_order=order, solver_type=f"bh{bh}", final_sigmas_type=name
    )
    x = standard_normal(SHAPE)
    expected = _theirs(scheduler, steps, x)
    assert_agree(_ours(UniPC(order, bh), _times(scheduler, end), x), expected)


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_of_eps(order):
    scheduler = _scheduler(
        "UniPCMultistepScheduler", solver_order=order, predict_x0=False, final_sigmas_type="sigma_min"
    )
    x = standard_normal(SHAPE)
    expected = _theirs(scheduler, 12, x)
    assert_agree(_ours(UniPC(order, plus_plus=False), _times(scheduler, 1.0), x), expected)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order):
    scheduler = _scheduler("DEISMultistepScheduler", solver_order=order, lower_order_final=False)
    x = standard_normal(SHAPE)
    expected = _theirs(scheduler, 20, x)
    assert_agree(_ours(DEIS(order), _times(scheduler, 1.0), x), expected)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("EulerDiscreteScheduler", Euler()),
        ("EulerDiscreteScheduler", DDIM()),
        ("HeunDiscreteScheduler", Heun()),
        ("KDPM2DiscreteScheduler", DPM2()),
        ("KDPM2DiscreteScheduler", SinglestepDPMSolver(2, plus_plus=False)),
        ("LMSDiscreteScheduler", LMS(4)),
    ],
)
def test_solvers_in_unscaled_coordinates(name, sampler):
    scheduler = _scheduler(name, timestep_spacing="leading")
    x = standard_normal(SHAPE)
    expected = _theirs(scheduler, 20, x)
    times = [1000.0 - 50 * i - 49 for i in range(20)] + [0.0]
    # DPM2 evaluates between time steps, where the float32 tables of diffusers are ten times less accurate
    tolerance = 1e-5 if name != "KDPM2DiscreteScheduler" else 1e-4
    ours = _ours(sampler, times, x)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_euler_ancestral(monkeypatch):
    from diffusers.schedulers import scheduling_euler_ancestral_discrete

    noise = [standard_normal(SHAPE, 10 + i) for i in range(20)]
    replay = iter(noise)
    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", lambda shape, **_: next(replay))
    scheduler = _scheduler("EulerAncestralDiscreteScheduler", timestep_spacing="leading")
    x = standard_normal(SHAPE)
    expected = _theirs(scheduler, 20, x)
    assert_agree(_ours(DDIM(1.0), _times(scheduler, 0.0), x, noise), expected)


@pytest.mark.parametrize("runge_kutta", [False, True])
def test_pndm(runge_kutta):
    scheduler = _scheduler("PNDMScheduler", skip_prk_steps=not runge_kutta, set_alpha_to_one=True)
    x = standard_normal(SHAPE)
    expected = _theirs(scheduler, 20, x)
    times = [1000.0 - 50 * i - 49 for i in range(20)] + [0.0]
    assert_agree(_ours(PLMS(runge_kutta), times, x), expected)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_flow_matching(name):
    scheduler = _scheduler(name)
    steps = 12
    if name == "FlowMatchEulerDiscreteScheduler":
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
        sampler = Euler()
    else:
        scheduler.set_timesteps(steps)
        sampler = Heun()
    network, x = Wavy(), standard_normal(SHAPE)
    expected = x
    for t in scheduler.timesteps:
        output = network(expected, torch.full((len(x),), float(t) * 0.999))
        expected = scheduler.step(output, t, expected).prev_sample
    times = [*dict.fromkeys((scheduler.timesteps.double() / 1000).tolist()), 0.0]
    # our label is 999 t
    ours = sampler(Denoiser(network, RectifiedFlow(), Velocity()), x, times)
    assert_agree(ours, expected)


def test_linspace_ddim_steps_to_the_next_time():
    # diffusers 0.42 is wrong here: it always steps from t to t - T//S, which is not the next time with linspace
    # spacing. So the sampler is checked against the formula of the paper.
    steps, x = 10, standard_normal(SHAPE).double()
    indices = np.linspace(0, 999, steps).round()[::-1]
    alphabar = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))])
    expected = x
    for i, t in enumerate(indices):
        at = alphabar[int(t) + 1]
        below = alphabar[int(indices[i + 1]) + 1] if i + 1 < steps else 1.0
        eps = Wavy()(expected, torch.full((len(x),), t, dtype=torch.float64))
        x0 = (expected - np.sqrt(1 - at) * eps) / np.sqrt(at)
        expected = np.sqrt(below) * x0 + np.sqrt(1 - below) * eps
    ours = _ours(DDIM(), [t + 1 for t in indices] + [0.0], x)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)

    scheduler = _scheduler("DDIMScheduler", timestep_spacing="linspace", clip_sample=False)
    theirs = _theirs(scheduler, steps, x.float())
    assert (theirs - expected).abs().max() > 0.01 * expected.abs().max()
