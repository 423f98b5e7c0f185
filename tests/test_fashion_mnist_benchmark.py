"""`benchmarks.fashion_mnist`: the package gets this project's settings, and stages continue; nothing is trained."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from benchmarks import denoising_diffusion_pytorch as package
from benchmarks import fashion_mnist
from src.app import jobs
from src.app.options import CONF
from src.data.given import open_given
from src.diffusion.clipping import StaticClipping
from src.diffusion.denoiser import Denoiser
from src.diffusion.parameterization import Eps
from src.diffusion.sampler import DDIM
from src.diffusion.schedule import Linear
from src.diffusion.spacing import Trailing


def test_the_package_gets_the_settings_of_the_experiment():
    jobs.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["experiment=ddpm_fashion_mnist"])
    assert tuple(config.model.channel_multipliers) == package.MULTIPLIERS
    assert config.model.dropout == package.DROPOUT
    assert (config.optimizer.lr, config.lr_schedule.warmup_steps) == (package.RATE, package.WARM_UP)
    assert list(config.optimizer.betas) == [0.9, 0.999]  # Adam's default, which the package gets
    assert (config.ema.decay, config.trainer.gradient_clip_val) == (package.DECAY, package.CLIP)
    assert (config.schedule.T, config.data.horizontal_flip) == (package.T, False)


def test_written_images_are_those_that_are_scored(tmp_path):
    pixels = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    path = fashion_mnist.write_npz(tmp_path / "samples" / "a.npz", pixels)
    assert torch.equal(open_given(str(path), "images").images.images(range(5)), pixels)
    assert torch.equal(fashion_mnist.first_images(path, 3), pixels[:3])
    assert fashion_mnist.side_by_side(pixels, pixels).height >= 28


def test_a_stage_continues_a_training_and_skips_a_finished_one(tmp_path, monkeypatch):
    commands = []

    def train(self, entry_point, *options):
        commands.append((entry_point, *options))
        steps = options[-1].partition("=")[2]
        folder = tmp_path / "ours" / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"step_{int(steps):08d}.ckpt").touch()

    monkeypatch.setattr(fashion_mnist.Benchmark, "_command", train)
    for steps in ("20", "20", "30"):
        fashion_mnist.main(["ours", "--runs", str(tmp_path), "--steps", steps, "--batch-size", "8"])
    first, second = commands
    assert {"experiment=ddpm_fashion_mnist", "batch_size=8"} <= set(first)
    assert second == ("train", f"ckpt={tmp_path / 'ours'}", "trainer.max_steps=30")
    assert "parameterization=v" not in first
    fashion_mnist.main(["ours_v", "--runs", str(tmp_path), "--batch-size", "8"])
    assert "parameterization=v" in commands[-1]
    with pytest.raises(SystemExit, match=r"--batch-size 16: .* has 8"):
        fashion_mnist.main(["ours", "--runs", str(tmp_path), "--batch-size", "16"])


def test_errors_in_the_mean_and_the_scale_of_an_image_are_told_apart():
    source = torch.Generator().manual_seed(0)
    noise, other = torch.randn(2, 3, 1, 28, 28, generator=source)
    offset = torch.tensor([0.5, -1, 2]).view(3, 1, 1, 1)
    error = 0.1 * other + offset + (offset - 1) * noise
    rest = fashion_mnist.without_mean_and_scale(error, noise)
    assert rest.mean((1, 2, 3)).abs().max() < 1e-12
    assert (rest * noise).mean((1, 2, 3)).abs().max() < 1e-12
    torch.testing.assert_close(rest, 0.1 * other.double(), atol=0.05, rtol=0)


class Linearly(nn.Module):
    """A network for both codes, whose output exceeds the range of images."""

    channels = out_dim = 1
    self_condition = False

    def forward(self, x, time, *_):
        return torch.sin(3 * x) * (1 + time.view(-1, 1, 1, 1) / 500)


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_both_codes_sample_the_same_images(steps):
    codes = pytest.importorskip("denoising_diffusion_pytorch")
    options = {"objective": "pred_noise", "beta_schedule": "linear", "sampling_timesteps": steps}
    diffusion = codes.GaussianDiffusion(Linearly(), image_size=28, **options)
    torch.manual_seed(0)
    theirs = diffusion.sample(batch_size=2) * 2 - 1
    torch.manual_seed(0)
    schedule = Linear()
    denoiser = StaticClipping(Denoiser(Linearly(), schedule, Eps()))
    *_, last = DDIM().trajectory(denoiser.eval(), torch.randn(2, 1, 28, 28), Trailing()(schedule, steps))
    torch.testing.assert_close(last.x, theirs, atol=1e-3, rtol=0)


def test_the_networks_have_equally_many_parameters():
    pytest.importorskip("denoising_diffusion_pytorch")
    ours = fashion_mnist.our_parameters(32)
    theirs = package.parameters_of(package.unet(package.closest_width(ours)))
    assert abs(theirs / ours - 1) < 0.05
