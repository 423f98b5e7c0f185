"""fd_digits of the parameterisations after equal training on the digits, over seeds, as a Markdown table.

    python -m benchmarks.parameterizations [--steps 4000] [--seeds 5] [--runs runs/parameterizations]

Trains through the command line, one run after the other (25 runs of a few minutes each on two cores). A run that
already has scores is not repeated. All have the same network, optimiser, batches, seeds and number of network
evaluations in sampling (50).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.progress import track

# Each with the schedule, weighting and time sampling of its paper. DDIM works with all of them.
ROWS = {
    "eps": ["schedule=cosine", "parameterization=eps", "clipping=static"],
    "x0": ["schedule=cosine", "parameterization=x0", "clipping=static"],
    "v": ["schedule=cosine", "parameterization=v", "clipping=static"],
    "edm": [
        "schedule=edm",
        "parameterization=edm",
        "weighting=edm",
        "time_sampling=log_normal",
        "spacing=karras",
        "clipping=none",
    ],
    "flow": ["schedule=rectified_flow", "parameterization=velocity", "clipping=none"],
}


def train(folder: Path, row: str, seed: int, steps: int) -> float:
    """Trains one run, unless it exists, and returns its last fd_digits."""
    scores = folder / f"{row}_{seed}" / "scores.json"
    if not scores.exists():
        options = [*ROWS[row], f"seed={seed}", f"trainer.max_steps={steps}", "logger=csv"]
        command = [sys.executable, "-m", "src.train", *options, f"hydra.run.dir={scores.parent}"]
        command += ["sampler=ddim", "sampler.steps=50", f"callbacks.track_fidelity.every={steps}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(scores.read_text())["fd_digits"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps of each run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/parameterizations"))
    arguments = parser.parse_args()
    jobs = [(row, seed) for seed in range(arguments.seeds) for row in ROWS]
    scores: dict[str, list[float]] = {row: [] for row in ROWS}
    for row, seed in track(jobs, description="training", console=Console(stderr=True)):
        scores[row].append(train(arguments.runs, row, seed, arguments.steps))
    best = min(mean(values) for values in scores.values())
    seeds = [f"seed {seed}" for seed in range(arguments.seeds)]
    print(f"| parameterisation | {' | '.join(seeds)} | mean | deviation | mean / best |")
    print("|" + " --- |" * (arguments.seeds + 4))
    for row, values in scores.items():
        spread = stdev(values) if len(values) > 1 else float("nan")
        cells = [f"{value:.2f}" for value in (*values, mean(values), spread, mean(values) / best)]
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
