"""Output that may fail: a closed terminal or pipe, a full disk. It is reported once and counted, and work continues."""

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from src.errors import UserError
from src.runs.machine import discard_output

log = logging.getLogger(__name__)

_failures: Counter[str] = Counter()


class ForgivingStream:
    """A text stream that is redirected to the null device when a write fails."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text; returns its length, also when it is lost."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """Flushes what has been written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        discard_output(self._stream)
        if not self._lost:
            self._lost = True
            log.warning("output is lost (%s); the work continues", error.strerror or error)


@contextmanager
def forgiving_output() -> Iterator[None]:
    """Within it, lost standard output or standard error is no error."""
    before = sys.stdout, sys.stderr
    # None if the file descriptor was closed (>&-)
    sys.stdout, sys.stderr = (ForgivingStream(stream or Path(os.devnull).open("w")) for stream in before)  # noqa: SIM115
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def tolerated(what: str) -> Iterator[None]:
    """Logs an exception of the block instead of raising it, the first time for each `what`, and counts all of them."""
    try:
        yield
    except Exception as error:
        _failures[what] += 1
        if _failures[what] == 1:
            expected = isinstance(error, OSError | UserError)
            text = getattr(error, "strerror", None) or str(error) or type(error).__name__
            log.error("%s failed: %s; training continues", what, text, exc_info=not expected)


@contextmanager
def silent() -> Iterator[None]:
    """Within it, nothing is logged up to errors."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def lost_log(record: logging.LogRecord) -> None:
    """A `handleError` of log handlers: reports the first failure on standard error, and counts all of them."""
    _failures["log"] += 1
    if _failures["log"] == 1:
        print(f"a log cannot be written ({sys.exc_info()[1]}); the work continues", file=sys.stderr)


def failures() -> dict[str, int]:
    """How often each output has failed since `forget_failures`."""
    return dict(_failures)


def forget_failures() -> None:
    """Starts counting anew, for the next training of this process."""
    _failures.clear()
