"""State dicts of published code against independent networks, hand-written names, and back bit for bit."""

import pytest
import torch
from azula.plugins.adm._src import unet
from torch import nn

from src.conditioning import Condition
from src.interop.links import HEAD_CHANNEL_PART, HEAD_PART_CHANNEL, Link, write_all
from src.interop.published import recognised
from src.model import DiT, ResamplingUNet, UNet

LABELS = torch.tensor([0.0, 17.25, 999.0])


def ours_of(network, side):
    options = {name: value for name, value in network.model.items() if name != "_target_"}
    made = {"UNet": UNet, "ResamplingUNet": ResamplingUNet, "DiT": DiT}[
        network.model["_target_"].rpartition(".")[2]
    ]
    channels = network.channels
    return made(
        side, channels, out_channels=channels * network.outputs, num_classes=network.num_classes, **options
    ).eval()


def assert_round_trip(network, weights):
    """Everything that sampling uses comes back with equal bits."""
    back = write_all(network.links, network.read(weights))
    assert back.keys() == weights.keys() - set(network.ignored)
    assert all(torch.equal(back[name], weights[name]) for name in back)


GUIDED = {
    "guided": {
        "resblock_updown": True,
        "num_head_channels": 64,
        "use_scale_shift_norm": True,
        "num_classes": 5,
    },
    "guided, new order": {"resblock_updown": True, "num_head_channels": 64, "use_new_attention_order": True},
    "improved": {"resblock_updown": False, "num_heads": 2, "use_scale_shift_norm": True, "out_channels": 6},
}


@pytest.mark.parametrize("name", GUIDED)
def test_openai_equals_the_authors_network(name):
    torch.manual_seed(0)
    sizes = {"model_channels": 64, "num_res_blocks": 1, "attention_resolutions": (2,), "channel_mult": (1, 2)}
    options = {"image_size": 8, "in_channels": 3, "out_channels": 3} | sizes | GUIDED[name]
    theirs = unet.UNetModel(**options).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    weights = theirs.state_dict()
    network = recognised(weights, attention_order="new" if "new" in name else "legacy")
    assert network.num_classes == GUIDED[name].get("num_classes", 0)
    ours = ours_of(network, 8)
    ours.load_state_dict(network.read(weights))
    x, classes = torch.randn(3, 3, 8, 8), torch.tensor([0, 2, 4]) if network.num_classes else None
    with torch.no_grad():
        expected = theirs(x, LABELS, **({} if classes is None else {"y": classes}))
        found = ours(x, LABELS, None if classes is None else Condition(labels=classes))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert_round_trip(network, weights)


def test_ddim_has_the_names_of_the_authors_code():
    torch.manual_seed(0)
    ours = UNet(
        8, 3, base_channels=32, channel_multipliers=(1, 2), blocks_per_level=1, attention_factors=(2,)
    )
    for weight in ours.parameters():
        nn.init.normal_(weight)
    # typed from the published checkpoints; attention by 1x1 convolutions, up.0 is the level of full resolution
    block = ("norm1", "conv1", "temb_proj", "norm2", "conv2")
    attention = ("norm", "q", "k", "v", "proj_out")
    layers = ["temb.dense.0", "temb.dense.1", "conv_in", "norm_out", "conv_out"]
    layers += ["down.0.downsample.conv", "up.1.upsample.conv"]
    for place in ("down.0.block.0", "down.1.block.0", "mid.block_1", "mid.block_2"):
        layers += [f"{place}.{layer}" for layer in block]
    for place in ("up.0.block.0", "up.0.block.1", "up.1.block.0", "up.1.block.1"):
        layers += [f"{place}.{layer}" for layer in (*block, "nin_shortcut")]
    layers += ["down.1.block.0.nin_shortcut"]
    for place in ("down.1.attn.0", "mid.attn_1", "up.1.attn.0", "up.1.attn.1"):
        layers += [f"{place}.{layer}" for layer in attention]
    names = {f"{layer}.{end}" for layer in layers for end in ("weight", "bias")}
    skeleton = {name: torch.zeros(1) for name in names}
    shapes = {"conv_in": (32, 3, 3, 3), "conv_out": (3, 32, 3, 3)}
    shapes |= {f"down.{level}.block.0.conv1": (width, 32, 3, 3) for level, width in enumerate((32, 64))}
    skeleton |= {f"{layer}.weight": torch.zeros(shape) for layer, shape in shapes.items()}
    links = recognised(skeleton).links
    theirs = write_all(links, ours.state_dict())
    assert theirs.keys() == names
    assert theirs["mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert torch.equal(theirs["up.1.block.0.conv1.weight"], ours.decoder[0][0].conv1.weight)
    network = recognised(theirs)
    assert_round_trip(network, theirs)
    again = ours_of(network, 8)
    again.load_state_dict(network.read(theirs))
    with torch.no_grad():
        x = torch.randn(3, 3, 8, 8)
        assert torch.equal(again(x, LABELS), ours.eval()(x, LABELS))


def edm_skeleton(adm, channels=3):
    """Names and sizes of a two-level network of EDM, typed from its checkpoints: 64 channels, 8x8, one block."""
    shapes = {"enc.8x8_conv": (64, channels, 3, 3), "map_layer0": (256, 64), "map_layer1": (256, 256)}
    scale = 2 if adm else 1

    def block(name, before, after, attention=False, skip=False):
        shapes.update({f"{name}.norm0": (before,), f"{name}.conv0": (after, before, 3, 3)})
        shapes.update({f"{name}.affine": (scale * after, 256), f"{name}.norm1": (after,)})
        shapes[f"{name}.conv1"] = (after, after, 3, 3)
        if skip:
            shapes[f"{name}.skip"] = (after, before, 1, 1)
        if attention:
            shapes.update({f"{name}.norm2": (after,), f"{name}.qkv": (3 * after, after, 1, 1)})
            shapes[f"{name}.proj"] = (after, after, 1, 1)

    block("enc.8x8_block0", 64, 64)
    block("enc.4x4_down", 64, 64, skip=not adm)
    block("enc.4x4_block0", 64, 128, attention=True, skip=True)
    block("dec.4x4_in0", 128, 128, attention=True)
    block("dec.4x4_in1", 128, 128)
    block("dec.4x4_block0", 256, 128, attention=adm, skip=True)
    block("dec.4x4_block1", 192, 128, attention=True, skip=True)
    block("dec.8x8_up", 128, 128, skip=not adm)
    block("dec.8x8_block0", 192, 64, skip=True)
    block("dec.8x8_block1", 128, 64, skip=True)
    shapes["out_norm" if adm else "dec.8x8_aux_norm"] = (64,)
    shapes["out_conv" if adm else "dec.8x8_aux_conv"] = (channels, 64, 3, 3)
    torch.manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        weights[f"model.{name}.weight"] = 0.1 * torch.randn(shape)
        weights[f"model.{name}.bias"] = 0.1 * torch.randn(shape[0])
    if adm:
        weights["model.map_label.weight"] = torch.randn(256, 5)
    else:
        weights["model.map_augment.weight"] = torch.randn(64, 9)
    weights["model.enc.4x4_down.conv0.resample_filter"] = torch.ones(1, 1, 2, 2) / 4
    return weights


@pytest.mark.parametrize("adm", [True, False])
def test_edm_fits_our_network_and_comes_back(adm):
    weights = edm_skeleton(adm)
    network = recognised(weights)
    ours = ours_of(network, 8)
    ours.load_state_dict(network.read(weights))  # every name and shape
    assert_round_trip(network, weights)
    assert (network.num_classes, network.side) == (5 if adm else 0, 8)
    if adm:  # classes are one-hot vectors, none is zero
        assert torch.equal(ours.embedding.classes.weight[2], weights["model.map_label.weight"][:, 2])
        assert not ours.embedding.classes.weight[5].any()


@pytest.mark.parametrize("rows", [HEAD_CHANNEL_PART, HEAD_PART_CHANNEL])
def test_rows_of_the_attention_by_the_reshape_of_the_authors(rows):
    heads, channels = 2, 3
    theirs = torch.arange(3.0 * heads * channels)
    if rows == HEAD_CHANNEL_PART:  # reshape(heads, channels, 3).unbind(2)
        parts = theirs.reshape(heads, channels, 3).unbind(2)
    else:  # reshape(heads, 3 channels).split(channels)
        parts = theirs.reshape(heads, 3 * channels).split(channels, dim=1)
    ours = Link("qkv", ("qkv",), rows=rows, heads=heads).read({"qkv": theirs}).reshape(3, heads, channels)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, parts, strict=True))


def test_time_embedding_of_the_authors_of_dit():
    """cos, then sin, of label 10000^(-i/half), through their first layer."""
    torch.manual_seed(0)
    theirs = nn.Linear(256, 32)
    weight = Link("w", ("w",), swapped=True).read({"w": theirs.weight.detach()})
    ours = DiT(8, 3, width=32, depth=1, heads=2, frequency_shift=0).embedding.time
    ours.linear1.weight.data.copy_(weight)
    ours.linear1.bias.data.copy_(theirs.bias.data)
    angles = LABELS[:, None] * 10000.0 ** (-torch.arange(128) / 128)
    expected = ours.linear2(nn.functional.silu(theirs(torch.cat((angles.cos(), angles.sin()), dim=1))))
    torch.testing.assert_close(ours(LABELS), expected, rtol=1e-4, atol=1e-4)


def test_dit_comes_back():
    torch.manual_seed(0)
    shapes = {"x_embedder.proj": (32, 4, 2, 2), "t_embedder.mlp.0": (32, 256), "t_embedder.mlp.2": (32, 32)}
    shapes |= {"final_layer.linear": (32, 32), "final_layer.adaLN_modulation.1": (64, 32)}
    for i in range(2):
        shapes |= {f"blocks.{i}.attn.qkv": (96, 32), f"blocks.{i}.attn.proj": (32, 32)}
        shapes |= {f"blocks.{i}.mlp.fc1": (128, 32), f"blocks.{i}.mlp.fc2": (32, 128)}
        shapes[f"blocks.{i}.adaLN_modulation.1"] = (192, 32)
    weights = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    weights |= {"y_embedder.embedding_table.weight": torch.randn(6, 32), "pos_embed": torch.randn(1, 16, 32)}
    network = recognised(weights)
    assert (network.num_classes, network.outputs, network.model["depth"]) == (5, 2, 2)
    ours_of(network, 8).load_state_dict(network.read(weights))
    assert_round_trip(network, weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.map_label.weight": torch.zeros(64, 10)}, "only the unconditional one and ADM"),
        ({"model.map_noise.freqs": torch.zeros(32)}, "NCSN"),
        ({"model.extra.weight": torch.zeros(1)}, "extra.weight is not a weight of this layout"),
    ],
)
def test_variants_that_do_not_fit_are_named(change, words):
    weights = edm_skeleton(adm=False) | change
    with pytest.raises(ValueError, match=words):
        recognised(weights).read(weights)
    with pytest.raises(ValueError, match="none of the known layouts"):
        recognised({"something.weight": torch.zeros(1)})
