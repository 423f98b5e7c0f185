"""What happens beside the training step: curves, previews, scores, bars."""

from .curves import TrainingCurves
from .progress import StepProgressBar
from .sample_images import SampleImages
from .track_fidelity import TrackFidelity

__all__ = ["SampleImages", "StepProgressBar", "TrackFidelity", "TrainingCurves"]
