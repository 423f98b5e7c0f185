"""Seconds and peak memory of a training step, beside diffusers and denoising-diffusion-pytorch in plain loops.

    python -m benchmarks.training                   # the DDPM network at a quarter of its width, 28x28x1, batch 128
    python -m benchmarks.training --full --batch 64 # the 35.7M-parameter network, 32x32x3

A step is: draw times and noise, diffuse, forward, backward, clip at 1, Adam, EMA. Ours is Lightning's Trainer with the
parts of `src.training`. diffusers is the usual script around `UNet2DModel`, `EMAModel` and `DDPMScheduler.add_noise`;
its network has the same layers and parameters. denoising-diffusion-pytorch (measured if it is installed) is its
`GaussianDiffusion` and `EMA` with a `Unet` of the same widths, which has other layers.

Each row runs in a process of its own. Shown are the medians of wall time and of the process's CPU time, which is the
better measure on a shared machine, the range of the wall time, and the process's largest memory.
"""

import argparse
import importlib.util
import logging
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import Adam

from benchmarks.report import machine, spread, write_json
from src.data.codec import Pixels
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
        return InMemoryImages(torch.randint(0, 256, (1024, *self.image_shape), dtype=torch.uint8), None)


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


Times = list[tuple[float, float]]


def device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def ours(
    size: dict, batch: int, steps: int, bfloat16: bool, processes: int = 1, checkpointing: bool = False
) -> Times:
    """Times of steps of this project's training; with several processes, of this one (LOCAL_RANK)."""
    keep_freed_memory()
    network = UNet(
        **size, attention_factors=(2,), groups=size["base_channels"] // 4, checkpointing=checkpointing
    )
    loss = DenoisingLoss(Denoiser(network, Linear(), Eps()), Simple(), Uniform())
    ema, clock = EMA(), Clock()
    source = Noise(size["image_size"], size["channels"], 0, True)
    module = DiffusionModule(
        loss, lambda p: Adam(p, 2e-4, fused=True), None, ema, 0, batch, Pixels(source.image_shape)
    )
    trainer = Trainer(
        accelerator="auto",
        devices=processes,
        strategy="auto" if processes == 1 else "ddp",
        precision="bf16-mixed" if bfloat16 else "32-true",
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
    trainer.fit(module, ImageDataModule(source, batch, seed=0))
    return clock.steps


def plain_loop(
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    network: nn.Module,
    update_average: Callable[[], None],
    size: dict,
    batch: int,
    steps: int,
    bfloat16: bool,
) -> Times:
    """Times of steps of the usual loop: autocast loss, backward, clip, Adam, average."""
    where, optimizer = device(), Adam(network.parameters(), 2e-4)
    side = size["image_size"]
    images = torch.rand(batch, size["channels"], side, side, device=where) * 2 - 1
    times = []
    for _ in range(steps):
        start = time.perf_counter(), time.process_time()
        with torch.autocast(where.type, torch.bfloat16, enabled=bfloat16):
            loss = loss_of(images)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        update_average()
        if where.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return times


def diffusers(size: dict, batch: int, steps: int, bfloat16: bool) -> Times:
    """The same with diffusers' parts in a plain loop."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    widths = [size["base_channels"] * m for m in size["channel_multipliers"]]
    down = ["AttnDownBlock2D" if i == 1 else "DownBlock2D" for i in range(len(widths))]
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
    ).to(device())
    scheduler = DDPMScheduler()
    ema = EMAModel(network.parameters(), decay=0.9999)

    def loss_of(images: torch.Tensor) -> torch.Tensor:
        t = torch.randint(0, 1000, (batch,), device=images.device)
        noise = torch.randn_like(images)
        return mse_loss(network(scheduler.add_noise(images, noise, t), t).sample.float(), noise)

    return plain_loop(loss_of, network, lambda: ema.step(network.parameters()), size, batch, steps, bfloat16)


def checkpointed(size: dict, batch: int, steps: int, bfloat16: bool) -> Times:
    """Ours with activation checkpointing."""
    return ours(size, batch, steps, bfloat16, checkpointing=True)


def lucidrains(size: dict, batch: int, steps: int, bfloat16: bool) -> Times:
    """The same with denoising-diffusion-pytorch's parts in a plain loop."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA as Average

    network = Unet(
        dim=size["base_channels"],
        dim_mults=size["channel_multipliers"],
        channels=size["channels"],
        full_attn=tuple(i == 1 for i in range(len(size["channel_multipliers"]))),
    )
    diffusion = GaussianDiffusion(network, image_size=size["image_size"], objective="pred_noise").to(device())
    ema = Average(diffusion, beta=0.9999, update_every=1)
    return plain_loop(
        lambda images: diffusion(images / 2 + 0.5), diffusion, ema.update, size, batch, steps, bfloat16
    )


def row(run: Callable[..., Times], arguments: tuple) -> tuple[Times, int]:
    """The times after the first step, and the largest memory of this process in MiB."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    times = run(*arguments)[1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return times, torch.cuda.max_memory_allocated() // 2**20 if device().type == "cuda" else peak


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the 35.7M-parameter network at 32x32x3")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2, help="processes for each row")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each process, after one more")
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    size = {"image_size": 28, "channels": 1, "base_channels": 32, "channel_multipliers": (1, 2, 2)}
    if arguments.full:
        size = {"image_size": 32, "channels": 3, "base_channels": 128, "channel_multipliers": (1, 2, 2, 2)}
    codes: dict[str, Callable[..., Times]] = {
        "diffusers": diffusers,
        "ours": ours,
        "ours with checkpointing": checkpointed,
    }
    if importlib.util.find_spec("denoising_diffusion_pytorch"):
        codes["denoising-diffusion-pytorch"] = lucidrains
    rows = {
        f"{name}, {precision}": (run, precision == "bfloat16 autocast")
        for precision in ("float32", "bfloat16 autocast")
        for name, run in codes.items()
        if any(each in f"{name}, {precision}" for each in arguments.only)
    }
    console = Console(width=120)
    measured: dict[str, Times] = {name: [] for name in rows}
    memory: dict[str, int] = {}
    for _ in range(arguments.rounds):
        for name, (run, bfloat16) in rows.items():
            given = (size, arguments.batch, arguments.steps + 1, bfloat16)
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                times, memory[name] = pool.submit(row, run, given).result()
            measured[name] += times
            console.print(name, *(f"{wall:.2f}" for wall, _ in times), style="dim")
    title = f"{size}, batch {arguments.batch}\n{machine()['text']}"
    table = Table("step", "wall s", "range", "CPU s", "images/s", "of diffusers", "MiB", title=title)
    base = spread([wall for wall, _ in measured.get("diffusers, float32", [])] or [float("nan")])["median"]
    for name, times in measured.items():
        wall, cpu = (spread(values) for values in zip(*times, strict=True))
        speed = arguments.batch / wall["median"]
        ratio = base / wall["median"]
        numbers = (
            f"{wall['median']:.3f}",
            wall["text"],
            f"{cpu['median']:.3f}",
            f"{speed:.1f}",
            f"{ratio:.2f}x",
        )
        table.add_row(name, *numbers, str(memory[name]))
    console.print(table)
    results = {"size": size, "batch": arguments.batch, "seconds_wall_and_cpu": measured, "peak_MiB": memory}
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
