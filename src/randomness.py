"""Keyed random draws: every draw is a function of (seed, purpose, index), never of what was drawn before.

So no random state has to be stored in a checkpoint, a resumed run draws what the uninterrupted one would
have drawn, and callbacks cannot disturb the training's stream.
"""

from hashlib import blake2b

import torch


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
