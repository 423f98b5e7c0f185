"""The precision of a loaded network."""

from functools import partial

import pytest
import torch

from src.app.load import guides_in, set_precision
from src.data.codec import Pixels
from src.diffusion.denoiser import Denoiser
from src.diffusion.guidance import AutoGuidance
from src.diffusion.parameterization import Eps
from src.diffusion.sampler import DDIM
from src.diffusion.schedule import Linear
from src.diffusion.spacing import Trailing
from src.generation.recipe import Recipe
from src.model import UNet


def denoiser() -> Denoiser:
    torch.manual_seed(0)
    network = UNet(image_size=8, channels=1, base_channels=16, channel_multipliers=[1, 2], groups=4).eval()
    for weight in network.parameters():  # the last layers start at zero
        torch.nn.init.normal_(weight, std=0.1)
    return Denoiser(network, Linear(), Eps()).requires_grad_(False)


@pytest.mark.parametrize(
    ("precision", "weights"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)]
)
def test_bfloat16_is_near_float32_and_only_inside_the_network(precision, weights):
    plain, fast = denoiser(), denoiser()
    set_precision(fast, precision)
    assert next(fast.network.parameters()).dtype == weights
    x, level = torch.randn(4, 1, 8, 8), Linear()([500.0]).scalars()[0]
    expected, found = plain(x, level).eps, fast(x, level).eps
    assert found.dtype == torch.float32
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.03
    set_precision(plain, "32-true")
    assert torch.equal(plain(x, level).eps, expected)


def test_the_weaker_run_of_a_guidance_is_found():
    weak = denoiser()
    wrappers = (partial(AutoGuidance, scale=2.0, weak=weak),)
    assert guides_in(Recipe(DDIM(), Trailing(), 4, wrappers, Pixels((1, 8, 8)), None, seed=0)) == [weak]
