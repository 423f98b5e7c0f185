"""Conditions of images, and how networks are conditioned in training and sampling."""

from .augmentation import GeometricAugmentation
from .condition import NO_CLASS, Condition
from .conditioning import ByClass, Conditioning
from .low_resolution import LowResolution
from .text import ByText, TextEncoder, TextTable

__all__ = [
    "NO_CLASS",
    "ByClass",
    "ByText",
    "Condition",
    "Conditioning",
    "GeometricAugmentation",
    "LowResolution",
    "TextEncoder",
    "TextTable",
]
