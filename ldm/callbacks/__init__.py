"""What happens beside the training steps: the average of the weights, sample videos, saving, and reports."""

from ldm.callbacks.average import WeightAverage
from ldm.callbacks.reports import MemoryReport, ProgressBar, ProgressLines
from ldm.callbacks.saving import AtomicCheckpointIO, LastCheckpoint, StopRequested
from ldm.callbacks.videos import VideoLogger

__all__ = [
    "AtomicCheckpointIO",
    "LastCheckpoint",
    "MemoryReport",
    "ProgressBar",
    "ProgressLines",
    "StopRequested",
    "VideoLogger",
    "WeightAverage",
]
