"""Checks the U-Net against diffusers' `UNet2DModel`, an independent implementation of the same network."""

import pytest
import torch

from src.conditioning import Condition
from src.interop.diffusers import unet_from_diffusers, unet_to_diffusers
from src.model import UNet


def _diffusers_unet(**changes):
    from diffusers import UNet2DModel

    # The configuration of google/ddpm-cifar10-32
    published = {
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 2,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "attention_head_dim": None,
        "act_fn": "silu",
        "mid_block_scale_factor": 1,
        "time_embedding_type": "positional",
    }
    return UNet2DModel(**published | changes).eval()


def _published():
    return _diffusers_unet(), UNet(32, 3, dropout=0.1).eval()


def _class_conditional():
    theirs = _diffusers_unet(
        sample_size=8,
        in_channels=1,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=11,
    )
    ours = UNet(
        8,
        1,
        out_channels=2,
        num_classes=10,
        base_channels=16,
        channel_multipliers=(1, 2),
        blocks_per_level=1,
        attention_factors=(1,),
        groups=8,
    )
    return theirs, ours.eval()


@pytest.fixture(
    scope="module", params=[_published, _class_conditional], ids=["published", "class-conditional"]
)
def pair(request):
    torch.manual_seed(0)
    theirs, ours = request.param()
    # Move norm scales away from 1 and biases away from 0, so that swapped weights change the output.
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    ours.load_state_dict(unet_from_diffusers(theirs.state_dict()))
    return theirs, ours


@torch.no_grad()
def test_output_equals_diffusers(pair):
    theirs, ours = pair
    label = torch.tensor([0.0, 1.0, 17.25, 500.0, 998.5, 999.0])
    x = torch.randn(len(label), *ours.image_shape)
    labels = torch.tensor([0, 1, 4, 9, 10, 10]) if ours.num_classes else None
    condition = None if labels is None else Condition(labels=labels)

    expected = theirs(x, label, class_labels=labels).sample

    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, label, condition), expected, rtol=0, atol=1e-5)


def test_round_trip_returns_every_weight(pair):
    theirs, ours = pair
    back = unet_to_diffusers(ours.state_dict())
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], weight) for name, weight in theirs.state_dict().items())


def test_converted_weights_can_be_saved_as_safetensors(pair, tmp_path):
    from safetensors.torch import load_file, save_file

    back = unet_to_diffusers(pair[1].state_dict())
    save_file(back, tmp_path / "unet.safetensors")
    assert load_file(tmp_path / "unet.safetensors").keys() == back.keys()


def test_early_names_of_the_attention_layers_are_read(pair):
    theirs, ours = pair
    early_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    early = {}
    for name, weight in theirs.state_dict().items():
        for now, then in early_names.items():
            name = name.replace(f".{now}.", f".{then}.")
        early[name] = weight
    assert early.keys() != theirs.state_dict().keys()

    converted = unet_from_diffusers(early)

    assert converted.keys() == ours.state_dict().keys()
    assert all(torch.equal(converted[name], weight) for name, weight in ours.state_dict().items())


@pytest.mark.parametrize("convert", [unet_from_diffusers, unet_to_diffusers])
def test_unknown_weight_is_named_in_the_error(convert):
    with pytest.raises(ValueError, match=r"add_embedding\.linear_1\.weight is not a weight of a DDPM U-Net"):
        convert({"add_embedding.linear_1.weight": torch.zeros(1)})
