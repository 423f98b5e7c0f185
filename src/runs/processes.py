"""Rank, world size and collectives of torch.distributed; they also work in a single process."""

from typing import Any

import torch.distributed


def _started() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """The rank of this process."""
    return torch.distributed.get_rank() if _started() else 0


def world_size() -> int:
    """The number of processes."""
    return torch.distributed.get_world_size() if _started() else 1


def barrier() -> None:
    """Waits until all processes reach this call."""
    if world_size() > 1:
        torch.distributed.barrier()


def gathered(value: Any) -> list[Any]:
    """The values of all processes in order of rank, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values
