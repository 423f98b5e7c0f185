"""Terms of the loss that read hidden activations: values and gradients, the layer that is read, trainings."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from src.conditioning import Condition
from src.data.codec import Pixels
from src.data.stream import Batch
from src.diffusion.denoiser import Denoiser
from src.diffusion.loss import DenoisingLoss
from src.diffusion.parameterization import V
from src.diffusion.schedule import Cosine
from src.diffusion.time_sampling import Uniform
from src.diffusion.weighting import Simple
from src.model import ForeignNetwork, UNet
from src.training.module import DiffusionModule
from src.training.regularizer import Dispersive, default_layer
from tests.cli.test_bad_input import assert_one_line
from tests.model.networks import small
from tests.training.test_few_step import SMALL

SHAPE = (1, 8, 8)
UNET = {"base_channels": 8, "channel_multipliers": (1, 1), "blocks_per_level": 1, "groups": 4}


def dispersive(network=None, **options):
    return Dispersive(small("dit") if network is None else network, SHAPE, **options)


def test_dispersive_values():
    loss = dispersive(temperature=0.5)
    pair = torch.zeros(2, 3, 4, dtype=torch.float64)
    pair[1, 0, 0] = 3.0  # squared distance 9, of 12 activations
    found = loss.term(pair, None)
    assert found.item() == pytest.approx(math.log((2 + 2 * math.exp(-9 / 12 / 0.5)) / 4), rel=1e-12)
    z = np.random.default_rng(0).normal(size=(5, 6))
    kernel = [[math.exp(-np.sum((a - b) ** 2) / 6 / 2.0) for a in z] for b in z]
    loss = dispersive(temperature=2.0, weight=0.25)
    assert loss([torch.tensor(z)], None).item() == pytest.approx(0.25 * math.log(np.mean(kernel)), rel=1e-12)
    # far apart, only the pairs of an image with itself are left
    assert loss.term(torch.tensor(z) * 1e4, None).item() == pytest.approx(-math.log(5), rel=1e-12)
    # the exponentials of large distances do not underflow in the gradient of their logarithm
    assert loss([torch.tensor(z).bfloat16()], None).dtype == torch.float32


def test_dispersive_gradient():
    loss = dispersive()
    z = torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda z: loss.term(z, None), z.requires_grad_())
    equal = torch.ones(3, 4, requires_grad=True)
    value = loss.term(equal, None)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert not equal.grad.any()  # a saddle, and finite


def test_the_layer_that_is_read():
    """A quarter of a transformer's blocks, the middle of a U-Net, or the named module."""
    for blocks, name in ((2, "blocks.0"), (4, "blocks.0"), (12, "blocks.2"), (28, "blocks.6")):
        stack = nn.Module()
        stack.blocks = nn.ModuleList(nn.Identity() for _ in range(blocks))
        assert default_layer(stack, Dispersive.depth_of) == name
    assert dispersive().hidden_shape == (16, 32)
    assert dispersive(small("jit", num_classes=3), layer="blocks.1").hidden_shape == (18, 32)
    for name in ("adm", "edm2"):
        found = dispersive(small(name, num_classes=3))
        assert (found.layer, found.hidden_shape) == ("middle.1", (32, 4, 4))
    unet = UNet(8, 1, **UNET, dropout=0.5)
    assert dispersive(unet).hidden_shape == (8, 4, 4)
    assert unet.training, "the trial changes nothing"
    foreign = ForeignNetwork(nn.Conv2d(1, 1, 3, padding=1), SHAPE)
    for network, layer, words in (
        (unet, "blocks.3", "layer='blocks.3': the network has no such module; choose another, e.g. middle.1"),
        (unet, "encoder", "layer='encoder': an evaluation of the network does not call it once"),
        (foreign, None, "layer=null: this network has neither blocks nor a middle"),
    ):
        with pytest.raises(ValueError, match="layer=") as raised:
            dispersive(network, layer=layer)
        assert str(raised.value).startswith(words)


def module_of(network, regularizer):
    torch.manual_seed(0)
    loss = DenoisingLoss(Denoiser(network, Cosine(8), V()), Simple(), Uniform())
    make = lambda p: torch.optim.SGD(p, 0.1)  # noqa: E731
    return DiffusionModule(loss, make, None, None, 0, 4, Pixels(SHAPE), regularizer=regularizer)


def batch():
    images = torch.randint(256, (4, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, Condition(), torch.arange(4))


@pytest.mark.parametrize("name", ["dit", "adm"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_term_is_added_to_the_loss(name, checkpointing):
    """Value and gradient equal those of the term of a hook set by hand; recomputed activations change nothing."""
    plain = small(name, dropout=0.0) if name == "adm" else small(name)
    expected = module_of(plain, None).training_step(batch(), 0)["loss"]
    network = small(name, checkpointing=checkpointing)
    regularizer = dispersive(network, weight=2.0)
    results = module_of(network, regularizer).training_step(batch(), 0)
    results["loss"].backward()
    seen = []
    with_hook = module_of(plain, None)
    plain.get_submodule(regularizer.layer).register_forward_hook(lambda *call: seen.append(call[2]))
    (with_hook.training_step(batch(), 0)["loss"] + 2 * regularizer.term(seen[0], None)).backward()
    assert results["regularizer"] < 0
    assert torch.equal(results["loss"], expected + results["regularizer"])
    assert torch.equal(results["losses"].mean(), expected)
    for (key, ours), theirs in zip(network.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=key)
    assert not any(part._forward_hooks for part in network.modules())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["coupling=optimal_transport", "batch_size=1"],
            "coupling: OptimalTransport compares images, and a micro-batch of a device has 1",
        ),
        (
            ["loss=contrastive", "conditioning=class", "batch_size=1"],
            "loss: ContrastiveLoss compares images, and a micro-batch of a device has 1",
        ),
        (["loss=contrastive"], "loss=contrastive: it separates images of different conditions"),
    ],
)
def test_what_compares_images_needs_them(options, words, command, capfd):
    assert command("train", *SMALL[:4], *options) == 2
    assert_one_line(capfd.readouterr().err, [words])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["regularizer.layer=blocks.1"], "regularizer.layer='blocks.1': the network has no such module"),
        (["regularizer.weight=0"], "regularizer.weight must be positive, got 0"),
        (["regularizer.temperature=-1"], "regularizer.temperature must be positive, got -1"),
        (["compile=true"], "compile=true: a compiled network has no hidden activations to read"),
        (["batch_size=1"], "regularizer: Dispersive compares images, and a micro-batch of a device has 1"),
        (
            ["experiment=shortcut_digits"],
            "regularizer: ShortcutLoss evaluates the network several times",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(options, words, command, capfd):
    assert command("train", *SMALL[:4], "regularizer=dispersive", *options) == 2
    assert_one_line(capfd.readouterr().err, [words])
