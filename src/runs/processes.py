"""This process among those of its job, as torch.distributed knows them."""

from typing import Any

import torch.distributed


def _started() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """The number of this process, from 0."""
    return torch.distributed.get_rank() if _started() else 0


def world_size() -> int:
    """How many processes work together."""
    return torch.distributed.get_world_size() if _started() else 1


def barrier() -> None:
    """Waits until all processes are here."""
    if world_size() > 1:
        torch.distributed.barrier()


def gathered(value: Any) -> list[Any]:
    """The values of all processes, by rank, on all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values
