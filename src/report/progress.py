"""Progress of reading many runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from src.report.run import find_runs


def count_runs(places: Sequence[Path]) -> int:
    """The number of runs at these places."""
    return sum(1 for place in places if place.is_dir() for _ in find_runs(place))


@contextmanager
def progress(description: str, total: Callable[[], int]) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal's standard error, which disappears; the block gets a function that advances it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total() if console.is_terminal else None)
        yield lambda: bar.advance(task)
