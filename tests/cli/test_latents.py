"""An autoencoder trained here, and a diffusion model of its latents, through the command line."""

import json
import shutil

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from src.app.parts import source_named
from src.diffusion.autoencoder import Autoencoder
from src.diffusion.distance import Absolute
from src.diffusion.loss import ReconstructionLoss
from src.diffusion.parameterization import Eps
from src.diffusion.schedule import Cosine
from src.interop.autoencoder import AutoencoderKL
from tests.cli.test_training import assert_identical, checkpoint, training_state
from tests.conftest import QUICK

diffusers = pytest.importorskip("diffusers")
SMALL = {"base_channels": 8, "channel_multipliers": (1, 1), "latent_channels": 2, "groups": 4}
TRAINING = (
    *QUICK,
    "experiment=autoencoder_digits",
    "data=digits",
    "metrics=none",
    "model.base_channels=8",
    "model.channel_multipliers=[1,1]",
    "model.latent_channels=2",
    "model.groups=4",
    "validate_every=3",
)


@torch.no_grad()
def test_loss_by_the_formula():
    torch.manual_seed(0)
    network = AutoencoderKL(8, 1, **SMALL, blocks_per_level=1).double()
    loss = ReconstructionLoss(Autoencoder(network, Cosine(T=10), Eps()), Absolute(), kl_weight=0.01)
    x = torch.rand(3, 1, 8, 8).double() * 2 - 1
    noise = torch.randn_like(x)
    q = network.module.encode(x).latent_dist
    assert q.mean.shape[1:] == network.latent_shape == (2, 4, 4)
    z = q.mean + q.std * noise.flatten(1)[:, :32].view(3, 2, 4, 4)
    error = (network.module.decode(z).sample - x).abs().mean(dim=(1, 2, 3))
    normal = Normal(torch.zeros_like(q.mean), 1)
    kl = kl_divergence(Independent(Normal(q.mean, q.std), 3), Independent(normal, 3))
    draws = loss.draw(3, torch.Generator())
    torch.testing.assert_close(loss(x, draws, noise), error + 0.01 * kl / 64, rtol=1e-6, atol=0)
    measures = loss.measure(x, draws, noise)
    mse = ((network.module.decode(q.mean).sample.clamp(-1, 1) - x) / 2).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(measures["mse"].double(), mse, rtol=1e-5, atol=0)
    torch.testing.assert_close(measures["psnr"].double(), 10 * (1 / mse).log10(), rtol=1e-5, atol=0)
    torch.testing.assert_close(measures["kl"].double(), kl, rtol=1e-5, atol=0)


@torch.no_grad()
def test_autoencoder_is_trained_resumed_written_and_used(command, only_run, tmp_path, capsys):
    def refused(words, *arguments):
        capsys.readouterr()
        assert command(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert words in error

    assert command("train", *TRAINING, "trainer.max_steps=6") == 0
    assert "src.export" in capsys.readouterr().out
    whole = only_run().rename(tmp_path / "whole")
    assert (whole / "samples/step_00000006.png").is_file()
    assert "val/psnr" in next((whole / "csv").rglob("metrics.csv")).read_text().splitlines()[0]
    assert command("train", *TRAINING, "trainer.max_steps=4") == 0
    run = only_run()
    assert command("train", f"ckpt={run}", "trainer.max_steps=6") == 0
    assert_identical(training_state(whole, 6), training_state(run, 6))

    refused("this run is an autoencoder", "sample", f"run={run}")
    refused("format=diffusers", "export", f"run={run}", "format=torch", "out=vae")
    assert command("export", f"run={run}", "out=vae") == 0
    assert "PSNR" in capsys.readouterr().out
    refused("not empty", "export", f"run={run}", "out=vae")
    assert {path.name for path in (tmp_path / "vae").iterdir()} == {
        *("config.json", "diffusion_pytorch_model.safetensors", "README.md", "reconstructions.png")
    }

    # diffusers loads the averaged weights, and its latents, scaled, have mean 0 and standard deviation 1
    network = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").eval()
    ours = AutoencoderKL(8, 1, **SMALL, blocks_per_level=1).eval()
    averages = next(s for name, s in checkpoint(run, 6)["callbacks"].items() if name.startswith("EMA"))
    ours.load_state_dict(averages["weights"])
    images = source_named("digits").split("train")
    x = images.images(range(len(images))).float() / 127.5 - 1
    mean = network.encode(x).latent_dist.mean
    reconstruction, ours_mean, _ = ours(x)
    assert torch.equal(mean, ours_mean)
    assert torch.equal(network.decode(mean).sample, reconstruction)
    std, mean = torch.std_mean((mean - network.config.shift_factor) * network.config.scaling_factor)
    assert std.item() == pytest.approx(1, abs=1e-3)
    assert mean.item() == pytest.approx(0, abs=1e-4)

    latent = [*QUICK, "experiment=latent_digits", "data=digits", "metrics=none"]
    latent += ["codec.folder=vae", f"codec.cache={tmp_path}", "trainer.max_steps=2", "hydra.run.dir=latent"]
    assert command("train", *latent) == 0
    assert command("sample", "run=latent", "n=2", "sampler.steps=2", "out=pictures") == 0
    assert json.loads((tmp_path / "pictures/recipe.json").read_text())["clipping"] == "none"
    refused("an autoencoder is trained on pixels", "train", *TRAINING, *latent[-4:-2], "codec=autoencoder_kl")
    shutil.rmtree(tmp_path / "vae")
    assert command("export", f"run={whole}", "weights=raw", "out=vae") == 0
    refused("is not that of the run's latents", "sample", "run=latent", "n=2", "out=others")
