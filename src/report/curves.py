"""The curves of a run, from the CSV files of its starts."""

import csv
import math
from collections.abc import Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path

from src.errors import UserError
from src.report.run import curve_files
from src.runs.files import open_regular

Curve = tuple[list[int], list[float]]
"""Steps, increasing, and the values at these steps."""

MOST_POINTS = 300
"""Of a curve in the page: longer ones are averaged over equally many neighbours."""
MOST_BYTES = 1 << 28  # of a CSV file


def curves_of(folder: Path, problems: list[str] | None = None) -> dict[str, Curve]:
    """The curves of a run by name, all starts joined; of two values at one step, the later one.

    Args:
        folder: the run folder.
        problems: gets a line for each file that cannot be read.
    """
    found: dict[str, dict[int, float]] = {}
    for path in curve_files(folder):
        try:
            with open_regular(path) as file:
                _read(csv.DictReader(TextIOWrapper(file, errors="replace", newline="")), found)
        except (OSError, UserError, csv.Error) as error:
            if problems is not None:
                problems.append(f"{path.name}: {error}")
    return {
        name: (sorted(points), [points[step] for step in sorted(points)]) for name, points in found.items()
    }


def _read(rows: csv.DictReader, found: dict[str, dict[int, float]]) -> None:
    names = [name for name in rows.fieldnames or () if name != "step"]
    for row in rows:
        try:
            step = int(float(row["step"]))
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        for name in names:
            if text := row.get(name):
                try:
                    value = float(text)
                except ValueError:
                    continue
                if math.isfinite(value):
                    found.setdefault(name, {})[step] = value


def thinned(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """A curve with at most this many points: means over neighbouring ones, at the last step of each."""
    steps, values = curve
    size = -(-len(steps) // most)
    if size <= 1:
        return curve
    parts = range(0, len(steps), size)
    means = [math.fsum(values[i : i + size]) / len(values[i : i + size]) for i in parts]
    return [steps[min(i + size, len(steps)) - 1] for i in parts], means


def seconds_of(curves: Mapping[str, Curve]) -> float | None:
    """Seconds of a training by its curves: images between two points, divided by images per second."""
    if "train/samples" not in curves or "train/images_per_second" not in curves:
        return None
    samples = dict(zip(*curves["train/samples"], strict=True))
    speeds = dict(zip(*curves["train/images_per_second"], strict=True))
    total, before = 0.0, 0.0
    for step in sorted(samples.keys() & speeds.keys()):
        if speeds[step] > 0:
            total += (samples[step] - before) / speeds[step]
            before = samples[step]
    return total if 0 < total < math.inf else None


def last_mean(curve: Curve, share: float = 0.1) -> float:
    """The mean of the last tenth of a curve."""
    values: Sequence[float] = curve[1][-max(1, round(len(curve[1]) * share)) :]
    return math.fsum(values) / len(values)
