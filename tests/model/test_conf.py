"""The presets of the group `model`, built with the image size and channels of the data."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from src.conditioning import Condition

GROUP = Path(__file__).parents[2] / "conf" / "model"


def build(name: str, image_size: int, channels: int, **arguments):
    return instantiate(
        OmegaConf.load(GROUP / f"{name}.yaml"), image_size=image_size, channels=channels, **arguments
    )


def size(network) -> int:
    return sum(weight.numel() for weight in network.parameters())


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("unet_tiny", 8),
        ("unet_tiny", 28),
        ("unet_tiny", 32),
        ("unet_small", 8),
        ("unet_small", 28),
        ("unet_small", 32),
        ("unet_ddpm", 8),
        ("unet_ddpm", 32),
    ],
)
def test_preset_runs_at(name, image_size):
    network = build(name, image_size, 3, num_classes=10, out_channels=6)
    assert network.image_shape == (3, image_size, image_size)
    assert (network.num_classes, network.out_channels) == (10, 6)
    x = torch.randn(2, 3, image_size, image_size)
    output = network(x, torch.tensor([0.0, 999.0]), Condition(labels=torch.tensor([3, 10])))
    assert output.shape == (2, 6, image_size, image_size)


def test_ddpm_preset_is_the_published_network():
    network = build("unet_ddpm", 32, 3)
    # the exact count of google/ddpm-cifar10-32, with the dropout of Ho et al. 2020, appendix B
    assert size(network) == 35_746_307
    assert network.encoder[0][0].dropout.p == 0.1


def test_ddpm_preset_suggests_a_fix_at_28_pixels():
    with pytest.raises(Exception, match="pad the images to 32 pixels, or give at most 3 channel_multipliers"):
        build("unet_ddpm", 28, 1)


def test_parameter_counts_match_the_comments():
    assert size(build("unet_small", 28, 1)) == pytest.approx(1.6e6, rel=0.05)
    assert size(build("unet_tiny", 8, 1)) == pytest.approx(0.28e6, rel=0.05)


@pytest.mark.parametrize("path", sorted(GROUP.glob("*.yaml")), ids=lambda path: path.stem)
def test_first_line_is_a_comment(path):
    assert path.read_text().startswith("# ")
