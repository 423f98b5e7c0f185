"""The noise that the tasks of `src.sample` use."""

import torch

from src.data.codec import Pixels
from src.diffusion.denoiser import Denoiser
from src.diffusion.parameterization import Eps
from src.diffusion.sampler import DDPM
from src.diffusion.schedule import Linear
from src.diffusion.spacing import Trailing
from src.generation.loaded import LoadedRun
from src.generation.recipe import Recipe
from src.generation.tasks import Interpolate
from tests.diffusion.sampler.networks import Wavy


def loaded(sampler, steps=4):
    """A run with images of 1 x 4 x 4 pixels and an untrained network."""
    network = Wavy()
    network.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    denoiser = Denoiser(network, Linear(), Eps()).requires_grad_(False)
    recipe = Recipe(sampler, Trailing(), steps, (), Pixels((1, 4, 4)), None, seed=0)
    return LoadedRun(denoiser, recipe, None, None, step=0, weights="raw", ema_decay=None)


class Recording(DDPM):
    """DDPM that records its starts x_T, the noise of its steps and its images."""

    def trajectory(self, denoiser, x_T, times, condition=None, noise=None):
        self.starts, self.noise = x_T, []

        def recorded(x):
            self.noise.append(noise(x))
            return self.noise[-1]

        for state in super().trajectory(denoiser, x_T, times, condition, recorded):
            self.images = state.x
            yield state


def test_interpolation_reuses_no_noise_and_its_ends_are_drawn_images(tmp_path):
    sampler = Recording()
    run = loaded(sampler)
    list(run.recipe.trajectory(run.denoiser, range(4)))
    starts, drawn = sampler.starts, sampler.images
    Interpolate(columns=3).run(run, 2, 4, tmp_path)
    draws = [image for batch in (starts, *sampler.noise) for image in batch]
    assert len(draws) == 4 + 3 * 6
    assert all(not torch.allclose(a, b) for i, a in enumerate(draws) for b in draws[:i])
    torch.testing.assert_close(sampler.images[[0, 2, 3, 5]], drawn)
