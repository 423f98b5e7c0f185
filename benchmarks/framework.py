"""Milliseconds per step that the training adds to a bare loop, with a network that costs nothing.

    OMP_NUM_THREADS=1 python -m benchmarks.framework [--json out.json] [--profile]

The network multiplies its input by one weight. The bare loop has the same batch size, loss, clipping, optimiser and
average. The next row is the same step in Lightning's Trainer. The others are this project's: the module in the Trainer,
then with each callback of the default training that acts at every step, then all these, then with the reference band of
the recipe, too. Validation, previews, checkpoints and scores act every so many steps, and are left out: their costs
are those of the network.
Times are CPU times, which are those of the clock on an idle machine and suffer less from other load. Rounds are
interleaved. `--profile` lists the functions in which the time is spent.
"""

import argparse
import cProfile
import itertools
import logging
import math
import os
import pstats
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.report import machine, spread, write_json
from src.app.assemble import Experiment, assemble
from src.app.jobs import register
from src.app.sweep.jobs import composed
from src.diffusion.schedule import Cosine
from src.model import Network
from src.runs.machine import keep_freed_memory, skip_driver_search
from src.training.callbacks.reference_bands import ReferenceBands

# Steps that are not measured at the start of each round.
WARM_UP = 50
BATCH = 64
# Callbacks of the default training that act at every step; the others act rarely.
CALLBACKS = ("skip_nonfinite", "curves", "progress")


class Free(Network):
    """One multiplication."""

    def __init__(self, image_shape: tuple[int, int, int]):
        super().__init__()
        self.image_shape, self.out_channels = image_shape, image_shape[0]
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, label, condition=None, to_label=None):
        return x * self.weight


class Clock(Callback):
    """CPU seconds from the start of one step to the start of the next, which includes loading its data."""

    def __init__(self):
        self.starts: list[float] = []

    def on_train_batch_start(self, *_):
        self.starts.append(time.process_time())

    def seconds(self) -> float:
        """The mean over the steps after the first `WARM_UP`."""
        return (self.starts[-1] - self.starts[WARM_UP]) / (len(self.starts) - 1 - WARM_UP)


class Task:
    """The parts that the bare loop and the bare module share: images in memory, network, loss, average."""

    def __init__(self):
        self.images = torch.randint(0, 256, (1504, 1, 8, 8), dtype=torch.uint8)
        self.network, levels = Free((1, 8, 8)), Cosine()(torch.arange(1, 1001))
        self.alphas, self.sigmas = (
            part.float()[:, None, None, None] for part in (levels.alpha, levels.sigma)
        )
        self.weights = list(self.network.parameters())
        self.average = [weight.detach().clone() for weight in self.weights]

    def loss(self) -> torch.Tensor:
        x0 = self.images[torch.randint(len(self.images), (BATCH,))].float() / 127.5 - 1
        t, eps = torch.randint(0, 1000, (BATCH,)), torch.randn_like(x0)
        return nn.functional.mse_loss(
            self.network(self.alphas[t] * x0 + self.sigmas[t] * eps, t.float()), eps
        )

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.weights, 1e-3, fused=True)

    @torch.no_grad()
    def update_average(self) -> None:
        torch._foreach_lerp_(self.average, self.weights, 0.001)


def bare(steps: int) -> float:
    """Seconds per step of a plain loop over images in memory."""
    task, clock = Task(), Clock()
    optimizer = task.optimizer()
    for _ in range(steps):
        clock.on_train_batch_start()
        task.loss().backward()
        nn.utils.clip_grad_norm_(task.weights, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        task.update_average()
    return clock.seconds()


class Alone(LightningModule):
    """The bare loop's step as a module without anything of this project."""

    def __init__(self, task: Task):
        super().__init__()
        self.task, self.network = task, task.network

    def training_step(self, batch, batch_idx):
        return self.task.loss()

    def configure_optimizers(self):
        return self.task.optimizer()

    def on_train_batch_end(self, *_):
        self.task.update_average()


def lightning(steps: int) -> float:
    """Seconds per step of Lightning's Trainer with the bare loop's step, the flags of a training and no callbacks."""
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    trainer.fit(Alone(Task()), itertools.repeat(0))
    return clock.seconds()


def ours(steps: int, callbacks: Sequence[str], bands: str = "none") -> float:
    """Seconds per step of the default training on the digits, with these callbacks and this reference band."""
    # the bar would fill the terminal; it is drawn every N steps, and drawing is its smallest part
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        experiment, clock = prepared(Path(folder), steps, callbacks, bands)
        experiment.trainer.fit(experiment.module, experiment.data)
    return clock.seconds()


def prepared(
    folder: Path, steps: int, callbacks: Sequence[str], bands: str = "none"
) -> tuple[Experiment, Clock]:
    """A training of the free network, and the clock of its steps."""
    register()
    options = [f"trainer.max_steps={steps}", "trainer.accelerator=cpu", "logger=csv", "metrics=none"]
    options += [f"bands={bands}"]
    config = composed("train", options)
    OmegaConf.set_struct(config, False)
    config.pop("hydra")
    config.validate_every = 10**9
    for name in list(config.callbacks):
        if name not in callbacks:
            config.callbacks.pop(name)
    experiment = assemble(config, folder)
    denoiser, clock = experiment.module.denoiser, Clock()
    denoiser.network = Free(denoiser.network.image_shape)
    experiment.trainer.callbacks.insert(0, clock)
    for callback in experiment.trainer.callbacks:
        if isinstance(callback, ReferenceBands):  # this network leaves each band, which must not be recorded
            callback.band = replace(callback.band, limit=math.inf)
    return experiment, clock


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=550)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--profile", action="store_true", help="list the functions that cost most")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    keep_freed_memory()
    skip_driver_search()
    if arguments.profile:
        with tempfile.TemporaryDirectory() as folder:
            experiment, _ = prepared(Path(folder), arguments.steps, CALLBACKS)
            profile = cProfile.Profile()
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                profile.runcall(experiment.trainer.fit, experiment.module, experiment.data)
        stats = pstats.Stats(profile)
        stats.sort_stats("tottime").print_stats(45)
        stats.sort_stats("cumtime").print_stats("/src/|lightning/pytorch", 70)
        return
    rows: dict[str, Callable[[int], float]] = {"bare loop": bare, "Lightning alone": lightning}
    rows["module"] = lambda steps: ours(steps, ())
    for name in CALLBACKS:
        rows[f"module, {name}"] = lambda steps, name=name: ours(steps, (name,))
    rows["module, all callbacks"] = lambda steps: ours(steps, CALLBACKS)
    rows["and a reference band"] = lambda steps: ours(steps, CALLBACKS, "digits")
    measured: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(arguments.rounds):
        for name, run in rows.items():
            measured[name].append(run(arguments.steps) * 1000)
    base = spread(measured["bare loop"])
    table = Table(
        "", "ms per step", "spread", "more than the bare loop", "of the lowest", title=machine()["text"]
    )
    for name, values in measured.items():
        each = spread(values)
        more = (f"{each[which] - base[which]:.3f}" for which in ("median", "low"))
        table.add_row(name, f"{each['median']:.3f}", each["text"], *more)
    Console(width=120).print(table)
    write_json(arguments.json, {"unit": "ms", "rows": measured})


if __name__ == "__main__":
    main()
