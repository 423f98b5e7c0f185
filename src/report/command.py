"""The command lines `python -m src.runs` and `python -m src.report`."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from src.errors import UserError

HELP = {
    "runs": """List runs with their status, step, score and cost.
    python -m src.runs                                   all runs below runs/, the oldest first
    python -m src.runs --best                            the best first, by the score that each training follows
    python -m src.runs best=fd_digits schedule=cosine    the best first, of the runs with this choice
    python -m src.runs status=stopped,failed seed=0,1    one of several values
    python -m src.runs other/runs n=20                   below another folder, at most 20

Single options, with their defaults:
    best=null          a score; sorts by it, the best first
    status=null        finished, running, stopped or failed; several with commas
    n=null             lists at most so many
    <option>=<value>   any group or option of src.train: schedule=cosine, optimizer.lr=2e-4; several with commas""",
    "report": """Compare runs in one HTML page, which needs no network.
    python -m src.report runs/sweeps/2026-11-29_17-16-00_ccc7            a sweep
    python -m src.report runs/first runs/second other/scores.json        runs, sweeps, records of scores
    python -m src.report runs/first score=kid out=kid.html

Single options, with their defaults:
    out=report.html    the page
    score=null         the score that leads; null: the first score of generated images""",
}
NAMED = {"runs": ("best", "status", "n"), "report": ("out", "score")}


def main(entry_point: str, arguments: Sequence[str]) -> int:
    """Runs "runs" or "report".

    Raises:
        UserError: a mistake in the arguments, or there is nothing to show.
    """
    places, options = split(arguments)
    if entry_point == "runs":
        from src.report.listing import list_runs

        list_runs([Path(place) for place in places or ["runs"]], options)
        return 0
    for name in options:
        if name not in NAMED["report"]:
            nearest = difflib.get_close_matches(name, NAMED["report"], 1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise UserError(f"{name}: no such option{hint}; python -m src.report --help lists them")
    if not places:
        raise UserError("name runs, sweeps or records, e.g. python -m src.report runs/sweeps/<sweep>")
    _report([Path(place).expanduser() for place in places], options)
    return 0


def split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The places and the options among the arguments; a place may contain "=".

    Raises:
        UserError: a flag that does not exist, or an option that is given twice.
    """
    places: list[str] = []
    options: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument == "--best":
            name, equals, value = "best", "=", ""
        elif argument.startswith("-"):
            raise UserError(f"{argument}: no such flag; --help lists the options")
        if not equals or (Path(argument).exists() and "/" in name):
            places.append(argument)
        elif name in options:
            raise UserError(f"{argument}: {name} is given twice; give several values with commas")
        else:
            options[name] = value
    return places, options


def _report(places: list[Path], options: dict[str, str]) -> None:
    from src.report.page import report_of
    from src.report.progress import count_runs, progress

    out = Path(options.get("out", "report.html")).expanduser()
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"out={out}: give an HTML file, e.g. out=report.html")
    if out.is_dir():
        raise UserError(f"out={out} is a folder; give a file, e.g. out={out}/report.html")
    with progress("reading", lambda: 2 * count_runs(places)) as advance:
        page = report_of(places, out, options.get("score"), advance)
    print(f"report      {page} ({page.stat().st_size / 1e6:.1f} MB)")
