"""PSNR of super-resolution with a trained network and of interpolation, on the test split.

    python -m src.train conditioning=low_resolution trainer.max_steps=1000
    python -m benchmarks.super_resolution runs/... [samples per image]

The network's images are samples, so the mean of several samples is also measured. docs/editing.md has the figures.
"""

import sys

import torch
import torch.nn.functional as F

from src.app import jobs
from src.app.load import load
from src.app.stored import upgrade
from src.diffusion.sampler import PerImageNoise, last_image
from src.generation.restore import psnr
from src.runs.folder import find_run
from src.training.reading import read_checkpoint


def main() -> None:
    from omegaconf import OmegaConf

    jobs.register()
    torch.set_num_threads(1)
    found, samples = find_run(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8
    content = read_checkpoint(found.checkpoint)
    loaded = load(found, content, OmegaConf.create(upgrade(content["config"])))
    recipe, denoiser = loaded.recipe, loaded.denoiser
    images = loaded.source.split("test")
    numbers = range(len(images))
    truth = images.images(numbers)
    x0, condition = loaded.data("test", numbers)
    low, factor = recipe.conditioning.low(x0), recipe.conditioning.factor
    print(f"{len(images)} images, factor {factor}, {describe_steps(recipe)}")
    for mode in ("nearest", "bilinear", "bicubic"):
        print(
            f"{mode:<24}{psnr(recipe.codec.decode(F.interpolate(low, scale_factor=factor, mode=mode)), truth):.2f} dB"
        )
    times, total, of_one = recipe.times(denoiser.schedule), torch.zeros_like(x0), []
    for seed in range(samples):
        noise = PerImageNoise(seed, numbers)
        x_T = noise(x0) * denoiser.schedule(times[:1]).scalars()[0].sigma
        made = last_image(recipe.sampler.trajectory(recipe.around(denoiser), x_T, times, condition, noise))
        of_one.append(psnr(recipe.codec.decode(made), truth))
        total += made
    print(f"{'one sample':<24}{sum(of_one) / samples:.2f} dB")
    print(f"{f'mean of {samples} samples':<24}{psnr(recipe.codec.decode(total / samples), truth):.2f} dB")


def describe_steps(recipe) -> str:
    """The sampler and its number of steps."""
    return f"{recipe.sampler!r}, {recipe.steps} steps"


if __name__ == "__main__":
    main()
