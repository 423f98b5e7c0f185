"""How time and memory of a training step grow with image size, batch, width and processes: a table and a plot.

    OMP_NUM_THREADS=1 python -m benchmarks.growth [--steps 3] [--plot docs/images/growth.png] [--json FILE]

One quantity varies at a time, around 32x32x3 with batch 8 and 32 base channels (1.6M parameters, attention at half the
image size). Each row trains in new processes with `benchmarks.training`; the first step is not counted. Several
processes share the batch (DDP, gloo on a CPU). Times are CPU times of one process, in which other load matters little.
Memory is the peak of a process above that before the training. The exponents are those of the last doubling: 1 is
proportional.
"""

import argparse
import json
import logging
import os
import resource
import socket
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from math import log2
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.report import machine, spread, write_json
from benchmarks.training import ours
from src.model import UNet

BASE = {"image size": 32, "batch": 8, "base channels": 32, "processes": 1}
VARIED = {
    "image size": (32, 64, 128),
    "batch": (4, 8, 16, 32),
    "base channels": (16, 32, 64, 128),
    "processes": (1, 2),
}
# A case measured: (CPU milliseconds of each step, MiB).
Found = tuple[list[float], float]


def size_of(case: dict[str, int]) -> dict:
    """The arguments of the network."""
    return {
        "image_size": case["image size"],
        "channels": 3,
        "base_channels": case["base channels"],
        "channel_multipliers": (1, 2, 2),
    }


def steps_of(case: dict[str, int], steps: int, rank: int, port: int) -> Found:
    """Measures a case; runs in a process of its own."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if case["processes"] > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = ours(size_of(case), case["batch"], steps + 1, False, case["processes"])[1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return [cpu * 1000 for _, cpu in times], peak / 1024


def measure(case: dict[str, int], steps: int) -> Found:
    """The steps of the first process, and the largest memory of one."""
    processes = case["processes"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        jobs = [pool.submit(steps_of, case, steps, rank, port) for rank in range(processes)]
        results = [job.result() for job in jobs]
    return results[0][0], max(memory for _, memory in results)


def plot(path: Path, found: dict[str, dict[int, Found]]) -> None:
    """Time above memory, one column for each quantity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = pyplot.subplots(2, len(found), figsize=(11, 5), sharey="row", squeeze=False)
    for column, (quantity, cases) in enumerate(found.items()):
        times = [spread(times) for times, _ in cases.values()]
        middle = [each["median"] for each in times]
        bars = [
            [each["median"] - each["low"] for each in times],
            [each["high"] - each["median"] for each in times],
        ]
        axes[0, column].errorbar(list(cases), middle, yerr=bars, marker="o", capsize=3)
        axes[1, column].plot(
            list(cases), [memory for _, memory in cases.values()], marker="o", color="tab:orange"
        )
        axes[1, column].set_xlabel(quantity)
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(list(cases))
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("CPU ms per step")
    axes[1, 0].set_ylabel("MiB above the start")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def exponent(values: Sequence[float]) -> str:
    """The exponent of the last doubling."""
    return f"{log2(values[-1] / values[-2]):.2f}" if len(values) > 1 else ""


def main() -> None:
    """Measures, prints the table and draws the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each process, after one more")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each case, interleaved")
    parser.add_argument("--vary", nargs="+", default=list(VARIED), choices=list(VARIED))
    parser.add_argument("--plot", type=Path, help="also draw the plot in this file")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument(
        "--known", type=Path, nargs="*", default=[], help="files of earlier runs, which are added"
    )
    arguments = parser.parse_args()
    console = Console(width=120)
    found: dict[str, dict[int, Found]] = {}

    def add(quantity: str, value: int, times: list[float], memory: float) -> None:
        known, peak = found.setdefault(quantity, {}).get(value, ([], 0.0))
        found[quantity][value] = (known + times, max(peak, memory))

    for path in arguments.known:
        for quantity, cases in json.loads(path.read_text())["ms_and_MiB"].items():
            for value, (times, memory) in cases.items():
                add(quantity, int(value), times, memory)
    for _ in range(arguments.rounds):
        for quantity in arguments.vary:
            for value in VARIED[quantity]:
                times, memory = measure({**BASE, quantity: value}, arguments.steps)
                add(quantity, value, times, memory)
                console.print(quantity, value, f"{min(times):.0f} ms {memory:.0f} MiB", style="dim")
    names = ("quantity", "value", "parameters", "CPU ms per step", "spread", "exponent", "MiB", "exponent")
    table = Table(*names, title=machine()["text"])
    for quantity, cases in found.items():
        times, memories = [], []
        for value, (steps, memory) in sorted(cases.items()):
            each = spread(steps)
            times.append(each["median"])
            memories.append(memory)
            network = UNet(**size_of({**BASE, quantity: value}), attention_factors=(2,), groups=4)
            parameters = sum(p.numel() for p in network.parameters())
            table.add_row(
                quantity,
                str(value),
                f"{parameters / 1e6:.2f}M",
                f"{each['median']:.0f}",
                each["text"],
                exponent(times),
                f"{memory:.0f}",
                exponent(memories),
            )
    console.print(table)
    write_json(arguments.json, {"base": BASE, "ms_and_MiB": found})
    if arguments.plot is not None:
        plot(arguments.plot, found)


if __name__ == "__main__":
    main()
