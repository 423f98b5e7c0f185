"""What images are conditioned on: the value that travels with them, and the rule that a network is trained by."""

from .condition import NO_CLASS, Condition
from .conditioning import ByClass, Conditioning

__all__ = ["NO_CLASS", "ByClass", "Condition", "Conditioning"]
