"""EDM2: magnitudes, forced weight normalisation, and that it survives averages and resuming."""

import math

import pytest
import torch
from torch import nn

from src.model.edm2 import MPBlock
from src.model.magnitude import MPFourier, MPLayer, mp_cat, mp_silu, mp_sum, unit_magnitude
from tests.model.networks import batch, small


def rms(x):
    return x.double().square().mean().sqrt().item()


def unit(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "output",
    [
        lambda x: mp_silu(x),
        lambda x: mp_sum(x, x.flip(0), 0.3),
        lambda x: mp_cat(x, x.flip(0)[:, :16], 0.5),
        lambda x: mp_cat(x, x.flip(0)[:, :16], 0.2),
        lambda x: MPLayer(64, 48, 1)(x),
        lambda x: MPLayer(64, 48, 3)(x)[..., 1:-1, 1:-1],
        lambda x: unit_magnitude(3 * x, [1]),
        lambda x: MPFourier(256)(x[:, 0, 0, 0]),
    ],
)
def test_unit_magnitude_is_preserved(output):
    torch.manual_seed(0)
    assert rms(output(unit(64, 64, 8, 8))) == pytest.approx(1, abs=0.03)


def test_concatenation_has_equal_parts_at_one_half():
    joined = mp_cat(unit(64, 64, 4, 4), unit(64, 16, 4, 4), 0.5)
    assert (joined[:, :64].square().sum() / joined[:, 64:].square().sum()).item() == pytest.approx(
        1, abs=0.03
    )


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("heads", [0, 4])
def test_blocks_preserve_magnitude(encoder, heads):
    torch.manual_seed(0)
    block = MPBlock(48, 64, encoder=encoder, heads=heads, embedding_channels=32, dropout=0.0)
    assert rms(block(unit(4, 48, 24, 24), unit(4, 32))) == pytest.approx(1, abs=0.1)


@torch.no_grad()
def test_encoder_and_attention_do_not_depend_on_the_magnitude_of_their_input():
    torch.manual_seed(0)
    block = MPBlock(48, 64, encoder=True, heads=4, embedding_channels=32, dropout=0.0)
    x, embedding = unit(2, 48, 8, 8), unit(2, 32)
    torch.testing.assert_close(block(5 * x, embedding), block(x, embedding), rtol=1e-3, atol=2e-3)
    x = unit(2, 64, 8, 8)
    torch.testing.assert_close(block._attention(5 * x), block._attention(x), rtol=1e-3, atol=2e-3)


def test_network_preserves_magnitude():
    torch.manual_seed(0)
    network = small("edm2", image_size=32, base_channels=32, out_channels=8)
    network.gain_out.data.fill_(1)
    x, label = batch(8, 1, 32, 32)
    assert rms(network(x, label)) == pytest.approx(1, abs=0.25)  # zeros beyond the border reduce it


def test_weights_of_any_magnitude_give_the_same_output():
    network = small("edm2")
    x, label = batch(2, 1, 8, 8)
    before = network(x, label)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, MPLayer):
                module.weight.mul_(3.0)
    torch.testing.assert_close(network(x, label), before, rtol=1e-3, atol=1e-3)
    network.after_optimizer_step()
    for module in network.modules():
        if isinstance(module, MPLayer):
            torch.testing.assert_close(
                module.weight.square().flatten(1).mean(1).sqrt(),
                torch.ones(len(module.weight)),
                atol=1e-3,
                rtol=0,
            )
    torch.testing.assert_close(network(x, label), before, rtol=1e-3, atol=1e-3)


def test_gradient_is_orthogonal_to_the_weights():
    """Equation 47 and its consequence: the magnitude would only grow (sec. 2.3)."""
    torch.manual_seed(0)
    layer = MPLayer(8, 6, 3)
    layer(unit(2, 8, 5, 5)).pow(3).sum().backward()
    along = (layer.weight * layer.weight.grad).flatten(1).sum(1)
    assert along.abs().max() < 1e-2 * layer.weight.grad.norm()
    weight = layer.weight.detach().clone()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert (layer.weight.flatten(1).norm(dim=1) > weight.flatten(1).norm(dim=1)).all()
    layer.normalise()
    assert layer.weight[0].norm().item() == pytest.approx(math.sqrt(72), rel=1e-3)


def test_layer_by_the_formula():
    layer = MPLayer(8, 6)
    nn.init.normal_(layer.weight, std=7.0)
    x = unit(3, 8)
    normalised = layer.weight / layer.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(x, 0.5), 0.5 * x @ normalised.T, rtol=1e-3, atol=1e-4)
