"""The report: one HTML page without network that compares runs, sweeps and records."""

import base64
import logging
import secrets
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from src.evaluation.record import Record
from src.report import figures as fig
from src.report.comparison import AGAIN, SEEDS, Cell, Comparison, Row, are_of_one_sweep
from src.report.curves import Curve, curves_of, seconds_of
from src.report.effects import Marginal, Mean, Result, digits, interactions, marginal_means, mean
from src.report.pictures import picture_groups
from src.report.protocol import Column, interval_of
from src.report.run import STATUSES, flat, read_run
from src.report.subjects import Scored, Subject
from src.report.texts import ABSENT, natural
from src.runs.files import write_atomically
from src.runs.folder import SCORES_FILE

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
PLOTLY = HERE / "plotly" / "plotly-basic.min.js.gz"
REPORT_FILE = "report.html"
MOST_DIFFERENCES = 4
"""Entries of a protocol in the head of a column; the cards have all."""


def write_report(
    subjects: Sequence[Subject],
    out: Path,
    score: str | None = None,
    command: Sequence[str] = (),
    advance: Callable[[], None] | None = None,
) -> Path:
    """Writes the page.

    Args:
        subjects: what is compared; see `comparison.subjects_of`.
        out: the file.
        score: the score that leads; by default the first score of generated images.
        command: the command line that makes the page, which it shows.
        advance: called after the curves of each run.

    Raises:
        UserError: no run has this score.
        OSError: the file cannot be written.
    """
    text = page(subjects, score, command, advance)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, text.encode())
    return out


def page(
    subjects: Sequence[Subject],
    score: str | None = None,
    command: Sequence[str] = (),
    advance: Callable[[], None] | None = None,
) -> str:
    """The page as text; see `write_report`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    comparison = Comparison(subjects)
    lead = comparison.lead(score)
    curves: list[dict[str, Curve]] = []
    for subject in comparison.subjects:
        curves.append({} if subject.run is None else curves_of(subject.run.folder, subject.run.problems))
        if advance:
            advance()
    palette = fig.palette_of(comparison)
    templates = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"digits": digits, "duration": duration, "pair": _pair}
    cards = _cards(comparison)
    sections = {
        "answer": fig.score_figure(comparison, lead, palette) if lead else None,
        "losses": fig.loss_figures(comparison.subjects, curves, palette),
        "by_step": fig.score_curves(comparison.subjects, curves, _scores_in(curves, lead), palette),
        "evaluations": fig.evaluation_figures(comparison, palette),
    }
    return templates.get_template("page.html").render(
        **sections,
        title=_title(comparison),
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        command=shlex.join(["python", "-m", "src.report", *command]) if command else "",
        comparison=comparison,
        statuses=_statuses(comparison),
        question=_question(comparison),
        seeds=_seeds(comparison),
        lead=lead,
        one_sweep=are_of_one_sweep(comparison.subjects),
        settings=_settings(comparison, lead),
        marginals=_marginals(comparison, lead),
        interactions=interactions(_results(comparison, lead)) if lead else [],
        tables=_tables(comparison, lead),
        pictures=picture_groups(comparison.subjects),
        costs=_costs(comparison.subjects, curves),
        cards=cards,
        card_of={card["path"]: number for number, card in enumerate(cards)},
        failed=[(s.name, s.run.error) for s in comparison.subjects if s.run and s.run.error],
        problems=[(s.name, line) for s in comparison.subjects if s.run for line in s.run.problems],
        absent=ABSENT,
        nonce=secrets.token_urlsafe(12),
        plotly=_plotly(),
    )


def _plotly() -> str:
    """plotly.js, packed by gzip, base64."""
    return base64.b64encode(PLOTLY.read_bytes()).decode()


def duration(seconds: float | None) -> str:
    """A duration for people, e.g. "3 min 20 s"."""
    if seconds is None:
        return ABSENT
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _pair(cell: Cell | Mean) -> tuple[str, str]:
    """A value and its interval as texts, with as many digits as the interval allows."""
    if cell.half is None:
        return digits(cell.value), ""
    value = digits(cell.value, cell.half)
    if isinstance(cell, Mean) or abs(cell.low + cell.high - 2 * cell.value) < 0.1 * cell.half:
        return value, f"± {digits(cell.half, cell.half)}"
    return value, f"[{digits(cell.low, cell.half)}, {digits(cell.high, cell.half)}]"


def _title(comparison: Comparison) -> str:
    count = sum(subject.run is not None for subject in comparison.subjects)
    names = [name for name in comparison.options if name not in SEEDS]
    what = f"{count} run{'s' if count != 1 else ''}" if count else f"{len(comparison.rows)} records"
    if len(comparison.subjects) == 1 and not names:
        return comparison.subjects[0].name
    if not names:
        return what
    if len(names) > 4:
        return f"{what}, {len(names)} options differ"
    return f"{' × '.join(names)}: {what}"


def _statuses(comparison: Comparison) -> list[tuple[str, int]]:
    counts = Counter(subject.run.status for subject in comparison.subjects if subject.run)
    return [(status, counts[status]) for status in STATUSES if counts[status]]


def _question(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """The options that differ, without the seed, with their values."""
    return [(name, values) for name, values in comparison.options.items() if name not in SEEDS]


def _seeds(comparison: Comparison) -> list[str]:
    return [value for name in SEEDS if name != AGAIN for value in comparison.options.get(name, ())]


def _results(comparison: Comparison, lead: Column) -> list[Result]:
    return [
        Result(row.setting, row.seed, row.cells[lead].value) for row in comparison.rows if lead in row.cells
    ]


def _settings(comparison: Comparison, lead: Column | None) -> list[tuple[list[str], Mean]]:
    """Each setting with the mean of the leading score over its seeds, the best first; empty without repetitions."""
    groups: dict[tuple[tuple[str, str], ...], list[float]] = defaultdict(list)
    for result in _results(comparison, lead) if lead else ():
        groups[tuple(result.options.items())].append(result.score)
    if lead is None or not any(len(values) > 1 for values in groups.values()):
        return []
    names = [name for name in comparison.options if name not in SEEDS]
    rows = [([dict(key).get(name, ABSENT) for name in names], mean(values)) for key, values in groups.items()]
    return sorted(rows, key=lambda row: row[1].value, reverse=bool(lead.higher_is_better))


def _marginals(comparison: Comparison, lead: Column | None) -> list[Marginal]:
    """The marginal means, if several options were varied, or one with several seeds."""
    if lead is None:
        return []
    return marginal_means(_results(comparison, lead), bool(lead.higher_is_better))


def _tables(comparison: Comparison, lead: Column | None) -> list[dict[str, Any]]:
    """The table of scores, and that of the validation losses."""
    tables = []
    for title, losses in (("Scores", False), ("Validation losses", True)):
        columns = [column for column in comparison.columns if column.score.startswith("val/") == losses]
        if lead in columns:
            columns = [lead, *(column for column in columns if column != lead)]
        if not columns and losses:
            continue
        heads = []
        for column in columns:
            same = [other for other in columns if other.score == column.score]
            differences = comparison.differences(same)[column]
            short = {
                key.removeprefix("recipe.").removesuffix("._target_"): v for key, v in differences.items()
            }
            heads.append(
                (column, list(short.items())[:MOST_DIFFERENCES], max(0, len(short) - MOST_DIFFERENCES))
            )
        rows = [
            row for row in comparison.rows if not losses or any(column in row.cells for column in columns)
        ]
        if lead in columns:
            rows = sorted(rows, key=lambda row: _order(row, lead))
        best = {column: _best(rows, column) for column in columns}
        split = len({column.score for column in columns}) < len(columns)
        tables.append({"title": title, "heads": heads, "rows": rows, "best": best, "split": split})
    return tables


def _order(row: Row, lead: Column) -> tuple[bool, float]:
    if lead not in row.cells:
        return True, 0.0
    return False, -row.cells[lead].value if lead.higher_is_better else row.cells[lead].value


def _best(rows: Sequence[Row], column: Column) -> float | None:
    """The best value of a column; None if there is nothing to choose from."""
    values = [row.cells[column].value for row in rows if column in row.cells]
    if len(values) < 2 or column.protocol is None or column.higher_is_better is None:
        return None
    return max(values) if column.higher_is_better else min(values)


def _scores_in(curves: Sequence[dict[str, Curve]], lead: Column | None) -> list[str]:
    names = dict.fromkeys(name for each in curves for name in each)
    scores = [
        name
        for name in names
        if "/" not in name and not name.endswith("_std") and name not in ("epoch", "step")
    ]
    return sorted(scores, key=lambda name: lead is None or name != lead.score)


def _costs(subjects: Sequence[Subject], curves: Sequence[dict[str, Curve]]) -> list[dict[str, Any]]:
    return [
        {
            "subject": subject,
            "run": subject.run,
            "seconds": seconds_of(each) or subject.run.cost.seconds,
            "started": subject.run.started.strftime("%Y-%m-%d %H:%M") if subject.run.started else ABSENT,
            "precision": subject.run.options.get("trainer.precision", ABSENT),
            "devices": subject.run.options.get("trainer.devices", ABSENT),
        }
        for subject, each in zip(subjects, curves, strict=True)
        if subject.run is not None
    ]


def _cards(comparison: Comparison) -> list[dict[str, Any]]:
    """The protocol of each record, and what the run was."""
    cards = []
    for row in comparison.rows:
        for scored in row.records:
            run, found = row.subject.run, scored.record.scores
            cards.append(
                {
                    "row": row,
                    "path": scored.path,
                    "scores": [
                        (name, value, interval_of(scored.record, name)) for name, value in found.items()
                    ],
                    "warnings": scored.record.warnings or [],
                    "protocol": sorted(
                        flat(scored.record.protocol).items(), key=lambda item: natural(item[0])
                    ),
                    "environment": sorted(flat(run.environment).items()) if run else [],
                    "options": sorted(run.options.items(), key=lambda item: item[0]) if run else [],
                }
            )
    return cards


def report_of(
    places: Sequence[Path], out: Path, score: str | None = None, advance: Callable[[], None] | None = None
) -> Path:
    """Reads runs, sweeps and records at these places and writes their report.

    Args:
        places: run folders, sweeps, folders with runs, or record files.
        out: the file.
        score: the score that leads.
        advance: called after each run that was read.

    Raises:
        UserError: there is nothing to compare, or no such score.
    """
    from src.report.subjects import subjects_of

    words = [str(place) for place in places] + ([f"score={score}"] if score else []) + [f"out={out}"]
    return write_report(subjects_of(places, advance), out, score, words, advance)


def report_of_run(folder: Path, record: Record) -> Path:
    """Writes <run folder>/report.html for a training that ends with these scores."""
    run = read_run(folder)
    run.last, run.status = record, "finished"
    subject = Subject(folder.name, run, [Scored(record, folder / SCORES_FILE)])
    return write_report([subject], folder / REPORT_FILE, command=[str(folder)])
