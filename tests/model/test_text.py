"""Cross-attention to text, and a UNet that reads text."""

import math

import pytest
import torch

from src.conditioning import Condition
from src.model import UNet
from src.model.blocks import CrossAttention
from tests.model.test_unet import perturbed, tiny


def text(n=4, length=5, width=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.tensor([3, 5, 1, 2])[:n, None]
    return Condition(tokens=torch.randn(n, length, width, generator=draw), mask=mask)


def inputs(n=4):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 8, 8, generator=draw), torch.arange(n) * 100.0


def test_cross_attention_equals_its_formula():
    torch.manual_seed(0)
    block = CrossAttention(64, 6, groups=8).double()  # two heads
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    x, condition = torch.randn(4, 64, 3, 2).double(), text()
    tokens = condition.tokens.double()
    for b in range(4):
        pixels = block.norm(x[b : b + 1])[0].flatten(1).T
        valid = block.token_norm(tokens[b, condition.mask[b]])  # masked tokens are left out, not weighted
        query = block.query(pixels)
        key, value = block.key_value(valid).chunk(2, dim=1)
        heads = []
        for head in (slice(0, 32), slice(32, 64)):
            weights = torch.softmax(query[:, head] @ key[:, head].T / math.sqrt(32), dim=1)
            heads.append(weights @ value[:, head])
        expected = x[b] + block.projection(torch.cat(heads, dim=1)).T.reshape(64, 3, 2)
        torch.testing.assert_close(block(x, tokens, condition.mask)[b], expected)


@pytest.mark.parametrize("pooled", [False, True])
class TestUNet:
    def network(self, pooled):
        return perturbed(tiny(token_channels=6, pooled_text=pooled))

    def test_masked_tokens_have_no_effect(self, pooled):
        network, (x, label), condition = self.network(pooled), inputs(), text()
        other = Condition(
            tokens=condition.tokens.masked_fill(~condition.mask[..., None], 7.0), mask=condition.mask
        )
        torch.testing.assert_close(network(x, label, condition), network(x, label, other), rtol=0, atol=0)

    def test_tokens_have_an_effect(self, pooled):
        network, (x, label) = self.network(pooled), inputs()
        difference = network(x, label, text()) - network(x, label, text(seed=1))
        assert (difference.abs().amax(dim=(1, 2, 3)) > 1e-3).all()

    def test_dropped_text_equals_no_text(self, pooled):
        network, (x, label), condition = self.network(pooled), inputs(), text()
        none = network(x, label)
        torch.testing.assert_close(network(x, label, condition.dropped()), none)
        assert none.isfinite().all()
        which = torch.tensor([True, False, True, False])
        some = network(x, label, condition.drop(which))
        torch.testing.assert_close(some[which], none[which])
        torch.testing.assert_close(some[~which], network(x, label, condition)[~which])

    def test_tokens_without_a_mask_are_all_valid(self, pooled):
        network, (x, label), condition = self.network(pooled), inputs(), text()
        whole = Condition(tokens=condition.tokens, mask=torch.ones(4, 5, dtype=torch.bool))
        assert torch.equal(network(x, label, whole), network(x, label, Condition(tokens=whole.tokens)))

    def test_gradient_reaches_every_parameter(self, pooled):
        network, (x, label) = self.network(pooled), inputs()
        network(x, label, text()).square().mean().backward()
        silent = [name for name, weight in network.named_parameters() if not weight.grad.abs().sum()]
        assert not silent

    def test_float16_tokens_under_autocast(self, pooled):
        network, (x, label), condition = self.network(pooled), inputs(), text()
        half = Condition(tokens=condition.tokens.half(), mask=condition.mask)
        torch.testing.assert_close(
            network(x, label, half), network(x, label, condition), rtol=0.01, atol=0.01
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = network(x, label, half).float()
        torch.testing.assert_close(rounded, network(x, label, condition), rtol=0.1, atol=0.1)


def test_the_other_layers_of_a_network_with_text_are_unchanged():
    plain, reading = (
        UNet(8, 1, base_channels=32, groups=8, channel_multipliers=(1, 1)),
        tiny(token_channels=6),
    )
    assert reading.reads == {"tokens"}
    assert tiny(token_channels=6, num_classes=3).reads == {"tokens", "labels"}
    assert not any("cross" in name or "text" in name or "null" in name for name in plain.state_dict())


def test_network_without_text_refuses_tokens():
    x, label = inputs()
    with pytest.raises(ValueError, match="token_channels"):
        tiny()(x, label, text())
