"""The tables at the end of a sweep: the jobs' scores, and what matters among the options that were varied."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from src.app.sweep.jobs import Job, Sweep, option_of


def print_tables(sweep: Sweep, outcomes: dict[int, dict[str, Any]]) -> None:
    """The table of the jobs, and for several varied options the mean of the first score at each of their values."""
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
            means.add_row(
                row.option,
                f"{row.mean:.4g}" + (f" ± {row.interval:.2g}" if row.interval else ""),
                str(row.jobs),
            )
        console.print(means)


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


def marginal_means(jobs: Sequence[Job], outcomes: dict[int, dict[str, Any]]) -> list[Marginal]:
    """For every value of every varied option, the mean of the monitored score; empty if only seeds were varied."""
    import numpy as np
    from scipy.stats import t

    scored = {n: next(iter(o["scores"].items())) for n, o in outcomes.items() if o.get("scores")}
    if not scored:
        return []
    score = next(iter(scored.values()))[0]
    values: dict[str, dict[str, list[float]]] = {}
    for job in jobs:
        if scored.get(job.number, (None,))[0] != score:
            continue
        seed = next((o for o in job.varied if option_of(o) == "seed"), "")
        for option in job.varied:
            if option != seed:
                values.setdefault(option, {}).setdefault(seed, []).append(scored[job.number][1])
    compared = Counter(option_of(option) for option in values)
    rows = []
    for option, by_seed in sorted(values.items(), key=lambda item: option_of(item[0])):
        if compared[option_of(option)] < 2:
            continue
        means = [np.mean(one) for one in by_seed.values()]
        interval = None
        if len(means) > 1:
            interval = float(t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / np.sqrt(len(means)))
        count = sum(map(len, by_seed.values()))
        rows.append(Marginal(option, score, float(np.mean(means)), interval, count))
    return rows
