"""Reference bands: builds them from trainings over seeds, and shows what they catch by injecting known mistakes.

    python -m benchmarks.bands digits [--runs runs/bands]
    python -m benchmarks.bands fashion_mnist --seeds 12 --mistaken 1
    python -m benchmarks.bands digits_class --seeds 8 --fresh 5   # mistakes in the class labels only

Trains the experiment <name>_short in this process with --seeds seeds, which make the band, and every known mistake
with --mistaken seeds. The first seed of a mistake becomes the pattern by which likely causes are named, the second
tests this. False alarms are counted with --fresh correct trainings that are not part of the band. Writes
src/training/bands/<name>.json and prints two tables. The values of a run are kept, and a run that exists is not
repeated. After --minutes, no further training starts, and the band is made of those that exist.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.progress import Progress
from scipy.stats import binomtest

from src.app import jobs
from src.app.assemble import assemble
from src.app.bands import recipe_of_losses, recipe_of_scores
from src.app.options import CONF
from src.data.codec import Pixels
from src.data.stream import Batch, FixedOrder, TrainingStream
from src.diffusion.denoiser import Denoiser
from src.diffusion.loss import denoising
from src.diffusion.noise_level import NoiseLevel
from src.diffusion.parameterization import Eps, V
from src.runs.files import read_json, write_json
from src.training.callbacks import ReferenceBands
from src.training.module import DiffusionModule
from src.training.reference_bands import (
    FOLDER,
    Band,
    Mistake,
    Values,
    fit_curves,
    largest_z,
    limit_of,
)

MISTAKEN = (200, 201)
"""The seeds of each mistake; correct trainings have the seeds 0, 1, ..., fresh ones 1000, 1001, ..."""
FRESH = 1000
MISTAKEN_STEPS = {"digits": 100, "fashion_mnist": 120, "digits_class": 100}
FEWEST = 5
"""Smallest number of seeds of a band."""
WINDOW = {"digits": 20, "fashion_mnist": 20, "digits_class": 20}

Patch = Callable[[], Any]


@dataclass(frozen=True)
class Injection:
    """A mistake: what goes wrong, as the warning names it, and how to inject it.

    Attributes:
        cause: what to look for.
        options: overrides with the mistake.
        patches: context managers that change the code.
        prepare: changes the assembled module.
    """

    cause: str
    options: tuple[str, ...] = ()
    patches: tuple[Patch, ...] = ()
    prepare: Callable[[DiffusionModule], None] | None = None


def replacing(owner: Any, name: str, make: Callable[[Any], Any]) -> Patch:
    """A patch of owner.name by make(the original)."""
    return lambda: patch.object(owner, name, make(getattr(owner, name)))


def _rolled(label: Callable) -> Callable:
    def shifted(self: Denoiser, level: NoiseLevel, x_t: torch.Tensor) -> torch.Tensor:
        return label(self, level, x_t).roll(1)

    return shifted


def _noisier(diffuse: Callable) -> Callable:
    return lambda x0, eps, level: diffuse(x0, eps, NoiseLevel(level.alpha, level.sigma**2, level.label))


def _freeze(module: DiffusionModule) -> None:
    parameters = list(module.denoiser.network.parameters())
    for parameter in parameters[: len(parameters) // 2]:
        parameter.requires_grad_(False)


def _relabelled(change: Callable[[torch.Tensor], torch.Tensor], *sets: type) -> tuple[Patch, ...]:
    """Patches by which the batches of these sets have other class labels."""

    def changed(batch: Batch) -> Batch:
        return replace(batch, condition=replace(batch.condition, labels=change(batch.condition.labels)))

    return tuple(
        replacing(each, "__getitems__", lambda f: lambda self, positions: changed(f(self, positions)))
        for each in sets
    )


def label_injections() -> dict[str, Injection]:
    """The known mistakes in class labels, by name."""

    def next_class(labels: torch.Tensor) -> torch.Tensor:
        return (labels + 1) % 10

    def of_next_image(labels: torch.Tensor) -> torch.Tensor:
        return labels.roll(1)

    return {
        "class labels + 1 in training": Injection(
            "class labels of the training set are shifted by one",
            patches=_relabelled(next_class, TrainingStream),
        ),
        "class labels + 1 everywhere": Injection(
            "class labels are shifted by one, in training and in validation",
            patches=_relabelled(next_class, TrainingStream, FixedOrder),
        ),
        "class labels of the next image in training": Injection(
            "class labels of the training set are those of other images",
            patches=_relabelled(of_next_image, TrainingStream),
        ),
        "class labels of the next image everywhere": Injection(
            "class labels are those of other images, in training and in validation",
            patches=_relabelled(of_next_image, TrainingStream, FixedOrder),
        ),
    }


def injections(name: str) -> dict[str, Injection]:
    """The known mistakes, by name."""
    if name == "digits_class":
        return label_injections()
    target, other = (Eps, V()) if name == "digits" else (V, Eps())
    meant = target.__name__.lower()
    wrong = type(other).__name__.lower()
    rate = 0.001 if name == "digits" else 0.002
    return {
        "time labels of the next image": Injection(
            "labels or times are shifted against the images of the batch",
            patches=(replacing(Denoiser, "_label", _rolled),),
        ),
        "time label in [0, 1]": Injection(
            "the time label has another scale than the network expects (0 to 1, or 0 to T)",
            patches=(
                replacing(Denoiser, "_label", lambda f: lambda self, level, x: f(self, level, x) / 1000),
            ),
        ),
        "images normalised twice": Injection(
            "images are normalised twice",
            patches=(replacing(Pixels, "encode", lambda f: lambda self, x: f(self, x) / 127.5 - 1),),
        ),
        "images in [0, 1]": Injection(
            "images are not rescaled to [-1, 1]",
            patches=(replacing(Pixels, "encode", lambda f: lambda self, x: (f(self, x) + 1) / 2),),
        ),
        f"{wrong} where {meant} was meant": Injection(
            "the target is not what the parameterisation says (eps, v, x0)",
            patches=(replacing(target, "target", lambda f: lambda self, *a: other.target(*a)),),
        ),
        "variance in place of sigma": Injection(
            "the noise has another standard deviation than the schedule says",
            patches=(replacing(denoising, "diffuse", _noisier),),
        ),
        "linear schedule": Injection("another noise schedule", options=("schedule=linear",)),
        "same noise at every step": Injection(
            "the noise or its seed is the same at every step",
            patches=(
                replacing(DiffusionModule, "_noise", lambda f: lambda self, number, x0: f(self, 0, x0)),
            ),
        ),
        "learning rate x 10": Injection(
            "the learning rate is too large", options=(f"optimizer.lr={10 * rate:g}",)
        ),
        "learning rate / 10": Injection(
            "the learning rate is too small", options=(f"optimizer.lr={rate / 10:g}",)
        ),
        "no warm-up": Injection("the learning rate has no warm-up", options=("lr_schedule=constant",)),
        "dropout of 0.3 everywhere": Injection("dropout is too large", options=("model.dropout=0.3",)),
        "half of the network frozen": Injection("a part of the network is not trained", prepare=_freeze),
        "gradients not reset": Injection(
            "gradients are accumulated over steps",
            patches=(replacing(DiffusionModule, "optimizer_zero_grad", lambda f: lambda *a: None),),
        ),
        "batch of 16 in place of 64" if name == "digits" else "batch of 8 in place of 32": Injection(
            "batch_size is over all devices and micro-batches, not of each",
            options=("batch_size=16" if name == "digits" else "batch_size=8",),
        ),
        "100 images repeated": Injection(
            "the training set is too small, or a part of it is repeated",
            patches=(replacing(TrainingStream, "indices", lambda f: lambda self, p: f(self, p) % 100),),
        ),
        "no average of the weights": Injection("the weights are not averaged", options=("ema.decay=0.0",)),
        "average without warm-up": Injection(
            "the average of the weights still holds the initial ones (ema.warmup)",
            options=("ema.warmup=false",),
        ),
        "samples decoded as [0, 1]": Injection(
            "generated images are decoded from another range than [-1, 1]",
            patches=(replacing(Pixels, "decode", lambda f: lambda self, x: f(self, 2 * x - 1)),),
        ),
        "images mirrored": Injection("images are mirrored", options=("data.horizontal_flip=true",)),
    }


def config_of(name: str, options: Sequence[str] = ()) -> Any:
    """The configuration of a run of the band."""
    plain = ["logger=csv", "trainer=cpu", "bands=none", f"experiment={name}_short"]
    plain += ["~callbacks.sample_images", "~callbacks.checkpoints", "~callbacks.progress"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*plain, *options])


@contextmanager
def injected(injection: Injection | None) -> Iterator[None]:
    """Within it, the code has the mistake."""
    with ExitStack() as stack:
        for each in injection.patches if injection else ():
            stack.enter_context(each())
        yield


def observe(name: str, seed: int, steps: int | None = None, injection: Injection | None = None) -> Values:
    """The values of a training with this seed, for `steps` steps or to its end."""
    config = config_of(name, (f"seed={seed}", *(injection.options if injection else ())))
    config.trainer.max_steps = steps or config.trainer.max_steps
    with tempfile.TemporaryDirectory() as folder, injected(injection):
        experiment = assemble(config, Path(folder))
        values = ReferenceBands(None, name, Path(folder), every=WINDOW[name])
        experiment.trainer.callbacks.append(values)
        if injection and injection.prepare:
            injection.prepare(experiment.module)
        experiment.trainer.fit(experiment.module, experiment.data)
    return values.values


class Runs:
    """Values of trainings, kept in files.

    Args:
        folder: where.
        name: of the band.
        minutes: no training starts after so many.
    """

    def __init__(self, folder: Path, name: str, minutes: float):
        self.folder, self.name = folder / name, name
        self.end = time.perf_counter() + 60 * minutes
        self.seconds = 0.0

    def __call__(self, seed: int, steps: int | None = None, mistake: str | None = None) -> Values | None:
        """The values; None if they do not exist and the time is over."""
        stem = (mistake or "correct").replace("/", "by").replace(" ", "_")
        path = self.folder / f"{stem}_{seed}.json"
        if not path.exists():
            if time.perf_counter() > self.end:
                return None
            began = time.process_time()
            values = observe(self.name, seed, steps, injections(self.name)[mistake] if mistake else None)
            texts = {value: {str(k): v for k, v in steps_.items()} for value, steps_ in values.items()}
            write_json(path, {"seconds": time.process_time() - began, "values": texts})
        content = read_json(path, dict[str, Any])
        self.seconds += content["seconds"]
        return {
            value: {int(step): number for step, number in steps_.items()}
            for value, steps_ in content["values"].items()
        }


def first_alarms(band: Band, values: Values) -> dict[str, tuple[int, str, float]]:
    """First step outside the band, with name and z, of losses by noise level and gradients, averages, and scores."""
    found: dict[str, tuple[int, str, float]] = {}
    for name, steps in values.items():
        kind = "losses" if name.startswith(("level", "gradient", "images")) else "scores"
        kind = "averages" if name in ("val_loss", "val_loss_ema", "ema_gain") else kind
        for step, value in sorted(steps.items()):
            z = band.z(name, step, value)
            if name == "images" and value != band.images:
                z = float("inf")
            if z is not None and abs(z) > band.limit and (kind not in found or step < found[kind][0]):
                found[kind] = (step, name, z)
    return found


def until(values: Values, last: int) -> Values:
    """The values up to a step."""
    return {name: {k: v for k, v in steps.items() if k <= last} for name, steps in values.items()}


def report(band: Band, mistaken: dict[str, list[Values]], marks: Sequence[int]) -> None:
    """Prints what was caught, when, and whether the cause was named; counts what was caught by these steps."""
    print(
        "| mistake | first alarm: losses and gradients | averages | scores | first step, each seed | cause named |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    steps: dict[str, list[int]] = {}
    named = 0
    for name, runs in mistaken.items():
        cells = []
        alarms = [first_alarms(band, values) for values in runs]
        for kind in ("losses", "averages", "scores"):
            first = next((alarm[kind] for alarm in alarms if kind in alarm), None)
            cells.append(f"{first[0]}: {first[1]}, z {first[2]:+.1f}" if first else "-")
        found = [min((each[0] for each in alarm.values()), default=None) for alarm in alarms]
        steps[name] = [step or sys.maxsize for step in found]
        causes = [cause for cause, _ in band.causes(until(runs[-1], found[-1] or 0))]
        own = band.mistakes[name]["cause"]
        place = causes.index(own) + 1 if own in causes else None
        named += place is not None and place <= 2
        cells.append(", ".join(str(step or "-") for step in found))
        print(f"| {name} | {' | '.join(cells)} | {place or '-'} |")
    for mark in marks:
        caught = sum(max(each) <= mark for each in steps.values())
        print(f"\ncaught by step {mark} with every seed: {caught} of {len(steps)}")
    print(f"\ncause among the two that are named, in the last seed: {named} of {len(steps)}")


def band_of(
    name: str,
    correct: Sequence[Values],
    fresh: Sequence[Values],
    mistaken: dict[str, list[Values]],
    command: str,
) -> Band:
    """The band of correct trainings, with the pattern of each mistake in its first seed."""
    config = config_of(name)
    correct, fresh = (
        [{value: steps for value, steps in run.items() if value != "images"} for run in runs]
        for runs in (correct, fresh)
    )
    curves, limit = fit_curves(correct), limit_of(correct)
    band = Band(
        recipe=recipe_of_losses(config),
        scoring=recipe_of_scores(config),
        every=WINDOW[name],
        images=config.batch_size,
        seeds=len(correct),
        limit=limit,
        alarms=(sum(largest_z(curves, run) > limit for run in fresh), len(fresh)),
        curves=curves,
        mistakes={},
        command=command,
    )
    for mistake, (first, *_) in mistaken.items():
        shift: dict[str, dict[str, float]] = {}
        for value, steps in first.items():
            for step, number in steps.items():
                if (found := band.shift(value, step, number)) is not None:
                    shift.setdefault(value, {})[str(step)] = found[0]
        band.mistakes[mistake] = Mistake(cause=injections(name)[mistake].cause, shift=shift)
    return band


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(WINDOW))
    parser.add_argument("--seeds", type=int, default=30, help="correct trainings of the band")
    parser.add_argument("--fresh", type=int, default=20, help="correct trainings that count false alarms")
    parser.add_argument("--mistaken", type=int, default=2, choices=(1, 2), help="seeds of each mistake")
    parser.add_argument("--runs", type=Path, default=Path("runs/bands"))
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="no training starts after so many; the band is made of those that exist",
    )
    arguments = parser.parse_args()
    name = arguments.name
    logging.disable(logging.WARNING)
    jobs.register()
    steps, short = config_of(name).trainer.max_steps, MISTAKEN_STEPS[name]
    runs = Runs(arguments.runs, name, arguments.minutes)
    wanted = [(seed, None, None) for seed in range(arguments.seeds)]
    wanted += [(FRESH + k, None, None) for k in range(arguments.fresh)]
    wanted += [(s, short, mistake) for s in MISTAKEN[: arguments.mistaken] for mistake in injections(name)]
    with Progress(console=Console(stderr=True)) as progress:
        found = {each: runs(*each) for each in progress.track(wanted, description="training")}
    clean = {seed: values for (seed, _, mistake), values in found.items() if values and not mistake}
    correct = [values for seed, values in clean.items() if seed < FRESH]
    fresh = [values for seed, values in clean.items() if seed >= FRESH]
    if len(correct) < FEWEST:
        raise SystemExit(f"{len(correct)} correct trainings exist, a band needs {FEWEST}: call again")
    mistaken: dict[str, list[Values]] = {}
    for (_, _, mistake), values in found.items():
        if mistake and values:
            mistaken.setdefault(mistake, []).append(values)
    band = band_of(
        name, correct, fresh, mistaken, f"python -m benchmarks.bands {name} --seeds {len(correct)}"
    )
    band.write(FOLDER / f"{name}.json")
    outside, total = band.alarms
    print(f"{runs.seconds / 60:.1f} minutes of one core; {band.seeds} seeds, limit |z| {band.limit:.2f}")
    if total:
        interval = binomtest(outside, total).proportion_ci(method="exact")
        print(
            f"false alarms: {outside} of {total} (95 % interval {interval.low:.0%} to {interval.high:.0%})\n"
        )
    report(band, mistaken, (steps // 5, short))


if __name__ == "__main__":
    main()
