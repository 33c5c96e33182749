"""What happens beside the training steps: averages, sample videos, how they move, compute, saving, waiting, reports."""

from ldm.callbacks.average import WeightAverage
from ldm.callbacks.checkpoint_io import AtomicCheckpointIO
from ldm.callbacks.compiling import CompileNetwork
from ldm.callbacks.compute import ComputeCount
from ldm.callbacks.guard import BadStepsError, SkipBadSteps
from ldm.callbacks.motion import MotionLogger
from ldm.callbacks.reports import MemoryReport, ProgressBar, ProgressLines
from ldm.callbacks.saving import LastCheckpoint, StopRequested
from ldm.callbacks.unreadable import UnreadableClips
from ldm.callbacks.videos import VideoLogger
from ldm.callbacks.waiting import DataWait

__all__ = [
    "AtomicCheckpointIO",
    "BadStepsError",
    "CompileNetwork",
    "ComputeCount",
    "DataWait",
    "LastCheckpoint",
    "MemoryReport",
    "MotionLogger",
    "ProgressBar",
    "ProgressLines",
    "SkipBadSteps",
    "StopRequested",
    "UnreadableClips",
    "VideoLogger",
    "WeightAverage",
]
