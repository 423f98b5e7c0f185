"""Images per second of `src.sample` and `src.evaluate`, beside the rate of the network alone.

    OMP_NUM_THREADS=1 python -m benchmarks.throughput [--data digits fashion_mnist] [--rounds 3] [--json FILE]
        [--options precision=bf16-mixed compile=true]

Rows: the network alone, with the same batches and number of evaluations; the sampling loop up to bytes; `src.sample`
with task=draw, which also writes files; and `src.evaluate` with the default score, its reference statistics cached
before. The digits have `unet_tiny`, Fashion-MNIST `unet_small`, with random weights. Rounds are interleaved, and shares
are of the network's rate in the same round, by the clock, and on a CPU also by the time of the process, in which other
load matters little; run it with one thread.
"""

import argparse
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from benchmarks.report import machine, spread, write_json
from src.app.evaluate import score_images
from src.app.jobs import register
from src.app.load import load_with
from src.app.sweep.jobs import composed
from src.generation.loaded import LoadedRun
from src.generation.tasks import Draw

# Network, images, batch and sampler steps.
SIZES = {"digits": ("unet_tiny", 512, 256, 20), "fashion_mnist": ("unet_small", 64, 64, 10)}


def untrained(folder: Path, data: str) -> Path:
    """A run of one step."""
    options = [f"data={data}", f"model={SIZES[data][0]}", "batch_size=2", "trainer.max_steps=1", "logger=csv"]
    options += ["metrics=none", "~callbacks.sample_images", "+trainer.limit_val_batches=0", "bands=none"]
    command = [sys.executable, "-m", "src.train", *options, f"hydra.run.dir={folder / data}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / data


def rows(loaded: LoadedRun, merged: DictConfig, config: DictConfig, folder: Path) -> dict[str, Callable]:
    """What is timed, by name; each makes config.n images."""
    recipe, denoiser = loaded.recipe, loaded.denoiser
    batches = [min(config.batch_size, config.n - i) for i in range(0, config.n, config.batch_size)]
    dtype = next(denoiser.network.parameters()).dtype

    @torch.no_grad()
    def alone() -> None:
        for size in batches:
            x = torch.randn(size, *recipe.codec.shape, device=loaded.device, dtype=dtype)
            label = torch.full((size,), 500.0, device=loaded.device)
            with torch.autocast(loaded.device.type, torch.bfloat16, enabled=denoiser.autocast is not None):
                for _ in range(recipe.steps):
                    denoiser.network(x, label)

    return {
        "network alone": alone,
        "sampling": lambda: list(recipe.images(denoiser, range(config.n), config.batch_size)),
        "src.sample": lambda: Draw().run(
            loaded, config.n, config.batch_size, Path(tempfile.mkdtemp(dir=folder))
        ),
        "src.evaluate": lambda: score_images(loaded, merged, config),
    }


def measure(
    data: str, folder: Path, rounds: int, options: Sequence[str]
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each row by the clock and of the process, `rounds` times."""
    _, n, batch, steps = SIZES[data]
    run = untrained(folder, data)
    chosen = [f"n={n}", f"batch_size={batch}", f"sampler.steps={steps}", *options]
    config = composed("evaluate", [f"run={run}", *chosen])
    loaded, merged = load_with(config)
    merged.metrics = composed("train", [f"data={data}"]).metrics
    calls = rows(loaded, merged, config, folder)
    for call in calls.values():  # compiles, caches the statistics of the reference
        call()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            before = clock(loaded.device)
            call()
            seconds[name].append(tuple(b - a for a, b in zip(before, clock(loaded.device), strict=True)))
    return seconds


def clock(device: torch.device) -> tuple[float, float]:
    """The time and the CPU seconds of this process, after the work of an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter(), time.process_time()


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--options", nargs="*", default=[], help="of src.evaluate, e.g. precision=bf16-mixed")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    register()
    console = Console(width=120)
    found = {}
    for data in arguments.data:
        model, n, batch, steps = SIZES[data]
        with tempfile.TemporaryDirectory() as folder:
            found[data] = measure(data, Path(folder), arguments.rounds, arguments.options)
        title = f"{data}, {model}: {n} images, batch {batch}, {steps} steps {' '.join(arguments.options)}"
        names = ("", "images/s", "CPU images/s", "of the network", "spread", "by CPU", "spread")
        table = Table(*names, title=title, caption=machine()["text"])
        for name, seconds in found[data].items():
            rates = [n / median(each) for each in zip(*seconds, strict=True)]
            cells = []
            for which in (0, 1):
                base = found[data]["network alone"]
                share = spread([b[which] / a[which] for a, b in zip(seconds, base, strict=True)])
                cells += [f"{share['median']:.3f}", share["text"]]
            table.add_row(name, *(f"{rate:.1f}" for rate in rates), *cells)
        console.print(table)
    write_json(
        arguments.json, {"seconds_and_cpu_seconds": found, "sizes": SIZES, "options": arguments.options}
    )


if __name__ == "__main__":
    main()
