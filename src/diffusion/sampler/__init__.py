"""Samplers: from noise to images along falling times. `base.py` holds the only loop; one file a family."""

from .base import Sampler, State
from .ddim import DDIM
from .ddpm import DDPM
from .noise import NoiseSource, PerImageNoise, global_noise

__all__ = ["DDIM", "DDPM", "NoiseSource", "PerImageNoise", "Sampler", "State", "global_noise"]
