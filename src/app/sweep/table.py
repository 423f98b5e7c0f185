"""The tables at the end of a sweep: the jobs' scores, and what matters among the options that were varied."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from src.app.sweep.jobs import Job, Sweep
from src.errors import UserError
from src.evaluation.record import Record
from src.report.effects import Mean, Result, digits, interactions, marginal_means
from src.report.protocol import higher_is_better
from src.report.subjects import split_option
from src.runs.folder import SCORES_FILE


def print_tables(sweep: Sweep, outcomes: dict[int, dict[str, Any]], pairs: bool = False) -> None:
    """The table of the jobs, and for varied options the mean of the first score at each of their values.

    Args:
        sweep: the sweep.
        outcomes: of its jobs, by number.
        pairs: also print the interactions of pairs of options.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 160)
    names = sorted({name for outcome in outcomes.values() for name in outcome.get("scores") or {}})
    table = Table("job", "varied", *names, title=escape(f"{sweep.folder} ({len(sweep.jobs)} jobs)"))
    records: dict[int, Record] = {}
    for job in sweep.jobs:
        with suppress(UserError):
            records[job.number] = Record.read(job.folder / SCORES_FILE)
        outcome = outcomes.get(job.number)
        said = "" if outcome else "not run to its end; the same command continues it"
        outcome = outcome or {}
        texts = _printed(outcome.get("scores") or {}, records.get(job.number))
        cells = [texts.get(name, "") for name in names]
        if "error" in outcome:
            said = f"[red]failed: {escape(outcome['error'])}"
        cells = [said, *cells[1:]] if said else cells
        table.add_row(str(job.number), escape(" ".join(job.varied or job.overrides)), *cells)
    console.print(table)
    score, results = monitored(sweep.jobs, outcomes)
    better = (higher_is_better(score, record) for record in records.values() if score in record.scores)
    by_name = higher_is_better(score, Record({}, {}))  # jobs of earlier releases have no record
    rows = marginal_means(results, bool(next(better, by_name)))
    if rows:
        means = Table("option", f"mean {score}", "difference from the best", "results", title="what matters")
        for row in rows:
            gap = "best" if row.difference is None else _text(row.difference)
            means.add_row(escape(f"{row.option}={row.value}"), _text(row.mean), gap, str(row.results))
        console.print(means)
    found = interactions(results) if pairs else []
    if found:
        table = Table("options", f"mean {score}", "interaction", "results", title="interactions")
        for row in found:
            options = " ".join(f"{name}={value}" for name, value in row.options)
            table.add_row(escape(options), _text(row.mean), _text(row.effect), str(row.results))
        console.print(table)


def _printed(scores: Mapping[str, float], record: Record | None) -> dict[str, str]:
    """The scores of a job, with their intervals where its record has them."""
    known = record.scores if record else {}
    return {n: record.printed(n) if known.get(n) == v else digits(v) for n, v in scores.items()}


def _text(mean: Mean) -> str:
    """A mean and half of its interval, e.g. "1.50 ± 0.20"."""
    return digits(mean.value, mean.half) + (f" ± {mean.half:.2g}" if mean.half else "")


def monitored(jobs: Sequence[Job], outcomes: dict[int, dict[str, Any]]) -> tuple[str, list[Result]]:
    """The name of the monitored score, the first of the first job with scores, and the results that have it."""
    first = {n: next(iter(o["scores"].items())) for n, o in outcomes.items() if o.get("scores")}
    score = next((name for name, _ in first.values()), "")
    results = []
    for job in jobs:
        name, value = first.get(job.number, (None, 0.0))
        if name == score:
            options = dict(map(split_option, job.varied))
            results.append(Result(options, options.pop("seed", ""), value))
    return score, results
