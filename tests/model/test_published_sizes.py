"""Parameter counts at the published configurations, on the meta device."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

CONF = Path(__file__).parents[2] / "conf" / "model"
LATENTS = {"image_size": 32, "channels": 4, "out_channels": 8, "num_classes": 1000}
PIXELS = {"image_size": 256, "channels": 3, "num_classes": 1000}
EDM2_LATENTS = {"image_size": 64, "channels": 4, "num_classes": 1000}


def size(name: str, **arguments) -> tuple[int, int]:
    """Parameters, and the numbers in a DiT's fixed embedding of the positions, which its authors count too."""
    with torch.device("meta"):
        network = instantiate(OmegaConf.load(CONF / f"{name}.yaml"), **arguments)
    return sum(w.numel() for w in network.parameters()), getattr(network, "positions", torch.empty(0)).numel()


@pytest.mark.parametrize(
    ("name", "arguments", "millions"),
    [
        # Peebles & Xie 2023, table 4 and appendix A, which counts a patch size of 2
        ("dit_s", LATENTS, 33),
        ("dit_b", LATENTS, 130),
        ("dit_l", LATENTS, 458),
        ("dit_xl", LATENTS, 675),
        # Li & He 2025
        ("jit_b", PIXELS, 131),
        ("jit_l", PIXELS, 459),
        ("jit_h", PIXELS, 953),
        # Dhariwal & Nichol 2021, table 4
        ("unet_adm", {"image_size": 64, "channels": 3, "out_channels": 6, "num_classes": 1000}, 296),
        ("unet_adm_256", PIXELS | {"out_channels": 6}, 554),
        # Karras et al. 2022, table 7
        ("unet_ddpmpp", {"image_size": 32, "channels": 3}, 55.7),
        # Karras et al. 2024, table 2, and S on ImageNet 64
        ("unet_edm2", EDM2_LATENTS | {"base_channels": 128}, 125),
        ("unet_edm2", EDM2_LATENTS, 280),
        ("unet_edm2", EDM2_LATENTS | {"base_channels": 256}, 498),
        ("unet_edm2", EDM2_LATENTS | {"base_channels": 320}, 777),
        ("unet_edm2", EDM2_LATENTS | {"base_channels": 384}, 1119),
        ("unet_edm2", EDM2_LATENTS | {"base_channels": 448}, 1523),
        ("unet_edm2", EDM2_LATENTS | {"channels": 3}, 280),
    ],
)
def test_parameters_in_millions(name, arguments, millions):
    assert size(name, **arguments)[0] == pytest.approx(millions * 1e6, abs=0.5e6 if millions != 55.7 else 5e4)


def test_exact_counts():
    # the counts that the authors' programs print
    assert sum(size("dit_xl", **LATENTS)) == 675_129_632
    assert size("unet_adm_256", image_size=256, channels=3, out_channels=6)[0] == 552_814_086
    # with 9 x 128 weights for the augmentation, which is not part of this network
    assert size("unet_ddpmpp", image_size=32, channels=3)[0] + 9 * 128 == 55_733_891
