"""Does bfloat16 keep the loss curve? Validation losses of float32 and bf16-mixed trainings over seeds, as a table.

    OMP_NUM_THREADS=1 python -m benchmarks.precision [--steps 500] [--seeds 3] [--runs runs/precision] [--json FILE]

Trains through the command line, one run after the other: the default training of the digits, and a small network on
Fashion-MNIST. A run whose losses exist is not repeated. Runs of one seed have the same initial weights, images, times
and noise, so the differences between the precisions are also taken seed by seed.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.progress import track

from benchmarks.report import machine, write_json
from src.evaluation.record import Record
from src.runs.folder import SCORES_FILE

PRECISIONS = ("32-true", "bf16-mixed")
DATA = {
    "digits": [],
    "fashion_mnist": [  # smaller than unet_small, with half the batch: a minute for a run
        "batch_size=32",
        "model.base_channels=16",
        "model.channel_multipliers=[1,2,2]",
        "model.attention_factors=[4]",
    ],
}
LOSSES = ("val/loss", "val/loss_ema")
# The validation losses are means over this many batches: all 146 digits, 640 pictures of Fashion-MNIST.
BATCHES = 20


def train(folder: Path, data: str, precision: str, seed: int, steps: int) -> dict[str, float]:
    """The last validation losses of a run, which is trained if they do not exist."""
    scores = folder / f"{data}_{precision}_{seed}_{steps}" / SCORES_FILE
    if not scores.exists():
        options = [
            f"data={data}",
            *DATA[data],
            f"seed={seed}",
            f"trainer.precision={precision}",
            f"trainer.max_steps={steps}",
            f"+trainer.limit_val_batches={BATCHES}",
            f"validate_every={steps}",
            "trainer.accelerator=cpu",
            "bands=none",
            "logger=csv",
            "metrics=none",
            "~callbacks.sample_images",
            f"hydra.run.dir={scores.parent}",
        ]
        subprocess.run([sys.executable, "-m", "src.train", *options], check=True, stdout=subprocess.DEVNULL)
    found = Record.read(scores).scores
    return {name: found[name] for name in LOSSES}


def main() -> None:
    """Trains and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500, help="optimiser steps of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--runs", type=Path, default=Path("runs/precision"))
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    jobs = [(d, p, s) for d in arguments.data for s in range(arguments.seeds) for p in PRECISIONS]
    found: dict[str, list[float]] = {}
    for data, precision, seed in track(jobs, description="training", console=Console(stderr=True)):
        for name, value in train(arguments.runs, data, precision, seed, arguments.steps).items():
            found.setdefault(f"{data} {name} {precision}", []).append(value)
    seeds = [f"seed {seed}" for seed in range(arguments.seeds)]
    print(f"{machine()['text']}, {arguments.steps} steps\n")
    print(f"| data | loss | precision | {' | '.join(seeds)} | mean | deviation over seeds |")
    print("|" + " --- |" * (arguments.seeds + 5))
    for data in arguments.data:
        for name in LOSSES:
            rows = {p: found[f"{data} {name} {p}"] for p in PRECISIONS}
            rows["difference"] = [b - a for a, b in zip(*rows.values(), strict=True)]
            for precision, values in rows.items():
                deviation = stdev(values) if len(values) > 1 else float("nan")
                numbers = " | ".join(f"{value:.5f}" for value in (*values, mean(values), deviation))
                print(f"| {data} | {name} | {precision} | {numbers} |")
    write_json(arguments.json, {"steps": arguments.steps, "losses": found})


if __name__ == "__main__":
    main()
