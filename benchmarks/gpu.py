"""Throughput of training, sampling and scoring on a GPU. It has not been run on one; it is meant to take 8 minutes.

    python -m benchmarks.gpu [--json out.json]
    python -m benchmarks.gpu --smoke    # the same code with tiny networks, also on a CPU; its numbers mean nothing

Training rows: loss, backward, clip, fused Adam and EMA of random images on the device, without data loading. FLOPs are
counted by PyTorch for a forward pass, times 3. `peak` is the share of a measured product of two bfloat16 matrices.
`paper` is an estimate by arithmetic, not a measurement: the time if every product ran at `SHARE` of the measured peak.
Rows that would start after `LIMIT` are left out, and the table says so; a row that has begun is finished. The JSON is
written after each row. At the end parts of 50,000 images are timed (DDIM with 50 steps, InceptionV3 with random
weights), which give the minutes of the whole.
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.features import random_weights
from benchmarks.report import machine, spread, write_json
from benchmarks.training import diffusers, lucidrains
from src.diffusion.denoiser import Denoiser
from src.diffusion.loss import DenoisingLoss
from src.diffusion.parameterization import Eps
from src.diffusion.sampler import DDIM
from src.diffusion.schedule import Linear
from src.diffusion.spacing import Leading
from src.diffusion.time_sampling import Uniform
from src.diffusion.weighting import Simple
from src.metrics.features import InceptionFeatures
from src.model import DiT, Network, ResamplingUNet, UNet

LIMIT = 6 * 60  # seconds
# Share of the peak that good training code reaches on large GPUs.
SHARE = 0.2
IMAGES = 50_000


@dataclass(frozen=True)
class Row:
    """A measured training.

    Attributes:
        name: of the network.
        network: makes it.
        batch: images per step.
        precision: float32, tf32 or bfloat16 (autocast).
        compiled: None, or the mode of torch.compile; "reduce-overhead" uses CUDA graphs.
        channels_last: memory format.
    """

    name: str
    network: Callable[[], Network]
    batch: int
    precision: str
    compiled: str | None = None
    channels_last: bool = False

    @property
    def how(self) -> str:
        modes = {None: "eager", "default": "compiled", "reduce-overhead": "compiled, CUDA graphs"}
        return modes[self.compiled] + (", channels last" if self.channels_last else "")


def unet() -> UNet:
    return UNet(32, 3)


def ddpmpp() -> ResamplingUNet:
    return ResamplingUNet(
        32,
        3,
        base_channels=128,
        channel_multipliers=(2, 2, 2),
        blocks_per_level=4,
        attention_factors=(2,),
        decoder_attention="last",
        head_channels=None,
        scale_shift=False,
        project=True,
        skip_scale=0.5**0.5,
        dropout=0.13,
        groups=32,
    )


def dit_xl() -> DiT:
    return DiT(32, 4, width=1152, depth=28, heads=16)


def tiny() -> UNet:
    return UNet(8, 3, base_channels=16, channel_multipliers=(1, 2), blocks_per_level=1, groups=8)


def tiny_dit() -> DiT:
    return DiT(8, 4, width=32, depth=1, heads=2)


def rows(smoke: bool) -> list[Row]:
    """The trainings, the most informative first."""
    if smoke:
        return [
            Row("UNet, tiny", tiny, 2, "float32"),
            Row("UNet, tiny", tiny, 2, "bfloat16", channels_last=True),
            Row("DiT, tiny", tiny_dit, 2, "bfloat16"),
        ]
    compiled = {"compiled": "default", "channels_last": True}
    return [
        Row("UNet 35.7M", unet, 128, "float32"),
        Row("UNet 35.7M", unet, 128, "tf32"),
        Row("UNet 35.7M", unet, 128, "bfloat16"),
        Row("UNet 35.7M", unet, 128, "bfloat16", channels_last=True),
        Row("UNet 35.7M", unet, 512, "bfloat16", channels_last=True),
        Row("DiT-XL/2 on latents", dit_xl, 64, "bfloat16"),
        Row("DDPM++ 55.7M", ddpmpp, 128, "bfloat16", channels_last=True),
        Row("UNet 35.7M", unet, 128, "bfloat16", **compiled),
        Row("UNet 35.7M", unet, 512, "bfloat16", **compiled),
        Row("DiT-XL/2 on latents", dit_xl, 64, "bfloat16", "default"),
        Row("UNet 35.7M", unet, 128, "bfloat16", "reduce-overhead", channels_last=True),
        Row("DiT-XL/2 on latents", dit_xl, 64, "tf32"),
    ]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def set_float32(precision: str) -> None:
    """Lets products of float32 use TF32 for "tf32", and not for anything else."""
    chosen = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = chosen
    torch.backends.cudnn.conv.fp32_precision = chosen


def seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Of single calls, after three that warm up."""
    for _ in range(min(3, repeats)):
        run()
    times = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - start)
    return times


def training(row: Row, device: torch.device, repeats: int) -> tuple[list[float], float, float]:
    """Seconds of each step, FLOPs per step, and the largest memory in GiB (0 on a CPU)."""
    torch.manual_seed(0)
    set_float32(row.precision)
    network = row.network().to(device)
    x0 = torch.rand(row.batch, *network.image_shape, device=device) * 2 - 1
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x0[:1], torch.ones(1, device=device))
    if row.channels_last:
        network, x0 = (each.to(memory_format=torch.channels_last) for each in (network, x0))
    if row.compiled is not None:
        network.compile(mode=row.compiled)
    loss = DenoisingLoss(Denoiser(network, Linear(), Eps()), Simple(), Uniform())
    weights = list(network.parameters())
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.Adam(weights, 2e-4, fused=True)
    draw = torch.Generator().manual_seed(0)

    def step() -> None:
        draws, eps = loss.draw(row.batch, draw), torch.randn_like(x0)
        with torch.autocast(device.type, torch.bfloat16, enabled=row.precision == "bfloat16"):
            mean = loss(x0, draws, eps).mean()
        mean.backward()
        nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1e-4)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found = seconds(step, device, repeats)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return found, 3 * counter.get_total_flops() * row.batch, peak


def matmul_peak(device: torch.device, size: int) -> float:
    """FLOP/s of a product of two square bfloat16 matrices."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / median(seconds(lambda: a @ a, device, 10))


def sampling(network: Network, batch: int, steps: int, device: torch.device) -> float:
    """Images per second of DDIM with this many steps, in bfloat16."""
    denoiser = Denoiser(network.to(device).eval(), Linear(), Eps())
    x_t = torch.randn(batch, *network.image_shape, device=device)
    times = Leading()(denoiser.schedule, steps)

    @torch.no_grad()
    def run() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return DDIM()(denoiser, x_t, times)

    return batch / median(seconds(run, device, 1))


def scoring(batch: int, device: torch.device) -> float:
    """Images per second of InceptionV3's features."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        random_weights(path)
        features = InceptionFeatures(str(path)).to(device)
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, device=device)
    return batch / median(seconds(lambda: features(images), device, 2))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny networks, a few steps, on any device")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    smoke, console, began = arguments.smoke, Console(width=150), time.perf_counter()
    if not smoke and not torch.cuda.is_available():
        parser.error("there is no GPU here: choose --smoke, which tests the script on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    repeats = 2 if smoke else 20
    peak = matmul_peak(device, 256 if smoke else 8192)
    title = f"{machine()['text']}, bfloat16 product {peak / 1e12:.3g} TFLOP/s"
    columns = [
        "network",
        "batch",
        "precision",
        "how",
        "ms",
        "spread",
        "images/s",
        "TFLOP/s",
        "of peak",
        "GiB",
    ]
    table, results, left_out = Table(*columns, "paper, ms", title=title), [], []
    found: dict[str, Any] = {"peak_flops": peak, "training": results, "images_per_second": {}}
    for row in rows(smoke):
        if time.perf_counter() - began > LIMIT:
            left_out.append(f"{row.name}, batch {row.batch}, {row.precision}, {row.how}: no time was left")
            continue
        console.print(f"{row.name}, {row.precision}, {row.how}", style="dim")
        cells = [row.name, str(row.batch), row.precision, row.how]
        try:
            times, flops, memory = training(row, device, repeats)
        except torch.cuda.OutOfMemoryError:
            table.add_row(*cells, "out of memory")
            continue
        finally:
            torch.compiler.reset()
            torch.cuda.empty_cache()
        step = median(times)
        rate = (f"{flops / step / 1e12:.4g}", f"{flops / step / peak:.1%}", f"{memory:.1f}")
        table.add_row(*cells, *timed(times, row.batch), *rate, f"{flops / peak / SHARE * 1000:.1f}")
        description = {name: value for name, value in vars(row).items() if name != "name"}
        results.append(
            {**description, "network": row.name, "seconds": spread(times), "flops": flops, "GiB": memory}
        )
        write_json(arguments.json, found)
    size = {"image_size": 32, "channels": 3, "base_channels": 128, "channel_multipliers": (1, 2, 2, 2)}
    if smoke:
        size |= {"base_channels": 16, "channel_multipliers": (1, 2)}
    others = {"diffusers": diffusers}
    if importlib.util.find_spec("denoising_diffusion_pytorch"):
        others["denoising-diffusion-pytorch"] = lucidrains
    else:
        left_out.append("denoising-diffusion-pytorch: it is not installed")
    batch = 2 if smoke else 128
    for name, loop in others.items():
        for precision in ("float32", "bfloat16"):
            cells = [name, str(batch), precision, "eager"]
            if time.perf_counter() - began > LIMIT:
                left_out.append(f"{', '.join(cells)}: no time was left")
                continue
            set_float32(precision)
            try:
                times = [wall for wall, _ in loop(size, batch, repeats + 2, precision == "bfloat16")[2:]]
            except torch.cuda.OutOfMemoryError:
                table.add_row(*cells, "out of memory")
                continue
            table.add_row(*cells, *timed(times, batch))
            results.append(
                {"network": name, "batch": batch, "precision": precision, "seconds": spread(times)}
            )
            write_json(arguments.json, found)
    console.print(table)
    for line in left_out:
        console.print(f"left out: {line}")
    set_float32("float32")
    stages = found["images_per_second"]
    stages["sampling, DDIM with 50 steps"] = sampling(
        *((tiny(), 2, 5) if smoke else (unet(), 500, 50)), device
    )
    stages["features of InceptionV3"] = scoring(2 if smoke else 250, device)
    for name, speed in stages.items():
        console.print(
            f"{name}: {speed:,.1f} images/s, {IMAGES / speed / 60:.1f} minutes for {IMAGES:,} images"
        )
    write_json(arguments.json, found)


def timed(times: list[float], batch: int) -> tuple[str, str, str]:
    """The cells of a table: milliseconds, their range, and images per second."""
    step, low, high = (1000 * each for each in (median(times), min(times), max(times)))
    return f"{step:.4g}", f"{low:.4g}-{high:.4g}", f"{1000 * batch / step:.4g}"


if __name__ == "__main__":
    main()
