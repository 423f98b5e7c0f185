"""Training losses."""

from .base import Loss, TimedLoss
from .classification import ClassificationLoss
from .denoising import DenoisingLoss
from .hybrid import HybridLoss
from .variational import VariationalLoss

__all__ = ["ClassificationLoss", "DenoisingLoss", "HybridLoss", "Loss", "TimedLoss", "VariationalLoss"]
