"""Folders of Hydra runs, and the table that closes a sweep."""

import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

OUTCOME_FILE = "outcome.json"
_report: ContextVar[list[int] | None] = ContextVar("report", default=None)


def register() -> None:
    """Registers the resolvers that conf/ uses.

    `unique:` four hexadecimal digits, the same throughout a process: two runs of one second differ.
    `folder_name:` a text without the characters that folders, shells or overrides treat specially.
    """
    OmegaConf.register_new_resolver("unique", lambda: secrets.token_hex(2), use_cache=True, replace=True)
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def folder_name(text: str) -> str:
    """Letters, digits and "._+-" are kept, a comma becomes "_", all else "-"; at most 100 characters.

    No "=" and no comma: such a folder would have to be quoted in Hydra's overrides.
    """
    return re.sub(r"[^\w.+-]+", "-", text.replace(",", "_"))[:100]


@contextmanager
def reporting_to(failed: list[int]) -> Iterator[None]:
    """Within it, `SweepTable` appends the number of failed jobs to the list."""
    token = _report.set(failed)
    try:
        yield
    finally:
        _report.reset(token)


class SweepTable(Callback):
    """Prints the outcome of each job of a sweep, and keeps it as sweep.json in the sweep's folder."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob(f"*/{OUTCOME_FILE}")}
        outcomes = {job: found[job] for job in sorted(found, key=lambda name: int(name.split("_")[0]))}
        report = _report.get()
        if report is not None:
            report.append(sum("error" in outcome for outcome in outcomes.values()))
        (folder / "sweep.json").write_text(json.dumps(outcomes, indent=2))
        self._print(folder, outcomes)

    def _print(self, folder: Path, outcomes: dict[str, dict[str, Any]]) -> None:
        from rich.console import Console
        from rich.table import Table

        names = sorted({name for outcome in outcomes.values() for name in outcome.get("scores") or {}})
        table = Table("job", "overrides", *names, title=f"{folder} ({len(outcomes)} jobs)")
        for job, outcome in outcomes.items():
            scores = outcome.get("scores") or {}
            cells = [f"{scores[name]:.4g}" if name in scores else "" for name in names]
            if "error" in outcome:
                cells = [f"[red]failed: {outcome['error']}", *cells[1:]]
            table.add_row(job.split("_")[0], " ".join(outcome["overrides"]), *cells)
        Console(width=None if Console().is_terminal else 160).print(table)
