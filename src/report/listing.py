"""The list of `python -m src.runs`."""

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from src.errors import UserError
from src.report.effects import digits
from src.report.page import duration
from src.report.progress import count_runs, progress
from src.report.protocol import Column, column_of, higher_is_better
from src.report.run import STATUSES, Cost, Run, find_runs, flat, read_run, read_yaml
from src.report.texts import shortened

CONF = Path(__file__).parents[2] / "conf"
MOST_VALUES = 20  # in a message
COLOURS = {"finished": "green", "running": "cyan", "stopped": "yellow", "failed": "red"}


@dataclass(frozen=True)
class Line:
    """What the list keeps of a run.

    Attributes:
        place: its folder.
        status: see `Run`.
        error: why it failed; None for other runs.
        step: optimiser steps.
        max_steps: steps of a complete training; None if unknown.
        scores: the last scores by name.
        best: the scores of the best checkpoint by name.
        best_step: its step; None if unknown.
        columns: by score, what decides whether it may be compared with others.
        rising: the scores of which larger values are better.
        cost: see `Cost`.
        started: seconds since the epoch; 0 if unknown.
    """

    place: Path
    status: str
    error: str | None
    step: int
    max_steps: int | None
    scores: Mapping[str, float]
    best: Mapping[str, float]
    best_step: int | None
    columns: Mapping[str, int]
    rising: Collection[str]
    cost: Cost
    started: float

    def value(self, score: str) -> float | None:
        """The best value of a score: that of the best checkpoint, or the last one."""
        values = [each[score] for each in (self.best, self.scores) if score in each]
        return (max if score in self.rising else min)(values, default=None)


def list_runs(places: Sequence[Path], options: Mapping[str, str]) -> None:
    """Prints the list.

    Args:
        places: folders with runs.
        options: best, status, n, and values that options of the runs must have.

    Raises:
        UserError: a wrong option, or no run.
    """
    wanted = {name: value for name, value in options.items() if name not in ("best", "status", "n")}
    statuses = options["status"].split(",") if "status" in options else STATUSES
    for status in statuses:
        if status not in STATUSES:
            raise UserError(f"status={status}: choose {', '.join(STATUSES)}")
    limit = options.get("n", "")
    if "n" in options and not (limit.isdecimal() and int(limit)):
        raise UserError(f"n={limit}: give a number of runs, at least 1")
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place}: no such folder; name one with runs, e.g. python -m src.runs runs")
    lines, of_all = _lines(places, wanted, statuses)
    if not of_all:
        raise UserError(f"no runs below {', '.join(map(str, places))}")
    score = _score(options["best"], lines) if "best" in options else None
    if score is not None:
        lines = _best_first(lines, score)
    else:
        lines.sort(key=lambda line: (line.started, str(line.place)))
    shown = lines[: int(limit)] if limit else lines
    _print(shown, score, f"{len(shown)} of {of_all} runs")


def _lines(
    places: Sequence[Path], wanted: Mapping[str, str], statuses: Sequence[str]
) -> tuple[list[Line], int]:
    """The lines of the runs that are wanted, and the number of all runs."""
    filters = {name: [value.strip() for value in values.split(",")] for name, values in wanted.items()}
    columns: dict[Column, int] = {}
    lines, total = [], 0
    values: dict[str, set[str]] = {name: set() for name in filters}  # that the runs have
    matched = set[str]()
    with progress("reading", lambda: count_runs(places)) as advance:
        for run in _runs(places):
            advance()
            total += 1
            names = {*run.options, *(key.removesuffix("._target_") for key in run.options)}
            fits = {name for name, any_of in filters.items() if matches(run, name, any_of)}
            matched |= fits
            for name in filters:
                if name in names and len(values[name]) < MOST_VALUES:
                    values[name].add(shortened(run.options.get(name, run.options.get(f"{name}._target_"))))
            if run.status in statuses and len(fits) == len(filters):
                lines.append(_line(run, columns))
    for name in filters:
        if total and name not in matched:
            _explain(name, wanted[name], sorted(values[name]), names)
    return lines, total


def _explain(name: str, wanted: str, values: Sequence[str], names: Collection[str]) -> NoReturn:
    """Reports a filter that no run passes."""
    if values:
        raise UserError(f"{name}={wanted}: no run has this value; there is {', '.join(values)}")
    near = difflib.get_close_matches(name, names, 1)
    raise UserError(f"{name}: no run has such an option{f'; did you mean {near[0]}?' if near else ''}")


def _runs(places: Sequence[Path]) -> Iterator[Run]:
    seen = set()
    for place in places:
        for folder, varied in find_runs(place):
            if (real := folder.resolve()) not in seen:
                seen.add(real)
                yield read_run(folder, varied)


def _line(run: Run, columns: dict[Column, int]) -> Line:
    record = run.record
    scores = {} if record is None else record.scores
    kinds = {
        score: columns.setdefault(column_of(record, score, run, set()), len(columns))
        for score in scores
        if not score.startswith("val/")
    }
    best = run.best.protocol.get("recipe", {}) if run.best else {}
    return Line(
        run.folder,
        run.status,
        run.error or (run.problems[0] if run.problems else None),
        int(run.step),
        run.max_steps,
        dict(run.last.scores) if run.last else {},
        dict(run.best.scores) if run.best else {},
        best.get("training_steps") if isinstance(best, dict) else None,
        kinds,
        {
            score
            for each in (run.last, run.best)
            if each
            for score in each.scores
            if higher_is_better(score, each)
        },
        run.cost,
        run.started.timestamp() if run.started else 0.0,
    )


def matches(run: Run, name: str, values: Sequence[str]) -> bool:
    """Whether an option of a run has one of these values, as they would be typed.

    A group has a choice if its class and all arguments are those of conf/<group>/<choice>.yaml, or if the class is
    named like the choice; an option that was varied in a sweep, if it was typed so.
    """
    return any(_matches(run, name, value) for value in values)


def _matches(run: Run, name: str, value: str) -> bool:
    if f"{name}={value}" in run.varied:
        return True
    if name in run.options:
        stored = run.options[name]
        if isinstance(stored, bool) or stored is None:
            return value.lower() == {True: "true", False: "false", None: "null"}[stored]
        if isinstance(stored, int | float):
            try:
                return float(value) == stored
            except ValueError:
                return False
        return value == str(stored) or (isinstance(stored, list) and value == str(stored).replace(" ", ""))
    target = run.options.get(f"{name}._target_")
    choice = CONF / name / f"{value}.yaml"
    if not re.fullmatch(r"[\w/]+", f"{name}/{value}") or target is None:
        return value == "none" and not any(key.startswith(f"{name}.") for key in run.options)
    if not choice.is_file():
        return _plain(str(target).rpartition(".")[2]) == _plain(value)
    entries = {
        key: entry
        for key, entry in flat(read_yaml(choice)).items()
        if key != "defaults" and not (isinstance(entry, str) and "${" in entry)
    }
    return all(run.options.get(f"{name}.{key}") == entry for key, entry in entries.items()) or (
        _plain(str(target).rpartition(".")[2]) == _plain(value) and entries.get("_target_") == target
    )


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _score(asked: str, lines: Sequence[Line]) -> str:
    """The score to sort by.

    Raises:
        UserError: no run has it.
    """
    names = Counter(name for line in lines for name in {**line.scores, **line.best})
    if asked and asked not in ("null", "true"):
        if asked not in names:
            raise UserError(f"best={asked}: no run has this score; there is {', '.join(names) or 'none'}")
        return asked
    first = Counter(
        next(iter(scores))
        for line in lines
        if (scores := line.best or line.scores) and "/" not in next(iter(scores))
    )
    if not first:
        raise UserError("--best: no run has a score of generated images")
    return first.most_common(1)[0][0]


def _best_first(lines: Sequence[Line], score: str) -> list[Line]:
    """By score; those of the most frequent protocol first, since others cannot be compared with them."""
    counts = Counter(line.columns.get(score) for line in lines)
    sign = -1 if any(score in line.rising for line in lines) else 1

    def key(line: Line) -> tuple[bool, int, int, float]:
        value, kind = line.value(score), line.columns.get(score)
        return value is None, -counts[kind], kind or 0, 0.0 if value is None else sign * value

    return sorted(lines, key=key)


def _last(line: Line, name: str, others: bool) -> str:
    """The last value of a score; of a run that has another one, that with its name."""
    if name in line.scores or not others or not line.scores:
        return digits(line.scores.get(name))
    other, value = next(iter(line.scores.items()))
    return f"{other} {digits(value)}"


def _print(lines: Sequence[Line], score: str | None, title: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    first = Counter(name for line in lines for name in list(line.scores or line.best)[:1])
    name = score or (first.most_common(1)[0][0] if first else "score")
    kinds = list(dict.fromkeys(line.columns[name] for line in lines if name in line.columns))
    letters = {kind: chr(ord("A") + place) if place < 26 else str(place) for place, kind in enumerate(kinds)}
    console = Console(width=None if Console().is_terminal else 200)
    table = Table(title=title, title_justify="left", expand=False)
    table.add_column("run", overflow="fold")
    for head in (
        "status",
        "step",
        name,
        "best",
        *(("protocol",) if len(kinds) > 1 else ()),
        "time",
        "images/s",
    ):
        table.add_column(head, justify="left" if head in ("status", "protocol") else "right", no_wrap=True)
    table.add_column("hardware", overflow="fold")
    for line in lines:
        cost = line.cost
        best = digits(line.best.get(name))
        table.add_row(
            escape(str(line.place)) + (f"\n[red]{escape(line.error[:300])}[/]" if line.error else ""),
            f"[{COLOURS[line.status]}]{line.status}",
            f"{line.step:,}"
            + (f"/{line.max_steps:,}" if line.max_steps and line.max_steps != line.step else ""),
            _last(line, name, score is None),
            best + (f" at {line.best_step:,}" if name in line.best and line.best_step else ""),
            *((letters.get(line.columns.get(name, -1), ""),) if len(kinds) > 1 else ()),
            duration(cost.seconds),
            f"{cost.images_per_second:,.0f}" if cost.images_per_second else "–",
            escape(cost.hardware),
        )
    console.print(table)
    if len(kinds) > 1:
        console.print(
            f"{name} is computed in {len(kinds)} ways (protocol), whose values cannot be compared; python -m src.report"
            " names the differences"
        )
