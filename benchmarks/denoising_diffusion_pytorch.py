"""DDPM with the parts of denoising-diffusion-pytorch, for `benchmarks.fashion_mnist`.

Its GaussianDiffusion, Unet and EMA (ema_pytorch) are called in a loop of this file. Its Trainer reads image files,
begins another order of the images when it continues, and has no warm-up of the learning rate.
"""

from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.optim import Adam

from src.data.fashion_mnist import FashionMNIST
from src.data.stream import TrainingStream
from src.generation.pictures import read_images, save_images
from src.randomness import key
from src.runs.files import replacing
from src.training.lr_schedule import WarmUp

MULTIPLIERS = (1, 2, 2)
T, DROPOUT, RATE, WARM_UP, DECAY, CLIP = 1000, 0.1, 1e-3, 100, 0.9999, 1.0
"""Settings of conf/experiment/ddpm_fashion_mnist.yaml; a test compares them."""
AT_ONCE = 50
"""Images that are sampled at once."""
PREFIX = {"ema": "ema_model.", "raw": "online_model."}
"""Of the weights in the state of ema_pytorch's EMA."""


def unet(width: int) -> nn.Module:
    """Its network: linear attention at 28 and 14 pixels, full attention at 7, as by default."""
    from denoising_diffusion_pytorch import Unet

    return Unet(dim=width, dim_mults=MULTIPLIERS, channels=1, dropout=DROPOUT)


def parameters_of(network: nn.Module) -> int:
    """The number of a network's parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def closest_width(parameters: int) -> int:
    """The width with which its network has the closest number of parameters."""
    with torch.device("meta"):
        return min(range(8, 130, 2), key=lambda width: abs(parameters_of(unet(width)) - parameters))


def diffusion_of(width: int, ddim_steps: int | None = None) -> nn.Module:
    """Its diffusion with the linear schedule and eps; samples by DDIM with so many steps, None for ancestral."""
    from denoising_diffusion_pytorch import GaussianDiffusion

    options = {"objective": "pred_noise", "beta_schedule": "linear", "timesteps": T}
    return GaussianDiffusion(unet(width), image_size=28, sampling_timesteps=ddim_steps, **options)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint, step_<k>.*."""
    return int(checkpoint.stem.removeprefix("step_"))


def train(width: int, steps: int, batch_size: int, seed: int, save_every: int, folder: Path) -> None:
    """Trains on the batches of this project's training with this seed; continues from the last checkpoint.

    Args:
        width: of the network.
        steps: optimiser steps, over all starts.
        batch_size: images of a step.
        seed: decides weights, order of the images, times, noise and dropout.
        save_every: steps between checkpoints, <folder>/step_<k>.pt.
        folder: where; it is created.
    """
    from ema_pytorch import EMA

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    diffusion = diffusion_of(width)
    optimizer = Adam(diffusion.parameters(), RATE)
    schedule = WarmUp(optimizer, WARM_UP)
    average = EMA(diffusion, beta=DECAY, update_every=1)
    done = 0
    if found := sorted(folder.glob("step_*.pt"), key=step_of):
        content = torch.load(found[-1], weights_only=True)
        average.load_state_dict(content["average"])  # holds the network itself, too
        optimizer.load_state_dict(content["optimizer"])
        schedule.load_state_dict(content["schedule"])
        done = content["step"]
    stream = TrainingStream(FashionMNIST().split("train"), seed, batch_size, horizontal_flip=False)
    losses: list[float] = []
    for step in track(range(done, steps), "training", console=Console(stderr=True), disable=done >= steps):
        torch.manual_seed(key(seed, "package", step))  # the same draws after a resume
        batch = stream.__getitems__(range(step * batch_size, (step + 1) * batch_size))
        loss = diffusion(batch.images / 255)  # it rescales from [0, 1] to [-1, 1]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        average.update()
        losses.append(loss.item())
        if (step + 1) % save_every == 0 or step + 1 == steps:
            content = {"step": step + 1, "losses": losses, "average": average.state_dict()}
            content |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            with replacing(folder / f"step_{step + 1}.pt") as file:
                torch.save(content, file)
            print(f"package: step {step + 1}, loss {np.mean(losses):.4f}", flush=True)
            losses = []


def load(checkpoint: Path, width: int, weights: str, ddim_steps: int | None) -> nn.Module:
    """A trained diffusion in eval mode.

    Args:
        checkpoint: a file that `train` wrote.
        width: of the network.
        weights: "ema" or "raw".
        ddim_steps: see `diffusion_of`.
    """
    state = torch.load(checkpoint, weights_only=True)["average"]
    prefix = PREFIX[weights]
    diffusion = diffusion_of(width, ddim_steps)
    diffusion.load_state_dict(
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    )
    return diffusion.eval()


def sample(diffusion: nn.Module, n: int, seed: int, folder: Path) -> None:
    """Writes n images as <folder>/000000.png, ...; batches that exist are kept."""
    for first in range(0, n, AT_ONCE):
        numbers = range(first, min(first + AT_ONCE, n))
        if read_images(folder, numbers, 1) is not None:
            continue
        torch.manual_seed(key(seed, "package: sample", first))
        made = diffusion.sample(batch_size=len(numbers))
        save_images((made * 255).round().clamp(0, 255).to(torch.uint8), folder, first)
