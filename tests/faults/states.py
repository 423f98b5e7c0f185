"""The state that must be equal after a fault, compared with zero tolerance."""

from pathlib import Path
from typing import Any

import torch


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists, by path."""
    if isinstance(value, dict):
        return {k: v for name, child in value.items() for k, v in flat(child, f"{path}/{name}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, child in enumerate(value) for k, v in flat(child, f"{path}/{i}").items()}
    return {path: value}


def training_state(run: Path, step: int) -> dict[str, Any]:
    """Weights, averages, optimiser, learning rate and position in the data of a checkpoint."""
    content = torch.load(run / "checkpoints" / f"step_{step:08d}.ckpt", weights_only=True)
    averages = next(state for name, state in content["callbacks"].items() if name.startswith("EMA"))
    names = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    return flat(
        {**{name: content[name] for name in names}, "ema": averages, "data": content["ImageDataModule"]}
    )


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Paths of the leaves that differ between two states."""
    alike = [k for k in a if k in b and (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])]
    return sorted((a.keys() | b.keys()) - set(alike))
