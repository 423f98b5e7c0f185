"""`src.plan` against the trainings that it plans: hours to the end, predicted and measured.

    OMP_NUM_THREADS=1 python -m benchmarks.plan

The trainings are shortened recipes; the time is that from the first step to the end, with validations, previews,
scores and checkpoints.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from src.app import jobs
from src.app.assemble import assemble
from src.app.plan import measured
from src.app.sweep.jobs import composed

COMMON = ("logger=csv", "trainer.accelerator=cpu", "validate_every=200", "callbacks.checkpoints.every=200")
RECIPES = {
    "ddpm_digits": ("experiment=ddpm_digits", "trainer.max_steps=800", "sampler.steps=50"),
    "dit_digits": ("experiment=dit_digits", "trainer.max_steps=400", "sampler.steps=10"),
    "edm_digits": ("experiment=edm_digits", "trainer.max_steps=600", "sampler.steps=10"),
}
SCORED = (
    "callbacks.sample_images.every=200",
    "callbacks.track_fidelity.every=400",
    "callbacks.track_fidelity.n=500",
)


class Clock(Callback):
    """The time of the first step."""

    began = 0.0

    def on_train_start(self, *arguments: Any) -> None:
        self.began = time.perf_counter()


def main() -> None:
    jobs.register()
    cached = tempfile.TemporaryDirectory()
    table = Table("recipe", "predicted, s", "measured, s", "ratio")
    for name, options in RECIPES.items():
        config = composed("train", [*options, *COMMON, *SCORED, f"cache={cached.name}/{name}"])
        OmegaConf.set_struct(config, False)
        config.pop("hydra")
        cost = measured(config)
        predicted = cost.hours * 3600
        with tempfile.TemporaryDirectory() as folder:
            experiment, clock = assemble(config, Path(folder)), Clock()
            experiment.trainer.callbacks.append(clock)
            experiment.trainer.fit(experiment.module, experiment.data)
            took = time.perf_counter() - clock.began
        table.add_row(name, f"{predicted:.1f}", f"{took:.1f}", f"{predicted / took:.2f}")
        print(name, predicted, took, cost, flush=True)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
