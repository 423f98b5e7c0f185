"""Checks samplers against the final images of k-diffusion that `make_k_diffusion_reference` recorded."""

import json
import math

import pytest
import torch

from src.diffusion.sampler import DDIM, DPM2, LMS, Euler, Heun, MultistepDPMSolver, SinglestepDPMSolver
from src.diffusion.schedule import EDM, VP
from src.diffusion.spacing import Karras
from tests.diffusion.mixture import MixtureDenoiser, three_modes
from tests.diffusion.sampler.make_k_diffusion_reference import (
    CHURN,
    FILE,
    SIGMA_MAX,
    SIGMA_MIN,
    STEPS,
    x_T,
)
from tests.diffusion.sampler.networks import recorded_noise

REFERENCE = json.loads(FILE.read_text())
BOUNDS = {"s_churn": CHURN["s_churn"], "s_min": CHURN["s_tmin"], "s_max": CHURN["s_tmax"]}
BOUNDS["s_noise"] = CHURN["s_noise"]
THREE = {"midpoint": False, "lower_order_final": False, "half_curvature": True}
SAMPLERS = {
    "euler": Euler(),
    "euler churned": Euler(**BOUNDS),
    "euler churned without bounds": Euler(s_churn=40.0),
    "heun": Heun(),
    "heun churned": Heun(**BOUNDS),
    "dpm_2": DPM2(),
    "dpm_2 churned": DPM2(**BOUNDS),
    "euler_ancestral": DDIM(1.0),
    "euler_ancestral half": DDIM(0.5),
    "dpm_2_ancestral": SinglestepDPMSolver(2, plus_plus=False, eta=1.0),
    "lms": LMS(4),
    "dpmpp_2s_ancestral": SinglestepDPMSolver(2, eta=1.0),
    "dpmpp_2s_ancestral half": SinglestepDPMSolver(2, eta=0.5),
    "dpmpp_2m": MultistepDPMSolver(2),
    "dpmpp_2m_sde": MultistepDPMSolver(2, eta=1.0),
    "dpmpp_2m_sde half": MultistepDPMSolver(2, eta=0.5),
    "dpmpp_2m_sde heun": MultistepDPMSolver(2, eta=1.0, midpoint=False),
    "dpmpp_3m_sde": MultistepDPMSolver(3, eta=1.0, **THREE),
    "dpmpp_3m_sde half": MultistepDPMSolver(3, eta=0.5, **THREE),
}


def _replayed(sampler):
    """The noise of k-diffusion, which draws at every step, without the draws for steps that add no noise."""
    noise = recorded_noise()
    drawn = [noise(x_T()) for _ in range(STEPS)]
    low, high = getattr(sampler, "s_min", 0.0), getattr(sampler, "s_max", math.inf)
    used = iter([z for z, sigma in zip(drawn, REFERENCE["sigmas"], strict=False) if low <= sigma <= high])
    return lambda x: next(used)


def test_every_case_is_compared():
    assert {*REFERENCE} - {"sigmas"} == {*SAMPLERS}


def test_karras_spacing_agrees_with_k_diffusion():
    times = Karras()(EDM(SIGMA_MIN, SIGMA_MAX), STEPS)
    # k-diffusion computes the spacing in float32
    torch.testing.assert_close(
        times, torch.tensor(REFERENCE["sigmas"], dtype=torch.float64), rtol=2e-6, atol=0
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_images_agree_for_the_same_noise(name):
    denoiser = MixtureDenoiser(three_modes(), EDM(SIGMA_MIN, SIGMA_MAX * 1.00001))
    ours = SAMPLERS[name](denoiser, x_T(), REFERENCE["sigmas"], noise=_replayed(SAMPLERS[name]))
    # k-diffusion computes some coefficients in float32
    torch.testing.assert_close(
        ours.flatten(1), torch.tensor(REFERENCE[name], dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_images_agree_on_a_variance_preserving_schedule(name):
    # x/alpha depends only on sigma/alpha, not on the schedule
    schedule = VP(t_min=1e-6)
    sigmas = torch.tensor(REFERENCE["sigmas"][:-1], dtype=torch.float64)
    times = torch.cat([schedule.time_of_log_snr(-sigmas.log()), torch.zeros(1)])
    alpha = schedule(times[:1]).alpha.item()
    ours = SAMPLERS[name](
        MixtureDenoiser(three_modes(), schedule), alpha * x_T(), times, noise=_replayed(SAMPLERS[name])
    )
    torch.testing.assert_close(
        ours.flatten(1), torch.tensor(REFERENCE[name], dtype=torch.float64), rtol=1e-6, atol=1e-6
    )
