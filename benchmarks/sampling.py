"""Cost of a sampling step outside the network, in microseconds: a two-pass floor, this project and diffusers.

    OMP_NUM_THREADS=1 python -m benchmarks.sampling [--device cuda] [--json FILE]

The network returns a stored tensor, so only the sampler is measured. The floor is x.mul_(a).add_(eps, alpha=b).
Needs an idle machine. The ratios use the lowest times, since other load can only increase a time.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.report import machine, spread, write_json
from src.diffusion.clipping import StaticClipping
from src.diffusion.denoiser import Denoiser
from src.diffusion.parameterization import Eps
from src.diffusion.sampler import DDIM, Heun, MultistepDPMSolver, Sampler, UniPC
from src.diffusion.schedule import Linear
from src.diffusion.spacing import Leading
from src.runs.machine import keep_freed_memory

STEPS = 50
ROUNDS = {(64, 3, 32, 32): 60, (256, 3, 64, 64): 12}


class Stored(torch.nn.Module):
    """A network without cost: it returns a stored tensor."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.output = output

    def forward(self, x, label, condition=None):
        return self.output


def rows(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The measured calls by name; each makes all steps."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    network = Stored(torch.randn_like(x))
    denoiser = Denoiser(network, Linear(), Eps())
    times = Leading()(denoiser.schedule, STEPS)

    def floor():
        y = x.clone()
        for _ in range(STEPS):
            y.mul_(0.99).add_(network.output, alpha=0.01)

    def ours(sampler: Sampler, denoiser=denoiser) -> Callable[[], object]:
        return lambda: sampler(denoiser, x, times)

    def theirs(scheduler) -> Callable[[], object]:
        def sample():
            scheduler.set_timesteps(STEPS)
            y = x
            for t in scheduler.timesteps:
                y = scheduler.step(network.output, t, y).prev_sample

        return sample

    return {
        "floor": floor,
        "DDIM": ours(DDIM()),
        "DDIM, x0 clipped": ours(DDIM(), StaticClipping(denoiser)),
        "DPM-Solver++(2M)": ours(MultistepDPMSolver(2)),
        "UniPC-3": ours(UniPC(3)),
        "Heun (two evaluations)": ours(Heun()),
        "diffusers DDIMScheduler": theirs(DDIMScheduler(clip_sample=False)),
        "diffusers DDIMScheduler, x0 clipped": theirs(DDIMScheduler()),
        "diffusers DPMSolverMultistep (2M)": theirs(DPMSolverMultistepScheduler()),
    }


def measure(
    rows: dict[str, Callable[[], object]], rounds: int, synchronize: Callable[[], None]
) -> dict[str, list[float]]:
    """Microseconds per step, `rounds` times each, interleaved, so that other load affects all alike."""
    costs = {name: [] for name in rows}
    for _ in range(rounds):
        for name, sample in rows.items():
            synchronize()
            start = time.perf_counter()
            sample()
            synchronize()
            costs[name].append((time.perf_counter() - start) / STEPS * 1e6)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    keep_freed_memory()  # as the entry points do on the CPU
    console = Console(width=120)
    console.print(f"{device}; {machine()['text']}")
    found = {}
    for shape, rounds in ROUNDS.items():
        with console.status("x".join(map(str, shape))):
            costs = measure(rows(torch.randn(shape, device=device)), rounds, synchronize)
        base = min(costs["floor"])
        title = "x".join(map(str, shape))
        table = Table("", "median us/step", "spread", "lowest of the floor's", title=title)
        found[title] = {name: spread(values) for name, values in costs.items()}
        for name, each in found[title].items():
            ratio = each["low"] / base
            table.add_row(
                name, f"{each['median']:,.0f}", f"{each['low']:,.0f}-{each['high']:,.0f}", f"{ratio:.2f}"
            )
        console.print(table)
    write_json(arguments.json, {"microseconds_per_step": found})


if __name__ == "__main__":
    main()
