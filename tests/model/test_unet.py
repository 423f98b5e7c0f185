import math

import pytest
import torch
from torch import nn

from src.conditioning import Condition
from src.model import UNet
from src.model.blocks import Downsample, SelfAttention, Upsample, xavier


def tiny(**changes) -> UNet:
    arguments = {
        "base_channels": 16,
        "channel_multipliers": (1, 2),
        "blocks_per_level": 1,
        "groups": 8,
    }
    torch.manual_seed(0)
    return UNet(8, 1, **arguments | changes)


def perturbed(network: UNet) -> UNet:
    """Adds noise to all weights: the layers initialised to zero would mask the layers before them."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return network


def batch(size: int = 4, channels: int = 1, image_size: int = 8):
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(size, channels, image_size, image_size, generator=draw)
    return x, torch.linspace(0, 999, size)


def test_defaults_are_the_published_network():
    # 35.7 million in Ho et al. 2020, appendix B; the exact count is that of google/ddpm-cifar10-32.
    assert sum(weight.numel() for weight in UNet(32, 3).parameters()) == 35_746_307


def test_untrained_network_returns_exactly_zero():
    x, label = batch()
    assert torch.equal(tiny()(x, label), torch.zeros_like(x))


def test_untrained_blocks_add_nothing():
    network = tiny(channel_multipliers=(1, 1))
    x = torch.randn(2, 16, 8, 8)
    embedding = torch.randn(2, 64)
    assert torch.equal(network.encoder[0][0](x, embedding), x)
    assert torch.equal(network.middle[0](x, embedding), x)


def test_initial_weights_have_the_variance_of_the_ddpm_code():
    # Uniform in +-sqrt(6 / (fan_in + fan_out)); query, key and value count as three layers.
    limit = math.sqrt(6 / (64 * 9 + 128 * 9))
    weight = xavier(nn.Conv2d(64, 128, 3)).weight
    assert limit * 0.99 < weight.abs().max() <= limit
    torch.testing.assert_close(weight.std().item(), limit / math.sqrt(3), rtol=0.02, atol=0)

    limit = math.sqrt(6 / (64 + 64))
    weight = SelfAttention(64, 8).qkv.weight
    assert limit * 0.99 < weight.abs().max() <= limit


def test_downsampling_pads_at_the_right_and_the_bottom():
    downsample = Downsample(1)
    nn.init.ones_(downsample.conv.weight)
    nn.init.zeros_(downsample.conv.bias)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    # Sums of the 3x3 windows that start at even rows and columns.
    assert torch.equal(downsample(x)[0, 0], torch.tensor([[45.0, 39.0], [66.0, 50.0]]))


def test_attention_equals_its_formula():
    attention = SelfAttention(16, 4)
    with torch.no_grad():
        for weight in attention.parameters():
            weight.normal_(std=0.5)
    x = torch.randn(2, 16, 3, 5)

    pixels = attention.norm(x).flatten(2).mT
    query, key, value = attention.qkv(pixels).chunk(3, dim=-1)
    weights = torch.softmax(query @ key.mT / math.sqrt(16), dim=-1)
    expected = x + attention.projection(weights @ value).mT.reshape(x.shape)

    torch.testing.assert_close(attention(x), expected)


@pytest.mark.parametrize("attention_factors", [(), (1,), (2,), (1, 2)])
def test_attention_is_at_the_named_levels_and_in_the_middle(attention_factors):
    network = tiny(attention_factors=attention_factors)
    sides = []
    for module in network.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_hook(lambda module, args, output: sides.append(output.shape[-1]))
    network(*batch())
    assert set(sides) == {8 // factor for factor in attention_factors} | {4}


def test_gradient_reaches_every_parameter():
    network = perturbed(tiny(num_classes=3))
    x, label = batch()
    network(x, label, Condition(labels=torch.tensor([0, 1, 2, 3]))).square().sum().backward()
    without = [name for name, weight in network.named_parameters() if not weight.grad.abs().sum() > 0]
    assert without == []


def test_time_changes_the_output():
    network = perturbed(tiny())
    x, label = batch()
    assert (network(x, label) - network(x, label + 0.5)).abs().max() > 1e-3


def test_integer_and_float_labels_give_the_same_output():
    network = perturbed(tiny())
    x, _ = batch()
    label = torch.tensor([0, 3, 500, 999])
    assert torch.equal(network(x, label), network(x, label.float()))


def test_images_of_a_batch_do_not_mix():
    network = perturbed(tiny(num_classes=3)).eval()
    x, label = batch()
    condition = Condition(labels=torch.tensor([0, 1, 2, 3]))
    one_by_one = [network(x[i : i + 1], label[i : i + 1], condition.index([i])) for i in range(4)]
    torch.testing.assert_close(network(x, label, condition), torch.cat(one_by_one))


def test_class_changes_the_output_and_the_null_class_equals_no_condition():
    network = perturbed(tiny(num_classes=3))
    x, label = batch()
    first, second, null = (network(x, label, Condition(labels=torch.full((4,), i))) for i in (0, 1, 3))
    assert (first - second).abs().max() > 1e-3
    assert (first - null).abs().max() > 1e-3
    assert torch.equal(network(x, label), null)


def test_unconditional_network_refuses_classes():
    network = tiny()
    assert network.class_embedding is None
    x, label = batch()
    with pytest.raises(ValueError, match="num_classes > 0"):
        network(x, label, Condition(labels=torch.zeros(4, dtype=torch.long)))


def test_dropout_is_active_only_in_training():
    network = perturbed(tiny(dropout=0.5))
    x, label = batch()
    assert not torch.equal(network(x, label), network(x, label))
    network.eval()
    assert torch.equal(network(x, label), network(x, label))


def test_out_channels():
    assert tiny(out_channels=2)(*batch()).shape == (4, 2, 8, 8)
    assert tiny().out_channels == 1


def test_bf16_autocast_is_close_to_float32_with_gradients():
    network = perturbed(tiny())
    x, label = batch()
    expected = network(x, label)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(x, label)
    assert output.dtype == torch.bfloat16
    # bfloat16 has 8 bits of precision, and about twenty roundings accumulate.
    assert (output - expected).norm() < 0.05 * expected.norm()
    output.float().square().sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in network.parameters())


def test_channels_last_is_the_same_function():
    network = perturbed(tiny())
    x, label = batch()
    expected = network(x, label)
    channels_last = network.to(memory_format=torch.channels_last)
    output = channels_last(x.to(memory_format=torch.channels_last), label)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_float64_network_runs_in_float64():
    network = perturbed(tiny())
    x, label = batch()
    expected = network(x, label)
    output = network.double()(x.double(), label)
    assert output.dtype == torch.float64
    torch.testing.assert_close(output.float(), expected, rtol=1e-4, atol=1e-5)


def test_checkpointing_keeps_less_and_has_the_same_gradients():
    gradients, kept = [], []
    for checkpointing in (False, True):
        network = perturbed(tiny(dropout=0.5, checkpointing=checkpointing)).train()
        saved: list[torch.Tensor] = []
        x, label = batch()
        torch.manual_seed(3)  # of the dropout
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            loss = network(x, label).square().mean()
        loss.backward()
        gradients.append([weight.grad for weight in network.parameters()])
        kept.append(sum(t.numel() for t in saved))
    assert kept[1] < kept[0] / 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_graph_has_no_breaks():
    # The "eager" backend traces without generating code, which takes seconds instead of a minute.
    network = perturbed(tiny(num_classes=3))
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x, label = batch()
    condition = Condition(labels=torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(compiled(x, label, condition), network(x, label, condition))


@pytest.mark.slow
def test_compiled_network_is_the_same_function():
    """Slow: generates and compiles C++."""
    network = perturbed(tiny(num_classes=3))
    compiled = torch.compile(network, fullgraph=True)
    x, label = batch()
    condition = Condition(labels=torch.tensor([0, 1, 2, 3]))
    output = compiled(x, label, condition)
    torch.testing.assert_close(output, network(x, label, condition), rtol=1e-4, atol=1e-5)
    output.square().sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_size": 28, "channel_multipliers": (1, 2, 2, 2)},
            "2 times.*pad the images to 32.*at most 3",
        ),
        ({"image_size": 7, "channel_multipliers": (1, 2)}, "0 times.*pad the images to 8.*at most 1"),
        ({"groups": 32}, "groups=32 does not divide the 16 channels.*choose groups"),
        ({"base_channels": 12, "channel_multipliers": (2, 4)}, "groups=8 does not divide the 12 channels"),
        ({"groups": 0}, "groups is 0"),
        ({"base_channels": 2, "groups": 2}, "base_channels is 2: it must be even and at least 4"),
        ({"attention_factors": (16,)}, r"attention_factors \[16\].*downsampled by \[1, 2\]"),
        ({"channel_multipliers": ()}, "channel_multipliers is empty"),
        ({"blocks_per_level": 0}, "blocks_per_level is 0"),
        ({"dropout": 1.5}, "[Dd]ropout"),
    ],
)
def test_error_names_the_invalid_argument_and_a_fix(changes, message):
    arguments = {
        "image_size": 8,
        "channels": 1,
        "base_channels": 16,
        "channel_multipliers": (1, 2),
        "blocks_per_level": 1,
        "groups": 8,
    }
    with pytest.raises(ValueError, match=message) as error:
        UNet(**arguments | changes)
    assert "\n" not in str(error.value)


def test_a_condition_image_is_concatenated_to_the_input():
    network = perturbed(tiny(condition_channels=3))
    assert network.reads == {"image"}
    x, label = batch()
    image = torch.randn(4, 3, 8, 8)
    joined = nn.Conv2d(4, 16, 3, padding=1)
    with torch.no_grad():
        joined.weight.copy_(torch.cat([network.conv_in.weight, network.conv_condition.weight], dim=1))
        joined.bias.copy_(network.conv_in.bias + network.conv_condition.bias)
    expected = joined(torch.cat([x, image], dim=1))
    torch.testing.assert_close(network._first(x, Condition(image=image)), expected, rtol=1e-5, atol=1e-5)
    found = network(x, label, Condition(image=image))
    dropped = network(x, label, Condition(image=image).dropped())
    assert not torch.allclose(found, dropped)
    assert torch.equal(dropped, network(x, label))


def test_without_condition_channels_nothing_changes():
    plain, reading = tiny().state_dict(), tiny(condition_channels=1).state_dict()
    added = {"conv_condition.weight", "conv_condition.bias"}
    assert set(reading) - set(plain) == added
    assert all(torch.equal(plain[name], reading[name]) for name in plain)


def test_an_unread_image_is_refused():
    x, label = batch()
    with pytest.raises(ValueError, match=r"^the network reads no images"):
        tiny()(x, label, Condition(image=x))


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 5, 3, 6)])
def test_upsampling_on_the_cpu_equals_a_convolution_of_the_enlarged_input(shape):
    torch.manual_seed(3)
    layer = Upsample(shape[1]).double()
    nn.init.normal_(layer.conv.bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found, expected = layer(x), layer.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    into = torch.randn_like(found)
    parts = (x, layer.conv.weight, layer.conv.bias)
    for one, other in zip(
        torch.autograd.grad((found * into).sum(), parts),
        torch.autograd.grad((expected * into).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
