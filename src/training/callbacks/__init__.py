"""Callbacks: training curves, previews, scores, reference bands and the progress bar."""

from .curves import TrainingCurves
from .progress import StepProgressBar
from .reference_bands import ReferenceBands
from .sample_images import SampleImages
from .track_fidelity import TrackFidelity

__all__ = ["ReferenceBands", "SampleImages", "StepProgressBar", "TrackFidelity", "TrainingCurves"]
