"""Sampler steps neither synchronise with the device nor mix devices, tested on the meta device.

Meta tensors have no values: reading one (item, tolist, bool, nonzero) raises here and would synchronise on a GPU.
Operations that mix CPU and meta tensors raise too.
"""

from itertools import islice
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from src.diffusion.clipping import DynamicThresholding, StaticClipping
from src.diffusion.denoiser import Denoiser
from src.diffusion.parameterization import EDM, Eps, V, Velocity
from src.diffusion.sampler import DDIM, DDPM, Dopri5
from src.diffusion.sampler.noise import PerImageNoise
from src.diffusion.schedule import EDM as Sigma
from src.diffusion.schedule import VP, Cosine, Linear, RectifiedFlow
from src.diffusion.spacing import Karras, Trailing
from src.diffusion.variance import LearnedRange
from tests.diffusion.sampler.networks import Wavy

SAMPLERS = sorted((Path(__file__).parents[3] / "conf" / "sampler").glob("*.yaml"))
PROCESSES = {
    "linear-eps": (Linear(), Eps()),
    "cosine-v": (Cosine(), V()),
    "vp-eps": (VP(), Eps()),
    "edm": (Sigma(), EDM()),
    "flow": (RectifiedFlow(), Velocity()),
}


def last_state(sampler, denoiser, steps=20):
    """The state after all steps, without the check for finite images that follows the last step."""
    x_T = torch.empty(2, 1, 4, 4, device="meta")
    spacing = Karras() if isinstance(denoiser.schedule, Sigma) else Trailing()
    times = spacing(denoiser.schedule, steps)
    states = sampler.trajectory(denoiser, x_T, times, noise=PerImageNoise(0, range(2)))
    *_, last = islice(states, steps + 1)
    return last


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("path", SAMPLERS, ids=lambda p: p.stem)
def test_steps_do_not_synchronise(path, process):
    config = OmegaConf.merge({"schedule": {"T": 1000}}, {"sampler": OmegaConf.load(path)})
    numbers = OmegaConf.to_container(config, resolve=True)["sampler"]
    numbers.pop("steps")
    sampler, denoiser = instantiate(numbers), Denoiser(Wavy(), *PROCESSES[process])
    if isinstance(sampler, Dopri5):
        with pytest.raises(RuntimeError, match="meta"):  # the adaptive solver reads its error estimates
            last_state(sampler, denoiser)
        return
    state = last_state(sampler, denoiser)
    assert state.x.device.type == "meta"
    assert state.evaluations >= 20


@pytest.mark.parametrize("clipping", [StaticClipping, DynamicThresholding])
@pytest.mark.parametrize("sampler", [DDIM(), DDPM()], ids=["ddim", "ddpm"])
def test_clipping_does_not_synchronise(sampler, clipping):
    assert last_state(sampler, clipping(Denoiser(Wavy(), Linear(), Eps()))).x.is_meta


def test_learned_variance_does_not_synchronise():
    class Doubled(torch.nn.Module):
        def forward(self, x, label, condition=None):
            return torch.cat([x, torch.tanh(x)], dim=1)

    assert last_state(DDPM(), Denoiser(Doubled(), Linear(), Eps(), LearnedRange())).x.is_meta


def test_synchronising_step_is_detected():
    class Waiting(DDIM):
        def step(self, denoiser, x_t, t, s, noise, path):
            state = super().step(denoiser, x_t, t, s, noise, path)
            float(state.x.mean())
            return state

    with pytest.raises(RuntimeError, match="meta"):
        last_state(Waiting(), Denoiser(Wavy(), Linear(), Eps()))
