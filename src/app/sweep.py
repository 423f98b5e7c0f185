"""Folders and the closing table of Hydra runs."""

import json
import re
import secrets
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from src.app.cli import OUTCOME_FILE


def register_resolvers() -> None:
    """Resolvers that conf/hydra uses.

    `unique:` four hexadecimal digits, the same throughout a process: two runs of one second differ.
    `folder_name:` a text with what folders, shells or overrides could take amiss replaced.
    """
    OmegaConf.register_new_resolver("unique", lambda: secrets.token_hex(2), use_cache=True, replace=True)
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def folder_name(text: str) -> str:
    """Letters, digits and "._+-" are kept, a comma becomes "_", all else "-"; at most 100 characters.

    No "=" and no comma: such a folder would have to be quoted in Hydra's overrides.
    """
    return re.sub(r"[^\w.+-]+", "-", text.replace(",", "_"))[:100]


class SweepTable(Callback):
    """Prints what became of each job of a sweep, and keeps it as sweep.json in the sweep's folder."""

    failed: ClassVar[int] = 0

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        outcomes = {}
        for path in folder.glob(f"*/{OUTCOME_FILE}"):
            outcomes[path.parent.name] = json.loads(path.read_text())
        jobs = sorted(outcomes, key=lambda name: int(name.split("_")[0]))
        SweepTable.failed = sum("error" in outcomes[job] for job in jobs)
        (folder / "sweep.json").write_text(json.dumps({job: outcomes[job] for job in jobs}, indent=2))
        self._print(folder, {job: outcomes[job] for job in jobs})

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
