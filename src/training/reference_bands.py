"""Reference bands: where losses and scores of correct trainings of one recipe lie, step by step.

Every value v of a run (the loss at a noise level over a window of steps, the validation loss, a score) is compared with
those of the band's seeds:

    z = (ln v - mean) / deviation,    mean and deviation of ln v over the seeds at the same step

A run leaves the band where |z| exceeds a limit. The limit is one for all values and steps of a run: it is derived from
the largest |z| of whole runs, so that a correct run rarely has any alarm at all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from src.runs.files import read_json, write_json

FOLDER = Path(__file__).parent / "bands"
"""The bands that come with this project, one JSON file each."""

LEVELS = 8
"""Equal parts of the schedule's time range; level 0 has the least noise."""

Values = dict[str, dict[int, float]]
"""Observed values by name and optimiser step, all positive."""

SMOOTHING = 2
"""Deviations are averaged over so many neighbouring steps on both sides."""
MARGIN = 1.25
"""The limit exceeds the largest |z| of the band's own seeds, each compared with the others, by this factor."""
SMALLEST_DEVIATION = 1e-3
ALIKE = 0.5
"""Smallest cosine between a run's deviations and those of a known mistake that is named as a likely cause."""


class Curve(TypedDict):
    """One value of the band at `steps`: its quantiles over the seeds; mean and deviation of its logarithm."""

    steps: list[int]
    low: list[float]
    median: list[float]
    high: list[float]
    mean: list[float]
    deviation: list[float]


class Mistake(TypedDict):
    """A known mistake: what to look for, and ln v - mean in a run that had it, by name and step."""

    cause: str
    shift: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Band:
    """A reference band, stored as JSON.

    Attributes:
        recipe: the options on which losses depend, flat; a run with others is not compared unless asked for.
        scoring: the options on which scores depend besides; scores are compared only where these are equal.
        every: optimiser steps of a window.
        images: images per step, over all devices.
        seeds: number of trainings.
        limit: largest |z| within the band.
        alarms: number of correct trainings, none of the band's own, that left the band, and their number.
        curves: by name: level_0 ... level_7 (training loss), gradient_norm, val_loss, val_loss_ema, ema_gain (their
            ratio) and the scores.
        mistakes: by name.
        command: how it was made.
    """

    recipe: dict[str, Any]
    scoring: dict[str, Any]
    every: int
    images: int
    seeds: int
    limit: float
    alarms: tuple[int, int]
    curves: dict[str, Curve]
    mistakes: dict[str, Mistake]
    command: str

    @classmethod
    def read(cls, path: Path) -> "Band":
        """Reads a band.

        Raises:
            FileNotFoundError: there is none.
            Damaged: it is no band, or it was altered.
        """
        return read_json(path, cls)

    def write(self, path: Path) -> None:
        """Writes the band, with its numbers rounded to four digits."""
        write_json(path, _rounded(vars(self)))

    def shift(self, name: str, step: int, value: float) -> tuple[float, float] | None:
        """ln value - mean, and the deviation, of a value at a step; None where the band has none."""
        curve = self.curves.get(name)
        if curve is None or step not in curve["steps"] or not (value > 0 and math.isfinite(value)):
            return None
        k = curve["steps"].index(step)
        return math.log(value) - curve["mean"][k], curve["deviation"][k]

    def z(self, name: str, step: int, value: float) -> float | None:
        """How many deviations a value lies above the mean; None where the band has none."""
        found = self.shift(name, step, value)
        return None if found is None else found[0] / found[1]

    def limits(self, name: str, step: int) -> tuple[float, float]:
        """The smallest and the largest value within the band."""
        curve = self.curves[name]
        k = curve["steps"].index(step)
        half = self.limit * curve["deviation"][k]
        return math.exp(curve["mean"][k] - half), math.exp(curve["mean"][k] + half)

    def causes(self, values: Values) -> list[tuple[str, float]]:
        """The known mistakes whose deviations are most like those of a run, with the cosine, best first.

        The cosine is that of sign(z) ln(1 + |z|) over all values that both runs have, so that one extreme value does
        not outweigh the pattern.
        """
        found = []
        for mistake in self.mistakes.values():
            pairs = []
            for name, steps in mistake["shift"].items():
                for step, other in steps.items():
                    here = self.shift(name, int(step), values.get(name, {}).get(int(step), 0.0))
                    if here is not None:
                        pairs.append((here[0] / here[1], other / here[1]))
            if pairs:
                ours, theirs = (np.sign(z) * np.log1p(np.abs(z)) for z in np.array(pairs).T)
                norm = np.linalg.norm(ours) * np.linalg.norm(theirs)
                found.append((mistake["cause"], float(ours @ theirs / norm) if norm else 0.0))
        return sorted((each for each in found if each[1] >= ALIKE), key=lambda each: -each[1])


def fit_curves(runs: Sequence[Values]) -> dict[str, Curve]:
    """The curves of a band from the values of trainings that differ in their seed only.

    The deviation is that of a further run: sqrt(1 + 1/n) times the sample's, averaged over neighbouring steps.
    """
    curves: dict[str, Curve] = {}
    for name in runs[0]:
        steps = sorted(set.intersection(*(set(run.get(name, {})) for run in runs)))
        if not steps:
            continue
        values = np.array([[run[name][step] for step in steps] for run in runs])
        logs = np.log(values)
        variance = logs.var(axis=0, ddof=1) * (1 + 1 / len(runs))
        smooth = [
            variance[max(0, k - SMOOTHING) : k + SMOOTHING + 1].mean() ** 0.5 for k in range(len(steps))
        ]
        low, median, high = np.quantile(values, [0.05, 0.5, 0.95], axis=0)
        curves[name] = Curve(
            steps=steps,
            low=low.tolist(),
            median=median.tolist(),
            high=high.tolist(),
            mean=logs.mean(axis=0).tolist(),
            deviation=[max(float(each), SMALLEST_DEVIATION) for each in smooth],
        )
    return curves


def largest_z(curves: Mapping[str, Curve], values: Values) -> float:
    """The largest |z| of a run over all values and steps that a band has."""
    found = [0.0]
    for name, curve in curves.items():
        for step, mean, deviation in zip(curve["steps"], curve["mean"], curve["deviation"], strict=True):
            if step in values.get(name, {}):
                found.append(abs(math.log(values[name][step]) - mean) / deviation)
    return max(found)


def limit_of(runs: Sequence[Values], margin: float = MARGIN) -> float:
    """The limit of |z|: the largest of the runs, each compared with a band of the others, times the margin."""
    left_out = [largest_z(fit_curves([*runs[:k], *runs[k + 1 :]]), run) for k, run in enumerate(runs)]
    return margin * max(left_out)


def _rounded(content: Any) -> Any:
    if isinstance(content, float):
        return float(f"{content:.4g}")
    if isinstance(content, Mapping):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_rounded(value) for value in content]
    return content


def describe_value(name: str) -> str:
    """The name of a value in messages."""
    if name.startswith("level_"):
        level = int(name.removeprefix("level_"))
        place = {0: " (least noise)", LEVELS - 1: " (most noise)"}.get(level, "")
        return f"the loss at noise level {level + 1} of {LEVELS}{place}"
    return {
        "gradient_norm": "the gradient norm",
        "val_loss": "the validation loss",
        "val_loss_ema": "the validation loss of the averaged weights",
        "ema_gain": "the validation loss of the averaged weights relative to that of the raw ones",
        "images": "the number of images per step",
    }.get(name, name)
