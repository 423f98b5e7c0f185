"""A process of `launcher=local` that runs jobs of sampling or evaluation one after the other.

So the model, the data and the references of scores are loaded once for all of them (`src.app.shared`). The jobs come
from standard input. A job that another process has taken is skipped; what a job prints goes to its console.log.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.app.shared import sharing
from src.app.sweep.jobs import CONSOLE_FILE, Job
from src.app.sweep.launcher import POLL, run_here
from src.runs.output import forgiving_output
from src.runs.stopping import ExitOnSignal


def main(mark: str) -> None:
    """Runs the jobs of standard input.

    Args:
        mark: see `Job.begin`; a job that has it has been begun by a process that was killed.
    """
    jobs = [
        Job(row["entry_point"], Path(row["folder"]), tuple(row["overrides"]), tuple(row["varied"]))
        for row in json.load(sys.stdin)
    ]
    with ExitOnSignal().installed(), forgiving_output(), sharing():
        while jobs := [job for job in jobs if job.mark != mark and job.outcome() is None]:
            for job in jobs:
                if job.mark == mark or (lease := job.begin(mark)) is None:
                    continue
                with lease, _console(job.folder / CONSOLE_FILE):
                    if job.outcome() is None:
                        run_here(job)
            time.sleep(POLL)  # for jobs of another launcher, which run on after its end


@contextmanager
def _console(file: Path) -> Iterator[None]:
    """Within it, standard output and standard error are added to a file."""
    before = [os.dup(number) for number in (1, 2)]
    with file.open("ab") as console:
        for number in (1, 2):
            os.dup2(console.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), before, strict=True):
            os.dup2(copy, number)
            os.close(copy)


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"
    main(sys.argv[1])
