"""Keyed random draws: every draw is a function of (seed, purpose, index), never of what was drawn before.

So no random state has to be stored in a checkpoint, a resumed run draws what the uninterrupted one would
have drawn, and callbacks cannot disturb the training's stream.
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
        index: which draw, e.g. the optimiser's step or the number of a generated image.
        device: where the draws are made; CPU and CUDA give different numbers for one key.
    """
    return torch.Generator(device).manual_seed(key(seed, purpose, index))


def draws_at(positions: Tensor, size: int, draw: Callable[[int], Tensor]) -> Tensor:
    """What the samples at these places of the training stream get of draws that are made for whole batches.

    Sample p gets entry p mod size of draw number p div size, so that any split of a batch over devices
    and micro-batches sees the same draws.

    Args:
        positions: rising consecutive places in the stream, int64, shape (b,), on the CPU.
        size: the global batch size.
        draw: the number of a draw -> its entries, shape (size, ...).

    Returns:
        Shape (b, ...).
    """
    first, last = int(positions[0]), int(positions[-1])
    parts = []
    for number in range(first // size, last // size + 1):
        start = number * size
        parts.append(draw(number)[max(first - start, 0) : last - start + 1])
    return parts[0] if len(parts) == 1 else torch.cat(parts)
