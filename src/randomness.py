"""Keyed random draws: every draw is a function of (seed, purpose, index), independent of earlier draws.

So checkpoints need no random state, a resumed run makes the same draws as an uninterrupted one, and callbacks cannot
change the draws of the training.
"""

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor


def key(seed: int, purpose: str, index: int) -> int:
    """A 63-bit seed that differs for every (seed, purpose, index)."""
    digest = blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator at the start of the stream (seed, purpose, index).

    Args:
        seed: the run's seed.
        purpose: what is drawn, e.g. "noise", "time", "flip", "permutation"; streams of two purposes are independent.
        index: index of the draw, e.g. the optimiser step or the index of a generated image.
        device: device of the generator; CPU and CUDA give different numbers for the same key.
    """
    return torch.Generator(device).manual_seed(key(seed, purpose, index))


def seed_defaults(seed: int, device: torch.device) -> None:
    """Seeds the default generators of the CPU and of this device, from which e.g. dropout draws.

    `torch.manual_seed` also seeds backends that have not been started. Each such call formats a stack trace and keeps
    it until the backend starts: a millisecond and some kilobytes at each step of a training on the CPU.
    """
    torch.default_generator.manual_seed(seed)
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).manual_seed(seed)


def draws_at(positions: Tensor, size: int, draw: Callable[[int], Tensor]) -> Tensor:
    """The draws of the samples at these positions of the training stream, from draws made per global batch.

    Sample p gets entry p mod size of draw number p div size, so that the draws do not depend on how a batch is split
    over devices and micro-batches.

    Args:
        positions: consecutive increasing positions in the stream, int64, shape (b,), on the CPU.
        size: the global batch size.
        draw: maps the number of a draw to its entries, shape (size, ...).

    Returns:
        Shape (b, ...).
    """
    first, last = int(positions[0]), int(positions[-1])
    if first % size == 0 and last - first + 1 == size:  # a whole batch
        return draw(first // size)
    parts = []
    for number in range(first // size, last // size + 1):
        start = number * size
        parts.append(draw(number)[max(first - start, 0) : last - start + 1])
    return parts[0] if len(parts) == 1 else torch.cat(parts)
