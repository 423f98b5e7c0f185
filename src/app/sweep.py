"""Folders of Hydra runs, and the table that closes a sweep."""

import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from typing_extensions import TypedDict

from src.runs.files import Damaged, digest_of, read_json, write_atomically

OUTCOME_FILE = "outcome.json"
LONGEST_NAME = 200  # bytes; file systems allow 255
_sweep: ContextVar["Sweep | None"] = ContextVar("sweep", default=None)


class Outcome(TypedDict):
    """What a job leaves in its folder."""

    overrides: list[str]
    scores: NotRequired[dict[str, float]]
    error: NotRequired[str]


@dataclass
class Sweep:
    """A running sweep.

    Attributes:
        folder: of the sweep, once it has started.
        failed: number of failed jobs, once it has ended.
    """

    folder: Path | None = None
    failed: int = 0


def register() -> None:
    """Registers the resolvers that conf/ uses.

    `unique:` four hexadecimal digits, the same throughout a process: two runs of one second differ.
    `folder_name:` a text without the characters that folders, shells or overrides treat specially.
    """
    OmegaConf.register_new_resolver("unique", lambda: secrets.token_hex(2), use_cache=True, replace=True)
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def folder_name(text: str) -> str:
    """Letters, digits and "._+-" are kept, a comma becomes "_", all else "-"; at most 200 bytes.

    No "=" and no comma: such a folder would have to be quoted in Hydra's overrides.
    """
    name = re.sub(r"[^\w.+-]+", "-", text.replace(",", "_"))
    if len(name.encode()) <= LONGEST_NAME:
        return name
    # the end differs between jobs, too
    return f"{name.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}_{digest_of(text)}"


@contextmanager
def reported() -> Iterator[Sweep]:
    """Within it, a sweep runs. At the end, also when it is stopped, its table is printed and kept as sweep.json."""
    sweep = Sweep()
    token = _sweep.set(sweep)
    try:
        yield sweep
    finally:
        _sweep.reset(token)
        if sweep.folder is not None and sweep.folder.is_dir():
            _report(sweep)


class SweepStart(Callback):
    """Notes the folder of a sweep."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        sweep = _sweep.get()
        if sweep is not None:
            sweep.folder = Path(config.hydra.sweep.dir)


def _report(sweep: Sweep) -> None:
    folders = [path for path in sweep.folder.iterdir() if re.match(r"\d+_", path.name)]
    outcomes: dict[str, Outcome] = {}
    for folder in sorted(folders, key=lambda path: int(path.name.split("_")[0])):
        try:
            outcomes[folder.name] = read_json(folder / OUTCOME_FILE, Outcome)
        except (FileNotFoundError, Damaged):
            outcomes[folder.name] = {"overrides": [], "error": f"stopped; continue it with ckpt={folder}"}
    sweep.failed = sum("error" in outcome for outcome in outcomes.values())
    write_atomically(sweep.folder / "sweep.json", (json.dumps(outcomes, indent=2) + "\n").encode())
    _print(sweep.folder, outcomes)


def _print(folder: Path, outcomes: dict[str, Outcome]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    names = sorted({name for outcome in outcomes.values() for name in outcome.get("scores") or {}})
    table = Table("job", "overrides", *names, title=f"{escape(str(folder))} ({len(outcomes)} jobs)")
    for job, outcome in outcomes.items():
        scores = outcome.get("scores") or {}
        cells = [f"{scores[name]:.4g}" if name in scores else "" for name in names]
        overrides = escape(" ".join(outcome["overrides"]))
        if "error" in outcome:
            failed = f"[red]failed: {escape(outcome['error'])}"
            overrides, cells = (overrides, [failed, *cells[1:]]) if names else (f"{overrides} {failed}", [])
        table.add_row(job.split("_")[0], overrides, *cells)
    Console(width=None if Console().is_terminal else 160).print(table)
