"""Run folders like those of trainings, written without training."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from src.evaluation.record import Record
from src.report.run import flat
from src.runs.files import write_json

CONFIG: dict[str, Any] = {
    "seed": 0,
    "batch_size": 64,
    "name": None,
    "generation": {"seed": 0},
    "data": {"_target_": "src.data.digits.Digits", "image_size": 8, "channels": 1},
    "schedule": {"_target_": "src.diffusion.schedule.Cosine", "s": 0.008},
    "parameterization": {"_target_": "src.diffusion.parameterization.Eps"},
    "loss": {"_target_": "src.diffusion.loss.DenoisingLoss"},
    "sampler": {"_target_": "src.diffusion.sampler.DDIM", "steps": 50, "eta": 0.0},
    "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.001, "betas": [0.9, 0.999]},
    "trainer": {"max_steps": 300, "precision": "32-true"},
    "callbacks": {"sample_images": {"n": 64}},
}
ENVIRONMENT = {"git": "0123456", "cpu": "EPYC", "cpu_threads": 1, "gpus": [], "parameters": 72113}


def protocol(**changes: Any) -> dict[str, Any]:
    """A protocol; changes by dotted name with "__" for the dot, e.g. recipe__steps=20."""
    found: dict[str, Any] = {
        "num_images": 1000,
        "reference": {"data": "digits", "split": "train", "count": 1504, "fingerprint": "ed5c"},
        "features": {"name": "digits", "num_features": 64, "sha256": "5774", "origin": "a classifier"},
        "settings": {},
        "recipe": {
            "training_steps": 300,
            "weights": "ema",
            "ema_decay": 0.999,
            "sampler": "DDIM(eta=0.0)",
            "spacing": "Trailing()",
            "guidance": "none",
            "steps": 50,
            "network_evaluations": 50,
            "seed": 0,
        },
        "quantisation": "round",
        "versions": {"torch": "2.15.0"},
    }
    for name, value in changes.items():
        *groups, last = name.split("__")
        node = found
        for group in groups:
            node = node[group]
        node[last] = value
    return found


def write_run(
    folder: Path, score: float | None = 5.0, steps: int = 300, picture: bool = False, **options: Any
) -> Path:
    """A run folder; options by dotted name with "__" for the dot. Without a score the run has not ended."""
    config = json.loads(json.dumps(CONFIG))
    for name, value in options.items():
        *groups, last = name.split("__")
        node = config
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_json(folder / "environment.json", ENVIRONMENT)
    _write_curves(folder, steps, score or 9.0, random.Random(str(sorted(flat(config).items()))))
    if score is not None:
        record = Record({"fd_digits": score, "val/loss_ema": 0.1}, protocol(recipe__training_steps=steps))
        record.write(folder / "scores.json")
        Record({"fd_digits": score}, record.protocol).write(folder / "checkpoints" / "best.json")
    if picture:
        pixels = np.random.default_rng(0).integers(0, 256, (96, 96), dtype=np.uint8)
        (folder / "samples").mkdir()
        Image.fromarray(pixels).resize((288, 288), 0).save(folder / "samples" / f"step_{steps:08d}.png")
    return folder


def _write_curves(folder: Path, steps: int, score: float, random: random.Random) -> None:
    names = [
        "step",
        "train/loss",
        *(f"train/loss_q{i}" for i in range(4)),
        "train/samples",
        "train/images_per_second",
    ]
    lines = [",".join([*names, "val/loss_ema", "fd_digits"])]
    for step in range(10, steps + 1, 10):
        loss = math.exp(-step / 80) + 0.1 + random.uniform(0, 0.02)
        values = [step, loss, *(loss * 2.0**-i for i in range(4)), step * 64, 1000.0]
        lines.append(",".join([*map(str, values), "", ""]))
        if step % 50 == 0:
            lines.append(",".join([str(step), *[""] * 7, str(loss), str(score + 300 / step - 1)]))
    path = folder / "csv" / "version_0" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines) + "\n")


def write_sweep(folder: Path, **values: list[Any]) -> Path:
    """A sweep of schedule, parameterization and seed, with runs that know no options of their own."""
    jobs = []
    targets = {"linear": "Linear", "cosine": "Cosine", "eps": "Eps", "v": "V"}
    for schedule in values["schedule"]:
        for parameterization in values["parameterization"]:
            for seed in values["seed"]:
                varied = [f"schedule={schedule}", f"parameterization={parameterization}", f"seed={seed}"]
                name = f"{len(jobs)}_{'_'.join(varied)}".replace("=", "-")
                jobs.append({"folder": name, "overrides": varied, "varied": varied})
                base = {"linear": 8.0, "cosine": 5.0}.get(schedule, 6.0) + (parameterization == "v")
                write_run(
                    folder / name,
                    base + 0.1 * seed,
                    picture=values.get("picture", [False])[0],
                    seed=seed,
                    schedule___target_=f"src.diffusion.schedule.{targets.get(schedule, schedule)}",
                    parameterization___target_=f"src.diffusion.parameterization.{targets.get(parameterization)}",
                )
    write_json(folder / "jobs.json", {"entry_point": "train", "overrides": [], "jobs": jobs})
    return folder
