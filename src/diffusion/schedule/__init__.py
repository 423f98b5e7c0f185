"""Noise schedules: time -> NoiseLevel. One class a schedule."""

from .base import DiscreteSchedule, Schedule
from .discrete import Cosine, Linear, Quadratic, ScaledLinear, Sigmoid

__all__ = ["Cosine", "DiscreteSchedule", "Linear", "Quadratic", "ScaledLinear", "Schedule", "Sigmoid"]
