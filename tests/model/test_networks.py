"""Properties that every network has: shapes, conditions, a second time, checkpointing, compilation, derivatives."""

from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from src.conditioning import NO_CLASS, Condition
from src.model import EDM2
from tests.model.networks import SMALL, batch, small

every_network = pytest.mark.parametrize("name", SMALL)


@every_network
@torch.no_grad()
def test_shapes_and_an_untrained_network_that_returns_zero(name):
    network = small(name, trained=False, image_size=[8, 12], channels=2, out_channels=4)
    x, label = batch(3, 2, 8, 12)
    assert (network.image_shape, network.out_channels, network.reads) == ((2, 8, 12), 4, frozenset())
    assert torch.equal(network(x, label), torch.zeros(3, 4, 8, 12))
    assert small(name, image_size=[8, 12], channels=2, out_channels=4)(x, label).std() > 0.1


@every_network
@torch.no_grad()
def test_classes(name):
    network = small(name, num_classes=3)
    assert network.reads == {"labels"}
    x, label = batch(4, 1, 8, 8)
    condition = Condition(labels=torch.tensor([0, 1, 2, NO_CLASS]))
    output = network(x, label, condition)
    assert torch.equal(network(x, label, condition.dropped()), network(x, label))
    assert torch.equal(network(x, label, Condition(labels=torch.full((4,), 3))), network(x, label))
    changed = (output - network(x, label)).abs().amax((1, 2, 3)) > 1e-3
    assert changed.tolist() == [True, True, True, False]
    one_by_one = [network(x[i : i + 1], label[i : i + 1], condition.index([i])) for i in range(4)]
    torch.testing.assert_close(output, torch.cat(one_by_one), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="num_classes > 0"):
        small(name)(x, label, condition)


@every_network
@torch.no_grad()
def test_second_time_has_no_effect_at_initialisation_but_can_be_learned(name):
    plain, network = small(name, trained=False), small(name, trained=False, second_time=True)
    shared = {k: w for k, w in network.state_dict().items() if "second_time" not in k}
    assert shared.keys() == plain.state_dict().keys()
    assert all(torch.equal(w, plain.state_dict()[k]) for k, w in shared.items())
    (x, label), (_, other) = batch(2, 1, 8, 8), batch(2, 1)
    plain, network = small(name), small(name, second_time=True)
    torch.testing.assert_close(network(x, label, to_label=other + 1), plain(x, label))
    for parameter_name, weight in network.named_parameters():
        if "second_time" in parameter_name and not weight.any():
            nn.init.normal_(weight)
    assert (network(x, label, to_label=other + 1) - network(x, label)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="second_time=true"):
        plain(x, label, to_label=other)


@every_network
def test_gradients_reach_every_parameter_and_checkpointing_does_not_change_them(name):
    gradients, kept = [], []
    for checkpointing in (False, True):
        network = small(name, num_classes=3, checkpointing=checkpointing, **dropout(name)).train()
        (x, label), labels = batch(4, 1, 8, 8), torch.tensor([0, 1, 2, NO_CLASS])
        torch.manual_seed(3)  # of the dropout
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(keep, saved), lambda t: t):
            loss = network(x, label, Condition(labels=labels)).square().mean()
        loss.backward()
        gradients.append([weight.grad for weight in network.parameters()])
        kept.append(sum(t.numel() for t in saved))
        assert [k for k, w in network.named_parameters() if not w.grad.abs().sum() > 0] == []
    assert kept[1] < kept[0] / 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def keep(saved, t):
    saved.append(t)
    return t


def dropout(name):
    return {} if name in ("dit", "jit") else {"dropout": 0.5}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "dit" else pytest.mark.slow) for name in SMALL]
)
def test_compiles_without_graph_breaks(name):
    network = small(name, num_classes=3, checkpointing=True)
    (x, label), condition = batch(2, 1, 8, 8), Condition(labels=torch.tensor([0, NO_CLASS]))
    expected = network(x, label, condition)
    torch.compiler.reset()
    network.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(network(x, label, condition), expected)


@every_network
def test_forward_mode_derivative(name):
    """Of image and time, against a difference in float64, and its own gradient: what flow-map losses need."""
    network = small(name).double()
    x, label = (t.double() for t in batch(2, 1, 8, 8))
    dx, dlabel = torch.randn_like(x), torch.randn_like(label)
    value, slope = torch.func.jvp(network, (x, label), (dx, dlabel))
    torch.testing.assert_close(value, network(x, label))
    h = 2**-10
    plus, minus = (network(x + s * h * dx, label + s * h * dlabel) for s in (1, -1))
    # the time is embedded in float32
    torch.testing.assert_close(slope, (plus - minus) / (2 * h), rtol=1e-3, atol=1e-3)
    slope.square().mean().backward()
    assert all(w.grad is None or w.grad.isfinite().all() for w in network.parameters())
    assert sum(w.grad is not None and bool(w.grad.any()) for w in network.parameters()) > 5


@every_network
def test_learns_a_handful_of_digits(name):
    images, labels = load_digits(return_X_y=True)
    x0 = torch.from_numpy(images[:8]).float().view(8, 1, 8, 8) / 8 - 1
    condition = Condition(labels=torch.from_numpy(labels[:8]))
    network = small(name, trained=False, num_classes=10).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02 if isinstance(network, EDM2) else 0.003)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(30):
        t = torch.rand(8, generator=draw).view(8, 1, 1, 1)
        x_t = (1 - t) * x0 + t * torch.randn(x0.shape, generator=draw)
        loss = (network(x_t, 4 * t.flatten(), condition) - x0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        network.after_optimizer_step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


BAD = {
    "adm": {
        "image_size": [8, 9],
        "groups": 5,
        "head_channels": 3,
        "attention_factors": (4,),
        "decoder_attention": "x",
    },
    "edm2": {"image_size": [8, 9], "base_channels": 5, "head_channels": 3, "attention_factors": (4,)},
    "dit": {"patch_size": 3, "heads": 5, "width": 34, "norm": "batch", "depth": 0},
    "jit": {"heads": 16, "class_tokens_from": 2, "bottleneck": 0, "class_tokens": -1},
}


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in BAD for option in BAD[name]])
def test_bad_arguments_are_named_in_one_line(name, option):
    with pytest.raises(ValueError, match=rf"^{option}[ =]") as raised:
        small(name, **{option: BAD[name][option]})
    assert "\n" not in str(raised.value)


@every_network
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_half_precision(name, weights):
    """Mixed precision, and bfloat16 weights, give nearly the same output."""
    network = small(name, num_classes=3)
    (x, label), condition = batch(4, 1, 8, 8), Condition(labels=torch.tensor([0, 1, 2, NO_CLASS]))
    expected = network(x, label, condition)
    network.to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        output = network(x.to(weights), label, condition)
    output.float().square().mean().backward()
    assert (output - expected).abs().mean() < 0.05 * expected.abs().mean()
