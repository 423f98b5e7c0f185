"""Noise schedules: time -> NoiseLevel. One class for each schedule."""

from .base import DiscreteSchedule, Schedule
from .continuous import EDM, VE, VP, ContinuousCosine, ContinuousSchedule, RectifiedFlow
from .discrete import (
    JSD,
    Constant,
    Cosine,
    Linear,
    Quadratic,
    ScaledLinear,
    Sigmoid,
    SigmoidBeta,
    ZeroTerminalSNR,
)

__all__ = [
    "EDM",
    "JSD",
    "VE",
    "VP",
    "Constant",
    "ContinuousCosine",
    "ContinuousSchedule",
    "Cosine",
    "DiscreteSchedule",
    "Linear",
    "Quadratic",
    "RectifiedFlow",
    "ScaledLinear",
    "Schedule",
    "Sigmoid",
    "SigmoidBeta",
    "ZeroTerminalSNR",
]
