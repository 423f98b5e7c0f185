"""Conditions of images, and how networks are conditioned in training and sampling."""

from .condition import NO_CLASS, Condition
from .conditioning import ByClass, Conditioning
from .low_resolution import LowResolution

__all__ = ["NO_CLASS", "ByClass", "Condition", "Conditioning", "LowResolution"]
