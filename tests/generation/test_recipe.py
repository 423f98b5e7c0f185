"""The images of a recipe do not depend on how they are shared out."""

import pytest
import torch

from src.diffusion.clipping import StaticClipping
from src.diffusion.denoiser import Denoiser
from src.diffusion.parameterization import Eps
from src.diffusion.sampler import DDIM, DDPM
from src.diffusion.schedule import Cosine
from src.diffusion.spacing import Trailing
from src.generation.recipe import Generation
from src.model import UNet

N = 30


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    network = UNet(image_size=8, channels=3, base_channels=8, channel_multipliers=[1, 2], groups=4).eval()
    for weight in network.parameters():  # as after a training: the last layer begins with zeros
        torch.nn.init.normal_(weight, std=0.1)
    return Denoiser(network, Cosine(), Eps())


def drawn(sampler, denoiser, share, batch_size):
    """The bytes of a share of the images, by number."""
    recipe = Generation(sampler, Trailing(), 20, StaticClipping, (3, 8, 8), 0, seed=0)
    batches = list(recipe.images(denoiser, share, batch_size))
    return dict(zip(share, torch.cat(batches), strict=True))


@pytest.mark.parametrize("sampler", [DDIM(), DDPM()], ids=["ddim", "ddpm"])
@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 1), (1, 7), (2, 8), (3, 4)])
def test_images_do_not_depend_on_ranks_and_batches(denoiser, sampler, ranks, batch_size):
    whole = drawn(sampler, denoiser, range(N), N)
    parts = {}
    for rank in range(ranks):  # as `TrackFidelity` shares them out
        parts |= drawn(sampler, denoiser, range(rank, N, ranks), batch_size)
    assert parts.keys() == whole.keys()
    equal = torch.stack([parts[i] == whole[i] for i in whole]).double().mean().item()
    assert equal >= 0.9999
    assert torch.stack(list(whole.values())).double().std() > 10, "there is something to see"


@pytest.mark.parametrize("batch_size", [1, 7])
def test_noise_is_equal_bit_by_bit(denoiser, batch_size):
    recipe = Generation(DDPM(), Trailing(), 20, None, (3, 8, 8), 0, seed=0)
    noise, whole, _ = recipe.start(denoiser, range(N))
    later = noise(whole)
    for start in range(0, N, batch_size):
        share = range(N)[start : start + batch_size]
        noise, x_T, _ = recipe.start(denoiser, share)
        assert torch.equal(x_T, whole[start : start + batch_size])
        assert torch.equal(noise(x_T), later[start : start + batch_size])
