"""What happens beside the training steps: averaged weights, sample videos, how they move, compute, saving, reports."""

from ldm.callbacks.average import WeightAverage
from ldm.callbacks.compute import ComputeCount
from ldm.callbacks.motion import MotionLogger
from ldm.callbacks.reports import MemoryReport, ProgressBar, ProgressLines
from ldm.callbacks.saving import AtomicCheckpointIO, LastCheckpoint, StopRequested
from ldm.callbacks.videos import VideoLogger

__all__ = [
    "AtomicCheckpointIO",
    "ComputeCount",
    "LastCheckpoint",
    "MemoryReport",
    "MotionLogger",
    "ProgressBar",
    "ProgressLines",
    "StopRequested",
    "VideoLogger",
    "WeightAverage",
]
