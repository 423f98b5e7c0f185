"""Time of a training step, compared with diffusers' network and helpers in a plain loop.

    python -m benchmarks.training                   # the DDPM network at a quarter of its width, 28x28x1, batch 128
    python -m benchmarks.training --full --batch 16 # the 35.7M-parameter network, 32x32x3

A step: draw times and noise, diffuse, forward, backward, clip at 1, Adam, EMA. This project's rows use the parts of
`src.training` in Lightning's loop; the others are the usual script with `UNet2DModel`, `EMAModel` and
`DDPMScheduler.add_noise`. Both networks have the same layers and parameters. The table shows medians of wall time and
of this process's CPU time, which is the better measure on a shared machine.
"""

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table
from torch.nn.functional import mse_loss
from torch.optim import Adam

from src.data.datamodule import ImageDataModule
from src.data.source import ImageSource, InMemoryImages
from src.diffusion.denoiser import Denoiser
from src.diffusion.loss import DenoisingLoss
from src.diffusion.parameterization import Eps
from src.diffusion.schedule import Linear
from src.diffusion.time_sampling import Uniform
from src.diffusion.weighting import Simple
from src.model import UNet
from src.runs.machine import keep_freed_memory
from src.training.ema import EMA
from src.training.module import DiffusionModule


class Noise(ImageSource):
    """Random pixels."""

    name = "noise"

    def _load(self, split):
        shape = (1024, self.channels, self.image_size, self.image_size)
        return InMemoryImages(torch.randint(0, 256, shape, dtype=torch.uint8), None)


class Clock(Callback):
    """Wall and CPU seconds of each step."""

    def __init__(self):
        self.steps: list[tuple[float, float]] = []

    def on_train_batch_start(self, *_):
        self.start = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer, *_):
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.steps.append((time.perf_counter() - self.start[0], time.process_time() - self.start[1]))


def ours(size: dict, batch: int, steps: int, precision: str) -> Iterator[list[tuple[float, float]]]:
    """Rounds of steps of this project's training; yields the times of each round."""
    keep_freed_memory()
    network = UNet(**size, attention_factors=(2,), groups=size["base_channels"] // 4)
    loss = DenoisingLoss(Denoiser(network, Linear(), Eps()), Simple(), Uniform())
    ema, clock = EMA(), Clock()
    module = DiffusionModule(loss, lambda p: Adam(p, 2e-4, fused=True), None, ema, seed=0, batch_size=batch)
    data = ImageDataModule(Noise(size["image_size"], size["channels"], 0, True), batch, seed=0)
    while True:
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            precision=precision,
            max_steps=steps,
            gradient_clip_val=1.0,
            callbacks=[ema, clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
        )
        ema.updates = 0
        trainer.fit(module, data)
        yield clock.steps[-steps:]


def usual(size: dict, batch: int, steps: int, autocast: bool) -> Iterator[list[tuple[float, float]]]:
    """The same with diffusers' parts in a plain loop."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    widths = [size["base_channels"] * m for m in size["channel_multipliers"]]
    plain = ["Down"] * len(widths)
    down = ["AttnDownBlock2D" if i == 1 else f"{name}Block2D" for i, name in enumerate(plain)]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    network = UNet2DModel(
        sample_size=size["image_size"],
        in_channels=size["channels"],
        out_channels=size["channels"],
        layers_per_block=2,
        block_out_channels=widths,
        down_block_types=down,
        up_block_types=up,
        norm_num_groups=size["base_channels"] // 4,
        norm_eps=1e-6,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    ).to(device)
    scheduler, optimizer = DDPMScheduler(), Adam(network.parameters(), 2e-4)
    ema = EMAModel(network.parameters(), decay=0.9999)
    images = (
        torch.rand(batch, size["channels"], size["image_size"], size["image_size"], device=device) * 2 - 1
    )
    while True:
        times = []
        for _ in range(steps):
            start = time.perf_counter(), time.process_time()
            t = torch.randint(0, 1000, (batch,), device=device)
            noise = torch.randn_like(images)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                output = network(scheduler.add_noise(images, noise, t), t).sample
            loss = mse_loss(output.float(), noise)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            ema.step(network.parameters())
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        yield times


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the 35.7M-parameter network at 32x32x3")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each of --steps steps of every row")
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    size = {"image_size": 28, "channels": 1, "base_channels": 32, "channel_multipliers": (1, 2, 2)}
    if arguments.full:
        size = {"image_size": 32, "channels": 3, "base_channels": 128, "channel_multipliers": (1, 2, 2, 2)}
    batch, steps = arguments.batch, arguments.steps
    # diffusers first: keeping freed memory is a setting of the process and cannot be undone
    rows: dict[str, Callable[[], Iterator]] = {
        "diffusers, float32": lambda: usual(size, batch, steps, False),
        "diffusers, bfloat16 autocast": lambda: usual(size, batch, steps, True),
        "ours, float32": lambda: ours(size, batch, steps, "32-true"),
        "ours, bfloat16 autocast": lambda: ours(size, batch, steps, "bf16-mixed"),
    }
    console = Console(width=100)
    measured: dict[str, list[tuple[float, float]]] = {}
    for name, start in rows.items():
        running = start()
        next(running)  # warm-up
        measured[name] = [times for _ in range(arguments.rounds) for times in next(running)]
        console.print(name, style="dim")
    table = Table(
        "step", "wall s", "CPU s", "images/s", title=f"{size}, batch {batch}, torch {torch.__version__}"
    )
    for name, times in measured.items():
        wall, cpu = (median(values) for values in zip(*times, strict=True))
        table.add_row(name, f"{wall:.3f}", f"{cpu:.3f}", f"{batch / wall:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
