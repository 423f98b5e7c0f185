"""Training losses."""

from .base import Loss, TimedLoss
from .denoising import DenoisingLoss
from .hybrid import HybridLoss
from .variational import VariationalLoss

__all__ = ["DenoisingLoss", "HybridLoss", "Loss", "TimedLoss", "VariationalLoss"]
