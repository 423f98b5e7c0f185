"""Writes k_diffusion_reference.json: final images of k-diffusion 0.1.1 on the mixture of `mixture.three_modes`.

    python -m tests.diffusion.sampler.make_k_diffusion_reference

Needs `k-diffusion` (with torchsde and torchdiffeq) in a separate environment: it requires numpy 1, this project 2.
Uses only `k_diffusion.sampling`, in float64, with its noise replaced by `recorded_noise`, which the tests replay.
"""

import importlib
import json
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import torch

from tests.diffusion.mixture import three_modes
from tests.diffusion.sampler.networks import recorded_noise

FILE = Path(__file__).with_name("k_diffusion_reference.json")
SIGMA_MIN, SIGMA_MAX, STEPS, IMAGES = 0.02, 20.0, 12, 4
CHURN = {"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 10.0, "s_noise": 1.003}
CASES = {
    "euler": {},
    "euler churned": CHURN,
    "euler churned without bounds": {"s_churn": 40.0},
    "heun": {},
    "heun churned": CHURN,
    "dpm_2": {},
    "dpm_2 churned": CHURN,
    "euler_ancestral": {},
    "euler_ancestral half": {"eta": 0.5},
    "dpm_2_ancestral": {},
    "lms": {},
    "dpmpp_2s_ancestral": {},
    "dpmpp_2s_ancestral half": {"eta": 0.5},
    "dpmpp_2m": {},
    "dpmpp_2m_sde": {},
    "dpmpp_2m_sde half": {"eta": 0.5},
    "dpmpp_2m_sde heun": {"solver_type": "heun"},
    "dpmpp_3m_sde": {},
    "dpmpp_3m_sde half": {"eta": 0.5},
}


class Level:
    """alpha = 1 and sigma, for the mixture's denoiser."""

    def __init__(self, sigma: torch.Tensor):
        self.alpha, self.sigma = torch.ones_like(sigma), sigma


def main() -> None:
    # bypass the __init__ of the package, which imports all modules, including training
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(find_spec("k_diffusion").submodule_search_locations)
    sys.modules["k_diffusion"] = package
    sampling = importlib.import_module("k_diffusion.sampling")
    mixture = three_modes()
    ends = {}
    for name, options in CASES.items():
        sampler = getattr(sampling, f"sample_{name.split()[0]}")
        noise = recorded_noise()
        sampling.torch = types.SimpleNamespace(**vars(torch))
        sampling.torch.randn_like = noise
        if "noise_sampler" in sampler.__wrapped__.__code__.co_varnames:
            options = {**options, "noise_sampler": lambda *_, noise=noise: noise(x_T())}
        sigmas = sampling.get_sigmas_karras(STEPS, SIGMA_MIN, SIGMA_MAX).double()
        x = sampler(
            lambda x, sigma: mixture.posterior_mean(x, Level(sigma)), x_T(), sigmas, disable=True, **options
        )
        ends[name] = x.flatten(1).tolist()
    ends["sigmas"] = sigmas.tolist()
    FILE.write_text(json.dumps(ends, indent=1) + "\n")


def x_T() -> torch.Tensor:
    """The initial noise of all samplers, shape (IMAGES, 1, 1, 2)."""
    return SIGMA_MAX * recorded_noise(seed=0)(torch.empty(IMAGES, 1, 1, 2, dtype=torch.float64))


if __name__ == "__main__":
    main()
