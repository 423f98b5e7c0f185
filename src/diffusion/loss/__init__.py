"""Training losses."""

from .base import Loss, TimedLoss
from .classification import ClassificationLoss
from .contrastive import ContrastiveLoss
from .denoising import DenoisingLoss
from .distillation import ConsistencyLoss, Distilling, ProgressiveLoss
from .few_step import AverageVelocityLoss, ContinuousConsistencyLoss, MeanFlowLoss, ShortcutLoss
from .hybrid import HybridLoss
from .reconstruction import ReconstructionLoss
from .variational import VariationalLoss

__all__ = [
    "AverageVelocityLoss",
    "ClassificationLoss",
    "ConsistencyLoss",
    "ContinuousConsistencyLoss",
    "ContrastiveLoss",
    "DenoisingLoss",
    "Distilling",
    "HybridLoss",
    "Loss",
    "MeanFlowLoss",
    "ProgressiveLoss",
    "ReconstructionLoss",
    "ShortcutLoss",
    "TimedLoss",
    "VariationalLoss",
]
