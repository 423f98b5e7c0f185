"""Environment variables in a configuration: their values reach objects, never what is written down."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


class Environment:
    """The resolver `${oc.env:NAME}`, through which a secret may enter a configuration.

    What is written down (config.yaml, checkpoints, dashboards, folder names) keeps the text as it stands; only the
    constructors of the objects get the variable's value. The project's own DIFFUSION_LAB_* are not secret.
    """

    OWN = "DIFFUSION_LAB_"

    def __init__(self) -> None:
        self._revealing = False
        self._used: dict[str, str] = {}

    def __call__(self, name: str, *default: Any) -> Any:
        if not self._revealing and not name.startswith(self.OWN):
            return self._text(name, *default)
        value = os.environ.get(name)
        if value is None:
            if not default:
                raise KeyError(f"environment variable {name} is not set")
            return default[0]
        if value and not name.startswith(self.OWN):
            self._used[value] = name
            folder = Path(os.path.expanduser(value))  # Path drops a trailing slash
            if folder != Path():
                self._used[str(folder)] = name
        return value

    @contextmanager
    def revealed(self) -> Iterator[None]:
        """Within it, variables are replaced by their values."""
        self._revealing = True
        try:
            yield
        finally:
            self._revealing = False

    def redacted(self, text: str) -> str:
        """The text with the names of variables in place of the values that were looked up."""
        for value, name in sorted(
            self._used.items(), key=lambda item: -len(item[0])
        ):  # one may begin another
            text = text.replace(value, self._text(name))
        return text

    @staticmethod
    def _text(name: str, *default: Any) -> str:
        quoted = ",".join(f"'{value}'" for value in default)
        return f"${{oc.env:{name}{',' if quoted else ''}{quoted}}}"


environment = Environment()
redacted = environment.redacted


def redact(record: logging.LogRecord) -> bool:
    """A filter of log handlers: no line shows the value of a variable; train.log is part of the run folder."""
    record.msg, record.args = redacted(record.getMessage()), None
    return True


def register() -> None:
    """Makes OmegaConf resolve `${oc.env:...}` this way."""
    OmegaConf.register_new_resolver("oc.env", environment, replace=True)
