"""Does the evaluation of memorisation find copies that are known, and is it silent where there are none?

    python -m benchmarks.memorisation [--steps 1500] [--runs runs/memorisation]

Trains the default network on 100 to 1,504 digits, 10 of which are repeated 20 times, three times on all 1,504 without
repetitions, and once on the 1,404 that are not among the first 100; then runs `metrics=memorisation_digits` on each.
Training, sampling and evaluation are commands of the command line, one after the other, about 20 minutes of one core.
A run that exists is not repeated. Prints Markdown tables and writes docs/images/memorisation_digits.png.

The tests are also applied to random divisions of the digits into training, held-out and "generated" images, where no
image is a copy: their p values must be uniform.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from scipy.stats import binomtest, kstest
from sklearn.cluster import KMeans
from sklearn.metrics import roc_auc_score

from src.data.digits import Digits
from src.data.source import ImageSet, InMemoryImages, Split
from src.evaluation.memorisation import Memorisation, compare, embed
from src.evaluation.record import Record
from src.generation.pictures import read_images
from src.metrics.features import ClassifierFeatures
from src.metrics.memorisation import attraction, copying_test, membership_test, nearest
from src.randomness import generator
from src.runs.folder import SCORES_FILE

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "memorisation_digits.png"


class PlantedDigits(Digits):
    """Some of the digits for training, a few of them repeated; all others are the test split.

    Args:
        images: number of distinct training images, of scikit-learn's training split in a fixed random order.
        planted: number of them that are repeated: the first ones.
        copies: how often these occur.
        skip: number of images at the beginning of the order that are not used at all.
        others: the arguments of `Digits`.
    """

    def __init__(self, images: int = 1504, planted: int = 0, copies: int = 1, skip: int = 0, **others):
        super().__init__(**others)
        self.images, self.planted, self.copies, self.skip = images, planted, copies, skip

    def _load(self, split: Split) -> ImageSet:
        whole = super()._load("train")
        order = torch.randperm(len(whole), generator=generator(0, "planted digits", 0))[self.skip :]
        used, unused = order[: self.images], order[self.images :]
        if split == "validation":
            return super()._load("validation")
        if split == "train":
            chosen = torch.cat([used[: self.planted].repeat(self.copies), used[self.planted :]])
            return InMemoryImages(whole.images(chosen), whole.labels[chosen])
        # the validation split measures losses only, nothing is chosen by it
        parts = [super()._load("validation"), super()._load("test")]
        pixels = torch.cat([part.images(range(len(part))) for part in parts] + [whole.images(unused)])
        return InMemoryImages(pixels, torch.cat([*(part.labels for part in parts), whole.labels[unused]]))


@dataclass(frozen=True)
class Run:
    """A training: its data and seed."""

    images: int
    planted: int = 0
    copies: int = 1
    skip: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.images}_{self.planted}x{self.copies}_skip{self.skip}_seed{self.seed}"

    @property
    def options(self) -> list[str]:
        """The data on the command line."""
        options = {name: getattr(self, name) for name in ("images", "planted", "copies", "skip")}
        return ["data._target_=benchmarks.memorisation.PlantedDigits"] + [
            f"+data.{name}={value}" for name, value in options.items()
        ]

    def source(self) -> PlantedDigits:
        return PlantedDigits(self.images, self.planted, self.copies, self.skip)


PLANTED = [Run(images, planted=10, copies=20) for images in (100, 300, 1000, 1504)]
FULL = [Run(1504, seed=seed) for seed in range(3)]
DISJOINT = Run(1404, skip=100)


def command(*arguments: str) -> None:
    """Runs an entry point of this project."""
    subprocess.run(
        [sys.executable, "-m", *arguments, "trust=[benchmarks]"], check=True, stdout=subprocess.DEVNULL
    )


def evaluated(run: Run, folder: Path, steps: int, n: int) -> tuple[Record, Path]:
    """The record of a run, which is trained and evaluated if it does not exist, and its folder."""
    place = folder / run.name
    if not (place / SCORES_FILE).exists():
        plain = ["metrics=none", "callbacks=none", "logger=csv", f"trainer.max_steps={steps}"]
        command("src.train", *run.options, *plain, f"seed={run.seed}", f"hydra.run.dir={place}")
    if not (found := sorted(place.glob("scores/memorisation*"))):
        images = [f"n={n}", "sampler.steps=25"]
        command("src.evaluate", f"run={place}", "metrics=memorisation_digits", *images)
        found = sorted(place.glob("scores/memorisation*"))
    return Record.read(found[-1] / SCORES_FILE), found[-1]


def planted_auc(run: Run, record: Record, space: str) -> float:
    """How well the attraction of the generated images tells the planted training images from the others."""
    ratios, indices = (np.array(record.curve[f"{name}_{space}"]) for name in ("ratio", "nearest"))
    repeated = run.planted * run.copies
    drawn = attraction(ratios, indices.astype(int), repeated + run.images - run.planted)
    first = np.r_[0 : run.planted, repeated : len(drawn)]  # the first of each repeated image
    return float(roc_auc_score(np.arange(len(first)) < run.planted, drawn[first]))


def table(rows: Sequence[tuple[Run, Record]], space: str) -> None:
    """One row for each network."""
    print(
        f"\n| {space}: training images | nearest of equally many: training, held-out | copied | of held-out"
        " | membership z, p | C_T, p | AUC of planted images |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for run, record in rows:
        s = record.scores
        what = f"{run.images:,}" + (
            f", {run.planted} of them {run.copies} times" if run.planted else f", seed {run.seed}"
        )
        auc = f"{planted_auc(run, record, space):.3f}" if run.planted else "-"
        print(
            f"| {what} | {s[f'distance_train_{space}']:.2f}, {s[f'distance_heldout_{space}']:.2f} |"
            f" {s[f'copied_{space}']:.1%} | {s[f'copied_{space}_heldout']:.1%} |"
            f" {s[f'membership_z_{space}']:.1f}, {s[f'membership_p_{space}']:.2g} |"
            f" {s[f'copying_CT_{space}']:.2f}, {s[f'copying_p_{space}']:.2g} | {auc} |"
        )


def never_seen(copying: Run, other: Run, folder: Path, n: int) -> dict[str, float]:
    """AUC of the ratio between images of a network that was trained on few images and of one that saw none of these."""
    memorisation = Memorisation(ClassifierFeatures("digits"))
    source = copying.source()
    train = source.split("train")
    first = np.r_[0 : copying.planted, copying.planted * copying.copies : len(train)]
    held_out = source.split("test")
    sets = [
        embed(train.images(first), memorisation.features),
        embed(held_out.images(range(200)), memorisation.features),
    ]
    ratios: dict[str, list[list[float]]] = {}
    for run in (copying, other):
        out = folder / run.name / "images"
        if not out.exists():
            command("src.sample", f"run={folder / run.name}", f"n={n}", "sampler.steps=25", f"out={out}")
        images = read_images(out / "images", range(n), 1)
        _, curve = compare(embed(images, memorisation.features), *sets, memorisation)
        for space in ("pixels", "digits"):
            ratios.setdefault(space, []).append(curve[f"ratio_{space}"])
    return {
        space: float(roc_auc_score([0] * len(b) + [1] * len(a), [-r for r in (*b, *a)]))
        for space, (a, b) in ratios.items()
    }


def null_distribution(repeats: int) -> None:
    """p values of both tests where training, held-out and "generated" images are random parts of the digits."""
    digits = Digits()
    parts = [digits.split(split) for split in ("train", "validation", "test")]
    images = embed(torch.cat([part.images(range(len(part))) for part in parts]), ClassifierFeatures("digits"))
    print(f"\n| {repeats} random divisions | test | Kolmogorov-Smirnov p | p <= 0.05 (95 % interval) |")
    print("| --- | --- | --- | --- |")
    for space, vectors in images.vectors.items():
        found: dict[str, list[float]] = {"copying": [], "membership": []}
        for k in track(range(repeats), description=f"null {space}", console=Console(stderr=True)):
            order = np.random.default_rng(k).permutation(len(vectors))
            train, held_out, ours = (vectors[order[a:b]] for a, b in ((0, 1000), (1000, 1300), (1300, None)))
            clusters = KMeans(5, n_init=1, random_state=0).fit(train)
            cells = [clusters.predict(each) for each in (ours, held_out)]
            distances = [nearest(each, train).distances[:, 0] for each in (ours, held_out)]
            found["copying"].append(copying_test(*distances, *cells)[1].p)
            among = nearest(ours, np.concatenate([train, held_out])).indices[:, 0]
            trained, once = np.arange(1300) < 1000, np.ones(1300, dtype=int)
            found["membership"].append(membership_test(among, trained, once).p)
        for test, p in found.items():
            below = sum(each <= 0.05 for each in p)
            interval = binomtest(below, repeats).proportion_ci()
            print(
                f"| {space} | {test} | {kstest(p, 'uniform').pvalue:.2f} |"
                f" {below / repeats:.3f} ({interval.low:.3f} to {interval.high:.3f}) |"
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1500, help="optimiser steps of each network")
    parser.add_argument("--images", type=int, default=1000, help="generated images of each network")
    parser.add_argument("--repeats", type=int, default=500, help="divisions for the null distribution")
    parser.add_argument("--runs", type=Path, default=Path("runs/memorisation"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run starts after so many")
    arguments = parser.parse_args()
    end = time.perf_counter() + 60 * arguments.minutes
    rows = []
    for run in track([*PLANTED, *FULL, DISJOINT], description="networks", console=Console(stderr=True)):
        if time.perf_counter() > end:
            raise SystemExit("not all networks exist; call again")
        record, place = evaluated(run, arguments.runs, arguments.steps, arguments.images)
        rows.append((run, record))
        if run == PLANTED[0]:
            picture = Image.open(place / "nearest.png")
            picture.resize((4 * picture.width, 4 * picture.height), Image.Resampling.NEAREST).save(PICTURE)
    for space in ("pixels", "digits"):
        table(rows, space)
    few = PLANTED[0]
    for space, auc in never_seen(few, DISJOINT, arguments.runs, arguments.images).items():
        print(
            f"\nAUC of the ratio, network of {few.images} images against one that saw none of them, {space}: {auc:.4f}"
        )
    null_distribution(arguments.repeats)


if __name__ == "__main__":
    main()
