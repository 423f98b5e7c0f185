"""Callbacks: training curves, previews, scores and the progress bar."""

from .curves import TrainingCurves
from .progress import StepProgressBar
from .sample_images import SampleImages
from .track_fidelity import TrackFidelity

__all__ = ["SampleImages", "StepProgressBar", "TrackFidelity", "TrainingCurves"]
