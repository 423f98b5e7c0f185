"""Few-step models on the digits: fd_digits with 1, 2 and 4 evaluations against 50 of a flow, and the cost of a step.

    python -m benchmarks.few_step [--steps 3000] [--seeds 3] [--runs runs/few_step]
    python -m benchmarks.few_step --cost

Trains through the command line, one run after the other (some minutes each on one core), and scores each run with
1,000 images. What exists is not repeated. All have the same network, optimiser, batches and seeds. A distilled model
starts from the flow of the same seed and trains for --steps more; progressive distillation shares them among its rounds
of 8, 4, 2 and 1 steps, and each number of evaluations is that of the round's student. --cost measures the processor's
time of a training step instead, in turns.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median, stdev

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.progress import track

from src.app import jobs
from src.app.assemble import assemble
from src.app.options import CONF
from src.evaluation.record import Record
from src.runs.folder import SCORES_FILE

FLOW = ["experiment=rectified_flow_digits"]
MEAN_FLOW = ["experiment=mean_flow_digits"]
# Each with its training, its sampler of few steps, and the sampler of 50.
ROWS = {
    "flow matching": (FLOW, "euler", "euler"),
    "mean flow": (MEAN_FLOW, "flow_map", "euler"),
    "improved mean flow": ([*MEAN_FLOW, "loss.tangent=network"], "flow_map", "euler"),
    "shortcut": (["experiment=shortcut_digits"], "flow_map", "euler"),
    "continuous consistency": (
        [
            *MEAN_FLOW,
            "loss=continuous_consistency",
            "loss.share=1.0",
            "loss.power=0.5",
            "sampler=consistency",
        ],
        "consistency",
        None,
    ),
    "consistency": (["experiment=consistency_digits"], "consistency", None),
    "consistency distillation": ([*FLOW, "loss=consistency", "sampler=consistency"], "consistency", None),
    "progressive distillation": ([*FLOW, "loss=progressive", "sampler=euler"], "euler", None),
}
DISTILLED = ("consistency distillation", "progressive distillation")
ROUNDS = (8, 4, 2, 1)
"""Steps of the students of progressive distillation."""
FEW, MANY = (1, 2, 4), 50


def run(entry_point: str, *options: str) -> None:
    """A command, whose output is shown only if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"src.{entry_point}", *options], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(options)}\n{done.stderr}")


def scores_of(folder: Path, options: list[str], sampler: str, steps: tuple[int, ...]) -> dict[int, float]:
    """fd_digits by number of steps of a run, which is trained and scored where that has not been done."""
    if not (folder / SCORES_FILE).exists():
        run("train", *options, f"hydra.run.dir={folder}")

    def found() -> dict[int, float]:
        records = [Record.read(path) for path in folder.glob(f"scores/*/{SCORES_FILE}")]
        kind = {"euler": "Euler(", "flow_map": "FlowMap(gamma=0.0", "consistency": "FlowMap(gamma=1.0"}[
            sampler
        ]
        return {
            record.protocol["recipe"]["steps"]: record.scores["fd_digits"]
            for record in records
            if record.protocol["recipe"]["sampler"].startswith(kind)
        }

    missing = [str(number) for number in steps if number not in found()]
    if missing:
        chosen = [f"sampler={sampler}", f"sampler.steps={','.join(missing)}"]
        chosen += ["clipping=none"] if sampler == "flow_map" else []
        run(
            "evaluate", "-m", f"run={folder}", *chosen, "n=1000", "metrics=fd_digits", f"runs={folder.parent}"
        )
    return {number: found()[number] for number in steps}


def cell(values: list[float]) -> str:
    """Mean and, of several values, standard deviation."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def scores_of_row(runs: Path, row: str, steps: int, seed: int) -> dict[int, float]:
    """fd_digits by number of evaluations; trains what does not exist."""
    recipe, few, many = ROWS[row]
    plain = [f"seed={seed}", "logger=csv", "trainer=cpu", "trainer.precision=32-true", "metrics=none"]

    def folder(name: str) -> Path:
        return runs / f"{re.sub('[^a-z0-9]+', '_', name)}_{steps}_{seed}"

    def options(length: int, teacher: Path | None) -> list[str]:
        every = [f"callbacks.{name}.every={length}" for name in ("sample_images", "checkpoints")]
        origin = [f"loss.run={teacher}", f"init={teacher}"] if teacher else []
        return [*recipe, *plain, f"trainer.max_steps={length}", *every, *origin]

    teacher = None
    if row in DISTILLED:
        teacher = folder("flow matching")
        scores_of_row(runs, "flow matching", steps, seed)
    scores = {}
    if row == "progressive distillation":
        for number in ROUNDS:
            student = folder(f"{row} {number}")
            chosen = [*options(steps // len(ROUNDS), teacher), f"sampler.steps={number}"]
            scores |= scores_of(student, chosen, few, (number,))
            teacher = student
        return {number: scores[number] for number in FEW}
    scores |= scores_of(folder(row), options(steps, teacher), few, FEW)
    return scores | (scores_of(folder(row), options(steps, teacher), many, (MANY,)) if many else {})


def table(runs: Path, steps: int, seeds: int, rows: list[str]) -> None:
    """Trains, scores and prints."""
    found: dict[str, dict[int, list[float]]] = {row: {} for row in rows}
    work = [(seed, row) for seed in range(seeds) for row in rows]
    for seed, row in track(work, description="training", console=Console(stderr=True)):
        scores = scores_of_row(runs, row, steps, seed)
        for number, value in scores.items():
            found[row].setdefault(number, []).append(value)
        print(f"{row}, seed {seed}: {scores}", file=sys.stderr)
    print(f"| training | {' | '.join(map(str, (*FEW, MANY)))} |")
    print("|" + " --- |" * (len(FEW) + 2))
    for row, values in found.items():
        print(f"| {row} | {' | '.join(cell(values[n]) if n in values else '' for n in (*FEW, MANY))} |")


def cost(rounds: int = 7) -> None:
    """The processor's time of forward and backward pass of a batch of 64, relative to flow matching, by row."""
    torch.set_num_threads(1)
    jobs.register()
    steps = {}
    for row, (options, _, _) in ROWS.items():
        if row in DISTILLED:
            continue  # they need a run; the teacher of one evaluates the network once more, of the other twice
        plain = ["logger=csv", "trainer=cpu", "metrics=none", "callbacks=none"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            steps[row] = assemble(compose("train", [*options, *plain]), Path("unused")).module.loss
    times: dict[str, list[float]] = {row: [] for row in steps}
    generator = torch.Generator().manual_seed(0)
    for number in range(rounds + 1):  # the first is a warm-up
        for row, loss in steps.items():
            x0, eps = torch.randn(2, 64, 1, 8, 8, generator=generator)
            draws = loss.draw(64, generator)
            start = time.process_time()
            loss(x0, draws, eps).mean().backward()
            if number:
                times[row].append(time.process_time() - start)
    base = median(times["flow matching"])
    print("| training | ms | relative |\n| --- | --- | --- |")
    for row, values in times.items():
        print(f"| {row} | {1e3 * median(values):.0f} | {median(values) / base:.2f} |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/few_step"))
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="of the table"
    )
    parser.add_argument("--cost", action="store_true", help="measure the cost of a step instead")
    arguments = parser.parse_args()
    cost() if arguments.cost else table(arguments.runs, arguments.steps, arguments.seeds, arguments.rows)


if __name__ == "__main__":
    main()
