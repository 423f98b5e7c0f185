"""The tables at the end of a sweep: the jobs' scores, and what matters among the options that were varied."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from src.app.sweep.jobs import Job, Sweep, option_of


def print_tables(sweep: Sweep, outcomes: dict[int, dict[str, Any]], pairs: bool = False) -> None:
    """The table of the jobs, and for varied options the mean of the first score at each of their values.

    Args:
        sweep: the sweep.
        outcomes: of its jobs, by number.
        pairs: also print the means of pairs of options.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 160)
    names = _score_names(outcomes)
    table = Table("job", "varied", *names, title=f"{sweep.folder} ({len(sweep.jobs)} jobs)")
    for job in sweep.jobs:
        outcome = outcomes.get(job.number, {"error": "not run to its end; the same command continues it"})
        scores = outcome.get("scores") or {}
        cells = [f"{scores[name]:.4g}" if name in scores else "" for name in names]
        if "error" in outcome:
            cells = [f"[red]failed: {outcome['error']}", *cells[1:]]
        table.add_row(str(job.number), " ".join(job.varied or job.overrides), *cells)
    if not names and any("error" in outcome for outcome in outcomes.values()):
        table.add_column("")
    console.print(table)
    rows = marginal_means(sweep.jobs, outcomes)
    if rows:
        means = Table("option", f"mean {rows[0].score}", "jobs", title="what matters")
        for row in rows:
            means.add_row(row.option, with_interval(row.mean, row.interval), str(row.jobs))
        console.print(means)
    found = interactions(sweep.jobs, outcomes) if pairs else []
    if found:
        table = Table("options", f"mean {found[0].score}", "interaction", "jobs", title="interactions")
        for row in found:
            effect = "" if row.effect is None else with_interval(row.effect, row.effect_interval)
            table.add_row(" ".join(row.options), with_interval(row.mean, row.interval), effect, str(row.jobs))
        console.print(table)


def with_interval(mean: float, interval: float | None) -> str:
    """A mean and half of its interval, e.g. "1.5 ± 0.2"."""
    return f"{mean:.4g}" + (f" ± {interval:.2g}" if interval else "")


def _score_names(outcomes: dict[int, dict[str, Any]]) -> list[str]:
    return sorted({name for outcome in outcomes.values() for name in outcome.get("scores") or {}})


@dataclass(frozen=True)
class Marginal:
    """The mean of a score over all jobs with one value of one option.

    Attributes:
        option: e.g. "schedule=cosine".
        score: the score's name.
        mean: over all other varied options and seeds.
        interval: half of the 95 % interval of the mean over seeds (Student's t); None without several seeds.
        jobs: how many jobs it is the mean of.
    """

    option: str
    score: str
    mean: float
    interval: float | None
    jobs: int


@dataclass(frozen=True)
class Interaction:
    """The mean of a score over all jobs with two values of two options, and what no sum of both explains.

    Attributes:
        options: e.g. ("schedule=cosine", "parameterization=v").
        score: the score's name.
        mean: over all other varied options and seeds.
        interval: half of its 95 % interval over seeds; None without several seeds.
        effect: mean of this pair - mean of the first - mean of the second + mean of all; 0 where the options act
            independently. None if a combination of their values has no score.
        effect_interval: half of its 95 % interval over seeds.
        jobs: how many jobs it is the mean of.
    """

    options: tuple[str, str]
    score: str
    mean: float
    interval: float | None
    effect: float | None
    effect_interval: float | None
    jobs: int


@dataclass(frozen=True)
class _Scored:
    """A job with a score: its varied options without the seed, the seed, and the monitored score."""

    options: tuple[str, ...]
    seed: str
    value: float


def marginal_means(jobs: Sequence[Job], outcomes: dict[int, dict[str, Any]]) -> list[Marginal]:
    """For every value of every varied option, the mean of the monitored score; empty if only seeds were varied."""
    score, scored = _scored(jobs, outcomes)
    rows = []
    for options in _values(scored).values():
        for option in options:
            by_seed = _by_seed(scored, (option,))
            mean, interval = _mean(list(map(_average, by_seed.values())))
            rows.append(Marginal(option, score, mean, interval, sum(map(len, by_seed.values()))))
    return rows


def interactions(jobs: Sequence[Job], outcomes: dict[int, dict[str, Any]]) -> list[Interaction]:
    """For every pair of values of every two varied options, the mean of the monitored score, and the interaction."""
    score, scored = _scored(jobs, outcomes)
    rows = []
    for first, second in combinations(_values(scored).values(), 2):
        cells = {pair: _by_seed(scored, pair) for pair in product(first, second)}
        effects = _effects(cells, first, second)
        for pair, by_seed in cells.items():
            if not by_seed:
                continue
            mean, interval = _mean(list(map(_average, by_seed.values())))
            effect, within = _mean(effects[pair]) if effects else (None, None)
            count = sum(map(len, by_seed.values()))
            rows.append(Interaction(pair, score, mean, interval, effect, within, count))
    return rows


def _effects(
    cells: dict[tuple[str, str], dict[str, list[float]]], first: Sequence[str], second: Sequence[str]
) -> dict[tuple[str, str], list[float]]:
    """The interaction of each pair, for each seed that has all pairs; empty if none has."""
    seeds = [seed for seed in cells[first[0], second[0]] if all(seed in each for each in cells.values())]
    effects: dict[tuple[str, str], list[float]] = {}
    for seed in seeds:
        means = {pair: _average(by_seed[seed]) for pair, by_seed in cells.items()}
        whole = _average(list(means.values()))
        for a, b in cells:
            row, column = (
                [m for p, m in means.items() if p[place] == name] for place, name in enumerate((a, b))
            )
            effects.setdefault((a, b), []).append(means[a, b] - _average(row) - _average(column) + whole)
    return effects


def _scored(jobs: Sequence[Job], outcomes: dict[int, dict[str, Any]]) -> tuple[str, list[_Scored]]:
    """The name of the monitored score, the first of the first job with scores, and the jobs that have it."""
    first = {n: next(iter(o["scores"].items())) for n, o in outcomes.items() if o.get("scores")}
    score = next((name for name, _ in first.values()), "")
    found = []
    for job in jobs:
        name, value = first.get(job.number, (None, 0.0))
        if name == score:
            seed = next((o for o in job.varied if option_of(o) == "seed"), "")
            found.append(_Scored(tuple(o for o in job.varied if o != seed), seed, value))
    return score, found


def _values(scored: Sequence[_Scored]) -> dict[str, list[str]]:
    """The values of each option that has several, in the order of the jobs."""
    values: dict[str, dict[str, None]] = {}
    for each in scored:
        for option in each.options:
            values.setdefault(option_of(option), {})[option] = None
    return {name: list(options) for name, options in sorted(values.items()) if len(options) > 1}


def _by_seed(scored: Sequence[_Scored], options: tuple[str, ...]) -> dict[str, list[float]]:
    """The scores of the jobs with these options, by seed."""
    found: dict[str, list[float]] = {}
    for each in scored:
        if set(options) <= set(each.options):
            found.setdefault(each.seed, []).append(each.value)
    return found


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _mean(means: Sequence[float]) -> tuple[float, float | None]:
    """The mean of independent values, and half of its 95 % interval (Student's t); None for a single value."""
    from scipy.stats import t

    mean = _average(means)
    if len(means) < 2:
        return mean, None
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in means) / (len(means) - 1))
    return mean, float(t.ppf(0.975, len(means) - 1) * deviation / math.sqrt(len(means)))
