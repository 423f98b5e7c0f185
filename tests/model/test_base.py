"""The network interface: shapes, conditions, a second time, and adapters for networks of other packages."""

import pytest
import torch
from torch import nn

from src.conditioning import NO_CLASS, Condition
from src.model import ForeignNetwork, UNet, adapted


def small(trained=True, **arguments):
    """A UNet for 8x8 images; with `trained`, all weights but those of the second time are random."""
    torch.manual_seed(0)
    sizes = {"base_channels": 8, "channel_multipliers": [1, 2], "blocks_per_level": 1, "groups": 4}
    network = UNet(**{"image_size": 8, "channels": 1, **sizes, **arguments}).eval()
    for name, weight in network.named_parameters():
        if trained and not name.startswith("second_time"):
            nn.init.normal_(weight, std=0.2)
    return network


@torch.no_grad()
def test_images_need_not_be_square():
    network = small(image_size=[8, 12])
    assert network.image_shape == (1, 8, 12)
    x, label = torch.randn(2, 1, 8, 12), torch.tensor([3.0, 5.0])
    assert network(x, label).shape == x.shape
    # with transposed kernels, the transposed image gives the transposed output
    turned = small(image_size=[12, 8])
    turned.load_state_dict(
        {k: w.transpose(2, 3) if w.dim() == 4 else w for k, w in network.state_dict().items()}
    )
    torch.testing.assert_close(
        turned(x.transpose(2, 3), label), network(x, label).transpose(2, 3), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("size", [0, [8], [8, 0], [8, 8, 8]])
def test_invalid_image_size_is_refused(size):
    with pytest.raises(ValueError, match=r"^image_size must be"):
        small(image_size=size)


@torch.no_grad()
def test_dropped_labels_equal_no_condition():
    network = small(num_classes=3)
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 5.0])
    dropped = Condition(labels=torch.tensor([0, 2])).dropped()
    assert dropped.labels.tolist() == [NO_CLASS, NO_CLASS]
    assert torch.equal(network(x, label, dropped), network(x, label))
    assert not torch.equal(network(x, label, Condition(labels=torch.tensor([0, 2]))), network(x, label))


@torch.no_grad()
def test_second_time_has_no_effect_at_initialisation_but_can_be_learned():
    plain, network = small(trained=False), small(trained=False, second_time=True)
    x, label, other = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.0])
    shared = {k: w for k, w in network.state_dict().items() if not k.startswith("second_time")}
    assert shared.keys() == plain.state_dict().keys()
    assert all(torch.equal(w, plain.state_dict()[k]) for k, w in shared.items())
    network = small(second_time=True)
    assert torch.equal(network(x, label, to_label=other), network(x, label))
    nn.init.normal_(network.second_time_embedding.linear2.weight)
    assert not torch.equal(network(x, label, to_label=other), network(x, label, to_label=label))
    with pytest.raises(ValueError, match="second_time=true"):
        plain(x, label, to_label=other)


class Theirs(nn.Module):
    """A network like those of other packages: other argument names, and an object as output."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, sample, timestep, class_labels=None):
        bias = 0 if class_labels is None else class_labels.view(-1, 1, 1, 1)

        class Output:
            sample = None

        output = Output()
        output.sample = self.scale * x_plus(sample, timestep) + bias
        return output


def x_plus(x, t):
    return x + t.view(-1, 1, 1, 1)


def test_a_foreign_network_is_adapted():
    network = adapted(Theirs(), (1, 2, 2))
    assert isinstance(network, ForeignNetwork)
    assert (network.image_shape, network.out_channels, network.reads) == ((1, 2, 2), 1, {"labels"})
    x, label = torch.randn(2, 1, 2, 2), torch.tensor([3.0, 5.0])
    assert torch.equal(network(x, label), x_plus(x, label))
    labels = torch.tensor([1, 2])
    assert torch.equal(
        network(x, label, Condition(labels=labels)), x_plus(x, label) + labels.view(-1, 1, 1, 1)
    )


def test_networks_of_the_package_are_not_wrapped():
    network = small()
    assert adapted(network, (1, 8, 8)) is network


def test_a_diffusers_network_is_adapted():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 5.0])
    assert torch.equal(adapted(theirs, (1, 8, 8))(x, label), theirs(x, label).sample)
