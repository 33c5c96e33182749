"""Callbacks of training: averages, sample videos and their metrics, step guard, compute, saving, reports.

A callback that changes no weight says `changes_training = False`; a resumed run may then change it or leave it out.
"""

from ldm.callbacks.average import WeightAverage
from ldm.callbacks.bad_clips import UnreadableClips
from ldm.callbacks.bad_steps import BadStepsError, SkipBadSteps
from ldm.callbacks.compute import CompileNetwork, ComputeCount
from ldm.callbacks.motion import MotionLogger
from ldm.callbacks.reports import DataWait, MemoryReport, ProgressBar, ProgressLines
from ldm.callbacks.samples import VideoLogger
from ldm.callbacks.saving import AtomicCheckpointIO, LastCheckpoint, StopRequested

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
