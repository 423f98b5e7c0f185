"""Weights & Biases without surprises: never a prompt, never a crash for want of a key."""

import logging
import os
import secrets
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id"


def wandb_settings(folder: Path, name: str | None) -> dict[str, Any]:
    """What the WandbLogger of a run folder is given.

    The run's id is kept in the folder, so that a resumed run continues its curves. Offline unless a key is
    configured or WANDB_MODE says otherwise.

    Args:
        folder: the run's folder; a sweep's jobs are grouped by the folder above it.
        name: shown in the dashboard; by default the folder's name.
    """
    import wandb

    id_file = folder / RUN_ID_FILE
    if id_file.is_file():
        run_id = id_file.read_text().strip()
    else:
        run_id = secrets.token_hex(4)
        folder.mkdir(parents=True, exist_ok=True)
        id_file.write_text(run_id)
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    if mode == "offline":
        log.info("wandb       offline (no key); later: wandb sync %s/wandb/offline-run-*", folder)
    in_sweep = folder.parent.parent.name == "sweeps"
    return {
        "id": run_id,
        "name": name or folder.name,
        "group": folder.parent.name if in_sweep else None,
        "mode": mode,
        "resume": "allow" if mode == "online" else None,
        "settings": wandb.Settings(silent=True, console="off"),
    }


def _has_key() -> bool:
    """Whether the environment or ~/.netrc holds a key (`wandb.login(prompt=False)` waits for the server)."""
    import wandb
    from requests.utils import get_netrc_auth

    return bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(wandb.Settings().base_url))
