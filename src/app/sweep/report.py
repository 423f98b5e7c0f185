"""The report of a sweep, which it writes by itself."""

import logging

from src.app.environment import redacted
from src.app.sweep.jobs import Sweep
from src.errors import UserError
from src.report.page import REPORT_FILE, report_of

log = logging.getLogger(__name__)


def report_sweep(sweep: Sweep) -> None:
    """Writes <sweep>/report.html, prints where it is, and uploads it if the jobs were logged online.

    A failure is reported in one line: the sweep is complete without its report.
    """
    if sweep.entry_point == "sample":
        return
    page = sweep.folder / REPORT_FILE
    try:
        sweep.write()  # a search has made its jobs in the meantime
        report_of([sweep.folder], page)
        print(f"report      {page}")
        from src.training.dashboard import publish_sweep

        publish_sweep(page, sweep.folder)
    except UserError as error:  # e.g. no job has begun
        log.warning("no report: %s", redacted(str(error)))
    except Exception as error:
        log.warning("no report: %s", redacted(f"{type(error).__name__}: {error}"))
