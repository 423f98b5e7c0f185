"""The figures of a report, as plotly's JSON: {"data": [...], "layout": {...}}."""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from src.report.comparison import SEEDS, Cell, Comparison, Row
from src.report.curves import Curve, last_mean, thinned
from src.report.effects import mean
from src.report.protocol import Column, column_of
from src.report.subjects import Subject
from src.report.texts import ABSENT, LONGEST, in_words
from src.runs.files import digest_of

# Okabe and Ito's colours, which colour-blind people can tell apart; black and yellow are left out, since one of them
# is invisible on either background.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6BB1")
DASHES = ("solid", "dash", "dot", "dashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up")
ALL = "all seeds"
WIDE = 20  # a ratio of values from which an axis is logarithmic


@dataclass
class Figure:
    """A figure of the page.

    Texts of runs are untrusted, and plotly takes tags in texts: `json` escapes all texts but the templates, which are
    this module's own.

    Attributes:
        title: its heading.
        caption: what it shows.
        data: plotly's traces.
        layout: plotly's layout, without colours, which the page sets.
        height: in CSS pixels.
    """

    title: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 340

    def json(self) -> dict[str, Any]:
        """What plotly draws."""
        return {"data": [_escaped(trace) for trace in self.data], "layout": _escaped(self.layout)}


def _escaped(node: Any, name: str = "") -> Any:
    if isinstance(node, dict):
        return {key: _escaped(value, key) for key, value in node.items()}
    if isinstance(node, list):
        return [_escaped(value) for value in node]
    if isinstance(node, float) and not math.isfinite(node):
        return None
    return node.replace("<", "&lt;") if isinstance(node, str) and name != "hovertemplate" else node


class Palette:
    """The colour and the line style of each setting, the same in all figures."""

    def __init__(self, settings: Iterable[str]):
        self._places = {setting: place for place, setting in enumerate(dict.fromkeys(settings))} | {ALL: 0}

    def colour(self, setting: str) -> str:
        """A colour, hexadecimal."""
        return COLOURS[self._places[setting] % len(COLOURS)]

    def dash(self, setting: str) -> str:
        """A line style, another one each time the colours are used up."""
        return DASHES[self._places[setting] // len(COLOURS) % len(DASHES)]

    def marker(self, setting: str) -> str:
        """A marker, likewise."""
        return MARKERS[self._places[setting] // len(COLOURS) % len(MARKERS)]


def setting_of(options: Mapping[str, str], name: str) -> str:
    """The options of a run without its seed, as one text; the run's name without options."""
    text = in_words({key: value for key, value in options.items() if key not in SEEDS}) or name
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 6]}… {digest_of(text, 4)}"


def palette_of(comparison: Comparison) -> Palette:
    """The palette of a comparison."""
    owners = [(each.options, each.name) for each in comparison.subjects]
    return Palette(
        [
            setting_of(*each)
            for each in [*owners, *((row.options, row.subject.name) for row in comparison.rows)]
        ]
    )


def score_figure(comparison: Comparison, column: Column, palette: Palette) -> Figure:
    """One line for each setting, the best on top: its results, and their mean with its interval."""
    groups: dict[str, list[Row]] = defaultdict(list)
    only_seeds = bool(comparison.options) and not set(comparison.options) - set(SEEDS)
    for row in comparison.rows:
        if column in row.cells and math.isfinite(row.cells[column].value):
            groups[ALL if only_seeds else setting_of(row.options, row.subject.name)].append(row)
    means = {name: mean([row.cells[column].value for row in rows]) for name, rows in groups.items()}
    order = sorted(means, key=lambda name: means[name].value, reverse=not column.higher_is_better)
    data = []
    for name in order:
        cells = [row.cells[column] for row in groups[name]]
        data.append(
            {
                "x": [cell.value for cell in cells],
                "y": [name] * len(cells),
                "customdata": [row.subject.name for row in groups[name]],
                "hovertemplate": "%{customdata}<br>%{x:.5g}<extra></extra>",
                "mode": "markers",
                "marker": {"color": palette.colour(name), "size": 7, "symbol": "circle-open"},
                "error_x": {**_bars(cells), "thickness": 1, "width": 3},
                "showlegend": False,
            }
        )
        if len(cells) > 1:
            data.append(
                {
                    "x": [means[name].value],
                    "y": [name],
                    "hovertemplate": f"mean of {len(cells)}: %{{x:.5g}}<extra></extra>",
                    "mode": "markers",
                    "marker": {"color": palette.colour(name), "size": 11, "symbol": "diamond"},
                    "error_x": {"array": [means[name].half], "thickness": 2, "width": 6},
                    "showlegend": False,
                }
            )
    values = [cell["x"] for cell in data]
    better = {True: ": higher is better", False: ": lower is better", None: ""}[column.higher_is_better]
    layout = {
        "xaxis": _scale([value for each in values for value in each]),
        "yaxis": {"type": "category", "categoryarray": order, "automargin": True},
    }
    caption = "Circles: single results, with their own intervals where the records have them."
    if any(len(rows) > 1 for rows in groups.values()):
        caption += " Diamonds: means over seeds with 95 % intervals (Student's t)."
    return Figure(column.score + better, caption, data, layout, 70 + 28 * len(order))


def _bars(cells: Sequence[Cell]) -> dict[str, Any]:
    """Plotly's error bars for the intervals of scores."""
    known = [cell.low is not None and cell.high is not None for cell in cells]
    pairs = list(zip(cells, known, strict=True))
    return {
        "symmetric": False,
        "array": [cell.high - cell.value if has else 0 for cell, has in pairs],
        "arrayminus": [cell.value - cell.low if has else 0 for cell, has in pairs],
        "visible": any(known),
    }


def front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[int]:
    """The places of the points (cost, score) to which no other point is at most equal in cost and better in score.

    Returns:
        In order of cost, with strictly improving scores.
    """
    sign = -1 if higher_is_better else 1
    chosen: list[int] = []
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if not chosen or sign * points[place][1] < sign * points[chosen[-1]][1]:
            chosen.append(place)
    return chosen


def evaluation_figures(comparison: Comparison, palette: Palette) -> list[Figure]:
    """For each way of computing a score, the scores against network evaluations, if there are several numbers of them.

    The images may be made differently here: that is what the evaluations measure.
    """
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[tuple[Row, Column]]] = defaultdict(list)
    for row in comparison.rows:
        for column in row.cells:
            plotted = column.protocol is not None and column.higher_is_better is not None
            if row.evaluations and plotted and not column.score.startswith("val/"):
                measured = tuple(item for item in column.protocol if not item[0].startswith("recipe."))
                groups[column.score, measured].append((row, column))
    figures = []
    for (score, _), found in groups.items():
        found = [(row, column) for row, column in found if math.isfinite(row.cells[column].value)]
        if len({row.evaluations for row, _ in found}) > 1:
            figures.append(_evaluation_figure(score, found, palette))
    return figures


def _evaluation_figure(score: str, found: Sequence[tuple[Row, Column]], palette: Palette) -> Figure:
    points = [(float(row.evaluations or 0), row.cells[column].value) for row, column in found]
    best = front(points, bool(found[0][1].higher_is_better))
    data: list[dict[str, Any]] = [
        {
            "x": [points[i][0] for i in best],
            "y": [points[i][1] for i in best],
            "mode": "lines",
            "line": {"shape": "hv", "color": "#808080", "width": 1.5, "dash": "dot"},
            "name": "Pareto front",
            "hoverinfo": "skip",
        }
    ]
    groups: dict[str, list[int]] = defaultdict(list)
    for place, (row, _) in enumerate(found):
        groups[setting_of(row.options, row.subject.name)].append(place)
    for setting, places in groups.items():
        cells = [found[i][0].cells[found[i][1]] for i in places]
        data.append(
            {
                "x": [points[i][0] for i in places],
                "y": [points[i][1] for i in places],
                "customdata": [_made(found[i][0]) for i in places],
                "hovertemplate": "%{customdata[0]}<br>%{customdata[1]}<br>%{x} evaluations: %{y:.5g}<extra></extra>",
                "mode": "markers",
                "marker": {"color": palette.colour(setting), "symbol": palette.marker(setting), "size": 9},
                "error_y": {**_bars(cells), "thickness": 1},
                "name": setting,
            }
        )
    layout = {
        "xaxis": {"title": {"text": "network evaluations for an image"}, **_scale([x for x, _ in points])},
        "yaxis": {"title": {"text": score}, **_scale([y for _, y in points])},
    }
    caption = (
        f"No result has at most as many evaluations and a better score than one on the Pareto front ({len(best)} of"
        f" {len(points)})."
    )
    return Figure(score, caption, data, layout, 300 + 18 * len(groups))


def _made(row: Row) -> list[str]:
    recipe = row.records[0].record.protocol.get("recipe", {})
    return [row.subject.name, f"{recipe.get('sampler', ABSENT)}, {recipe.get('spacing', ABSENT)}"]


def loss_figures(
    subjects: Sequence[Subject], curves: Sequence[Mapping[str, Curve]], palette: Palette
) -> list[tuple[str, list[Figure]]]:
    """The losses, apart for each definition of the loss, since those of different definitions have different scales.

    Args:
        subjects: the runs.
        curves: the curves of each.
        palette: the colours.

    Returns:
        What distinguishes the definition, and its figures.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    for place, subject in enumerate(subjects):
        if subject.run is not None and curves[place]:
            column = (
                column_of(subject.run.record, "val/loss", subject.run, set()) if subject.run.record else None
            )
            definition = column.protocol if column else _definition(subject)
            groups[definition].append(place)
    keys = [dict(definition or ()) for definition in groups]
    differ = [
        k for k in dict.fromkeys(k for each in keys for k in each) if len({each.get(k) for each in keys}) > 1
    ]
    classes = [key for key in differ if key.endswith("_target_")] or differ
    found = []
    for definition, places in groups.items():
        entries = dict(definition or ())
        words = [f"{key.removesuffix('._target_')} {entries.get(key, ABSENT)}" for key in classes]
        chosen = [(subjects[i], curves[i]) for i in places]
        figures = [
            _over_steps("training loss", "train/loss", chosen, palette),
            _over_steps("validation loss, averaged weights", "val/loss_ema", chosen, palette)
            or _over_steps("validation loss", "val/loss", chosen, palette),
            _by_noise_level(chosen, palette),
        ]
        found.append((", ".join(words), [figure for figure in figures if figure is not None]))
    return [(title, figures) for title, figures in found if figures]


def _definition(subject: Subject) -> tuple[tuple[str, str], ...] | None:
    from src.evaluation.record import Record

    return column_of(Record({}, {}), "val/loss", subject.run, set()).protocol


def score_curves(
    subjects: Sequence[Subject],
    curves: Sequence[Mapping[str, Curve]],
    scores: Sequence[str],
    palette: Palette,
) -> list[Figure]:
    """The scores in training by step; runs that score in different ways are in different figures."""
    figures = []
    for score in scores:
        groups: dict[Any, list[int]] = defaultdict(list)
        for place, subject in enumerate(subjects):
            if score in curves[place] and subject.run is not None and subject.run.record is not None:
                groups[column_of(subject.run.record, score, subject.run, set())].append(place)
        for number, places in enumerate(groups.values(), start=1):
            chosen = [(subjects[i], curves[i]) for i in places]
            title = score if len(groups) == 1 else f"{score} (protocol {number} of {len(groups)})"
            if figure := _over_steps(title, score, chosen, palette):
                figures.append(figure)
    return figures


def _over_steps(
    title: str, name: str, chosen: Sequence[tuple[Subject, Mapping[str, Curve]]], palette: Palette
) -> Figure | None:
    data, values, seen = [], [], set()
    for subject, curves in chosen:
        if name not in curves:
            continue
        steps, ys = thinned(curves[name])
        setting = setting_of(subject.options, subject.name)
        data.append(
            {
                "x": steps,
                "y": [float(f"{y:.5g}") for y in ys],
                "mode": "lines" if len(steps) > 12 else "lines+markers",
                "line": {"color": palette.colour(setting), "dash": palette.dash(setting), "width": 1.5},
                "marker": {"size": 5},
                "name": setting,
                "legendgroup": setting,
                "showlegend": setting not in seen,
                "text": subject.name,
                "hovertemplate": "%{text}<br>step %{x}: %{y:.5g}<extra></extra>",
            }
        )
        seen.add(setting)
        values += ys
    if not data:
        return None
    layout = {
        "xaxis": {"title": {"text": "optimiser steps"}},
        "yaxis": _scale(values),
        "showlegend": len(seen) > 1,
    }
    return Figure(title, "", data, layout, _height(seen))


def _by_noise_level(chosen: Sequence[tuple[Subject, Mapping[str, Curve]]], palette: Palette) -> Figure | None:
    data, values, seen, most = [], [], set(), 0
    for subject, curves in chosen:
        levels = sorted(
            (int(match[1]), name)
            for name in curves
            if (match := re.fullmatch(r"train/loss_q([0-9]{1,9})", name))
        )
        if not levels:
            continue
        means = [last_mean(curves[name]) for _, name in levels]
        setting = setting_of(subject.options, subject.name)
        most = max(most, len(levels))
        data.append(
            {
                "x": [level for level, _ in levels],
                "y": means,
                "mode": "lines+markers",
                "line": {"color": palette.colour(setting), "dash": palette.dash(setting), "width": 1.5},
                "name": setting,
                "legendgroup": setting,
                "showlegend": setting not in seen,
                "text": subject.name,
                "hovertemplate": "%{text}<br>%{x}: %{y:.5g}<extra></extra>",
            }
        )
        seen.add(setting)
        values += means
    if not data:
        return None
    ticks = [f"{i / most:g}–{(i + 1) / most:g}" for i in range(most)]
    layout = {
        "xaxis": {
            "title": {"text": "time (0: clean, 1: noise)"},
            "tickvals": list(range(most)),
            "ticktext": ticks,
        },
        "yaxis": _scale(values),
        "showlegend": len(seen) > 1,
    }
    return Figure("loss by noise level at the end", "", data, layout, _height(seen))


def _height(settings: Collection[str]) -> int:
    """The height of a figure with a legend of these settings."""
    return 250 if len(settings) < 2 else 290 + 18 * math.ceil(len(settings) / 3)


def _scale(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis for positive values of different magnitudes."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or min(finite) <= 0 or max(finite) / min(finite) < WIDE:
        return {}
    decades = range(math.floor(math.log10(min(finite))), math.ceil(math.log10(max(finite))) + 1)
    ticks = [base * 10.0**decade for decade in decades for base in ((1, 2, 5) if len(decades) < 4 else (1,))]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
