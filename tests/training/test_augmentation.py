"""Trainings with augmentation: what the network reads, resuming, sampling, and what is refused."""

from functools import partial

import pytest
import torch

from src.conditioning import Condition, GeometricAugmentation
from src.data.codec import Pixels
from src.diffusion.denoiser import Denoiser
from src.diffusion.loss import DenoisingLoss
from src.diffusion.parameterization import V
from src.diffusion.schedule import Cosine
from src.diffusion.time_sampling import Uniform
from src.diffusion.weighting import Simple
from src.model import UNet
from src.training.module import DiffusionModule
from tests.cli.test_bad_input import assert_one_line
from tests.model.networks import small
from tests.training.test_few_step import SMALL, weights_of
from tests.training.test_regularizer import SHAPE, UNET, batch

UNET_OF_8 = partial(UNet, 8, 1, **UNET)


def step_of(network, augmentation):
    loss = DenoisingLoss(Denoiser(network, Cosine(8), V()), Simple(), Uniform())
    module = DiffusionModule(loss, None, None, None, 0, 4, Pixels(SHAPE), augmentation=augmentation)
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    return module.training_step(batch(), 0)["loss"], seen[0], module


@pytest.mark.parametrize("name", ["unet", "adm", "ddpmpp", "dit", "jit"])
@torch.no_grad()
def test_every_network_learns_to_read_it_from_zero(name):
    make = UNET_OF_8 if name == "unet" else partial(small, name, trained=False)
    torch.manual_seed(0)
    plain = make().eval()
    torch.manual_seed(0)
    network = make(augment_channels=9).eval()
    assert network.reads == {"augment"}
    added = network.state_dict().keys() - plain.state_dict().keys()
    assert len(added) == 1
    assert all(torch.equal(weight, network.state_dict()[key]) for key, weight in plain.state_dict().items())
    for weight in (*network.parameters(), *plain.parameters()):
        torch.nn.init.normal_(weight, std=0.3)
    x, label, read = torch.randn(2, 1, 8, 8), torch.rand(2), Condition(augment=torch.randn(2, 9))
    assert torch.equal(network(x, label, Condition(augment=torch.zeros(2, 9))), network(x, label))
    assert (network(x, label, read) - network(x, label)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="augment_channels > 0"):
        plain(x, label, read)


def test_the_network_reads_how_an_image_was_transformed():
    with_layer = small("adm", augment_channels=9)
    with_layer.load_state_dict(small("adm").state_dict(), strict=False)
    plain, (x, _, condition), _ = step_of(small("adm"), None)
    assert condition is None
    # with probability 0 the loss is the plain one, bit for bit
    same, (unchanged, _, condition), _ = step_of(with_layer, GeometricAugmentation(0.0))
    assert torch.equal(same, plain)
    assert torch.equal(unchanged, x)
    assert not condition.augment.any()
    network = small("adm", augment_channels=9)
    loss, (_, _, condition), module = step_of(network, GeometricAugmentation(0.9))
    expected = GeometricAugmentation(0.9)(module.encode(batch()), torch.arange(4), 0, 4)[1]
    assert torch.equal(condition.augment, expected)
    loss.backward()
    assert network.embedding.augmentation.weight.grad.any()
    # validation shows the images as they are
    module.log_dict = lambda *_, **__: None
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    module.validation_step(batch(), 0)
    assert seen[0][2] is None


@pytest.mark.slow
def test_training_resumes_bit_for_bit_and_samples_read_zeros(command, tmp_path, monkeypatch):
    options = ["augmentation=edm", "augmentation.probability=0.5", "regularizer=dispersive", *SMALL]
    options += ["conditioning=class", "conditioning.dropout=0.2", "model.dropout=0.1"]
    for folder, steps in (("whole", 4), ("half", 2)):
        run = [f"trainer.max_steps={steps}", f"hydra.run.dir={tmp_path / folder}"]
        assert command("train", *options, *run) == 0
    assert command("train", f"ckpt={tmp_path / 'half'}", "trainer.max_steps=4", "logger=csv") == 0
    whole, half = (weights_of(tmp_path / folder, 4) for folder in ("whole", "half"))
    assert all(torch.equal(weight, half[key]) for key, weight in whole.items())
    assert half["loss.denoiser.network.augment_embedding.weight"].any()
    given = []

    def seen(embedding, condition, layer):
        given.append((condition.augment, layer))
        return embedding

    monkeypatch.setattr("src.model.unet.with_augmentation", seen)
    assert (
        command("sample", f"run={tmp_path / 'half'}", "n=2", "sampler.steps=2", f"out={tmp_path / 'o'}") == 0
    )
    assert given
    assert all(augment is None and layer.in_features == 9 for augment, layer in given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["model=unet_edm2", "model.base_channels=16", "model.head_channels=16"],
            "augmentation: EDM2 does not read how an image was transformed",
        ),
        (["augmentation.probability=2"], "augmentation.probability must be in [0, 1], got 2"),
        (
            ["coupling=optimal_transport"],
            "coupling=optimal_transport makes the noise depend on the augmentation",
        ),
        (
            ["data.horizontal_flip=true"],
            "data.horizontal_flip=true mirrors images without a note to the network",
        ),
        (["+model.augment_channels=3"], "model.augment_channels: the framework sets this option itself"),
    ],
)
def test_what_does_not_fit_is_one_line(options, words, command, capfd):
    assert command("train", *SMALL[:4], "augmentation=edm", *options) == 2
    assert_one_line(capfd.readouterr().err, [words])
