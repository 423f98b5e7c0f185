"""Alignment with a frozen encoder: values, what the encoder sees, processes, resuming, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.cli.test_bad_input import assert_one_line
from tests.model.networks import small
from tests.training.test_few_step import SMALL, weights_of
from tests.training.test_regularizer import SHAPE, batch, module_of

timm = pytest.importorskip("timm")

from src.training.regularizer import Dispersive  # noqa: E402
from src.training.repa import REPA, TimmEncoder  # noqa: E402

MODEL = "test_vit.r160_in1k"  # 0.4M weights, images of 160 pixels, patches of 16, 64 features


def file_of_weights(folder: Path, seed: int = 0) -> Path:
    """A file of random weights, with the classifier."""
    torch.manual_seed(seed)
    path = folder / f"encoder_{seed}.safetensors"
    save_file(timm.create_model(MODEL).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(file_of_weights(tmp_path_factory.mktemp("encoder")))


def test_the_encoder_sees_what_timm_says(weights):
    encoder = TimmEncoder(MODEL, weights)
    assert encoder.settings["input_size"] == (3, 160, 160)
    images = 2 * torch.rand(2, 1, 160, 160, generator=torch.Generator().manual_seed(0)) - 1
    mean, std = (torch.tensor(encoder.settings[name])[:, None, None] for name in ("mean", "std"))
    expected = encoder.network.forward_features(((images + 1) / 2 - mean) / std)[:, 1:]  # without class token
    found = encoder(images)
    assert found.shape == (2, 64, 10, 10)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected)
    assert not any(parameter.requires_grad for parameter in encoder.network.parameters())


def test_a_hidden_state_equal_to_the_features_gives_minus_one(weights):
    """For tokens and for maps; class tokens and the length of the vectors do not count."""
    x0 = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    for name, grid in (("jit", (4, 4)), ("adm", (4, 4))):
        loss = REPA(small(name, num_classes=3), SHAPE, MODEL, weights, weight=0.25, width=8)
        features = nn.functional.interpolate(loss.encoder(x0), grid, mode="bilinear", antialias=True)
        hidden = 3 * features
        if name == "jit":
            hidden = torch.cat((torch.randn(2, 2, 64), hidden.flatten(2).transpose(1, 2)), dim=1)
        loss.projector = nn.Identity()
        assert loss.term(hidden, x0).item() == pytest.approx(-1, abs=1e-6)
        assert loss([hidden], x0).item() == pytest.approx(-0.25, abs=1e-6)
        assert loss.term(-hidden, x0).item() == pytest.approx(1, abs=1e-6)
        # the mean over patches: two images of which one is opposite
        sign = torch.tensor([1.0, -1.0]).reshape(2, *[1] * (hidden.dim() - 1))
        assert loss.term(sign * hidden, x0).item() == pytest.approx(0, abs=1e-6)


def test_the_projector_is_trained_and_the_encoder_is_not(weights):
    network = small("dit")
    regularizer = REPA(network, SHAPE, MODEL, weights, width=8)
    assert regularizer.layer == "blocks.0"
    module = module_of(network, regularizer)
    trained = {name for name, _ in module.named_parameters() if name.startswith("regularizer")}
    assert trained == {f"regularizer.projector.{n}.{kind}" for n in (0, 2, 4) for kind in ("weight", "bias")}
    assert not any("encoder" in name for name in module.state_dict())
    loss = module.training_step(batch(), 0)
    loss["loss"].backward()
    assert all(parameter.grad.any() for parameter in regularizer.parameters())
    assert -0.5 <= loss["regularizer"] <= 0.5
    optimizer = module.configure_optimizers()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.parameters()))


class Step(nn.Module):
    """What Lightning makes of a training step: DDP calls `forward`."""

    def __init__(self, weights: str, kind: str):
        super().__init__()
        network = small("dit")
        torch.manual_seed(0)
        options = (MODEL, weights, 0.5, 8) if kind == "repa" else ()
        regularizer = {"repa": REPA, "dispersive": Dispersive}[kind](network, SHAPE, *options)
        self.module = module_of(network, regularizer).double()

    def forward(self, part):
        return self.module.training_step(part, 0)["loss"]


def trained(rank: int, world_size: int, weights: str, kind: str) -> torch.Tensor:
    """All weights after two steps."""
    step = Step(weights, kind)
    called = DistributedDataParallel(step) if world_size > 1 else step
    optimizer = torch.optim.SGD(step.parameters(), 0.1)
    rows = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    whole = batch()
    for _ in range(2):
        part = type(whole)(whole.images[rows], whole.condition, whole.positions[rows])
        optimizer.zero_grad()
        called(part).backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in step.parameters()])


def one_process(rank: int, world_size: int, folder: Path, weights: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    found = [trained(rank, world_size, weights, kind) for kind in ("repa", "dispersive")]
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_where_the_term_is_of_single_images(tmp_path, weights):
    torch.multiprocessing.spawn(one_process, args=(2, tmp_path, weights), nprocs=2)
    (repa, dispersive), other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(repa, other[0])
    assert torch.equal(dispersive, other[1])
    assert (repa - trained(0, 1, weights, "repa")).abs().max() < 1e-6  # the encoder computes in float32
    # pairs are those of a device
    assert (dispersive - trained(0, 1, weights, "dispersive")).abs().max() > 1e-5


@pytest.mark.slow
def test_training_resumes_bit_for_bit_with_the_same_encoder_only(command, tmp_path, capfd):
    path = file_of_weights(tmp_path)
    options = ["regularizer=repa", f"regularizer.model={MODEL}", f"regularizer.weights={path}"]
    options += [*SMALL, "regularizer.width=8"]
    for folder, steps in (("whole", 4), ("half", 2)):
        run = [f"trainer.max_steps={steps}", f"hydra.run.dir={tmp_path / folder}"]
        assert command("train", *options, *run) == 0
    resumed = ["train", f"ckpt={tmp_path / 'half'}", "trainer.max_steps=4", "logger=csv"]
    capfd.readouterr()
    assert command(*resumed, f"regularizer.weights={file_of_weights(tmp_path, 1)}") == 2
    assert_one_line(capfd.readouterr().err, [f"regularizer.weights: this training began with {MODEL}"])
    path = path.rename(tmp_path / "moved.safetensors")
    assert command(*resumed) == 2
    assert_one_line(capfd.readouterr().err, ["encoder_0.safetensors: no such file; give the weights of"])
    assert command(*resumed, f"regularizer.weights={path}") == 0
    whole, half = (weights_of(tmp_path / folder, 4) for folder in ("whole", "half"))
    assert all(torch.equal(weight, half[key]) for key, weight in whole.items() if torch.is_tensor(weight))
    checkpoint = torch.load(tmp_path / "half" / "checkpoints" / "step_00000004.ckpt")
    assert "regularizer.projector.0.weight" in half
    assert not any("projector" in name for name in checkpoint["callbacks"]["EMA"]["weights"])
    # the encoder is not needed afterwards
    path.unlink()
    assert (
        command("sample", f"run={tmp_path / 'half'}", "n=2", "sampler.steps=2", f"out={tmp_path / 'o'}") == 0
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "regularizer.weights=null: give the file of timm's weights of vit_base_patch14_dinov2.lvd142m"),
        (["regularizer.weights=none.pth"], "regularizer.weights=none.pth: no such file; give the weights of"),
        (
            ["regularizer.model=hf-hub:some/model", "regularizer.weights={file}"],
            "regularizer.model='hf-hub:some/model': timm has no such network",
        ),
        (
            ["regularizer.model=test_vit2", "regularizer.weights={file}"],
            "these are not the weights of test_vit2",
        ),
        (
            [f"regularizer.model={MODEL}", "regularizer.weights={file}", "regularizer.layer=time_embedding"],
            "regularizer.layer='time_embedding': its output is no map or sequence of patches",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(options, words, weights, command, capfd):
    options = [option.format(file=weights) for option in options]
    assert command("train", *SMALL[:4], "regularizer=repa", *options) == 2
    assert_one_line(capfd.readouterr().err, [words])
