"""Clips of the procedural world as sources of prepared clips, drawn on demand, in parallel processes.

A drawing process reads pickled requests from stdin and writes pickled clips to stdout; it ends with its stdin, also
when its parent is killed. Each is at most one clip ahead: pipes are short.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ldm.data.preparing.parts import EncodingSettings
from ldm.data.preparing.preparation import FINISH_OR_FRESH, Preparation
from ldm.data.preparing.sources import MAX_SCENE_FRAMES, Footage, PreparePlan
from ldm.data.shards import DatasetError
from ldm.data.world import RATES, SIZES, WorldClip, draw_clip
from ldm.errors import UserError

PACKAGES = Path(__file__).parents[3]


def draw_clips(requests: Sequence[tuple[Any, ...]], processes: int) -> Iterator[WorldClip]:
    """The clips of `requests` (arguments of `draw_clip`), in order."""
    processes = min(processes, len(requests))
    with ExitStack() as at_end:
        workers = [_start(at_end) for _ in range(processes)]
        for worker in workers:
            _ask(worker, requests, workers.index(worker))
        for number in range(len(requests)):
            worker = workers[number % processes]
            clip = pickle.load(worker.stdout)
            _ask(worker, requests, number + processes)
            yield clip


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until either pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends this one
    while True:
        try:
            request = pickle.load(requests)
            pickle.dump(draw_clip(*request), answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
        except (EOFError, BrokenPipeError):
            os._exit(0)  # without flushing to a closed pipe


def _start(at_end: ExitStack) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, (str(PACKAGES), os.environ.get("PYTHONPATH"))))
    worker = subprocess.Popen(
        [sys.executable, "-m", "ldm.data.world.sources"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    at_end.callback(worker.wait)
    at_end.callback(worker.kill)
    at_end.callback(worker.stdout.close)
    at_end.callback(worker.stdin.close)
    return worker


def _ask(worker: subprocess.Popen, requests: Sequence[tuple[Any, ...]], number: int) -> None:
    if number < len(requests):
        pickle.dump(requests[number], worker.stdin)
        worker.stdin.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)


SEEDS_EACH = 1_000_000  # clips per seed of a data set


@dataclass(frozen=True)
class DrawnSource:
    """One clip of the procedural world; `clip` is None until it is drawn."""

    look: str
    seed: int
    num_frames: int
    sha256: str
    clip: WorldClip | None = None

    @property
    def name(self) -> str:
        return f"drawn/{self.look}/{self.seed:09d}"

    def open(self, settings: EncodingSettings) -> Footage:
        """The clip, drawn now if necessary, as one scene, which may be a single frame."""
        clip = self.clip or draw_clip(self.look, self.seed, self.num_frames, settings.size, settings.fps)
        notes = {"look": self.look, "seed": self.seed, "speed": _plain(clip.speed), "yaw": _plain(clip.yaw)}
        return Footage(iter(clip.frames), [range(self.num_frames)], list(clip.captions), shortest=1, notes=notes)


def plan_world(
    num_clips: int,
    looks: Sequence[str],
    num_frames: int,
    seed: int,
    preparation: Preparation,
    share: tuple[int, int] = (1, 1),
) -> PreparePlan:
    """Plan clips 0 to `num_clips` - 1 of a seed, the styles in turn; a later run with a larger number adds clips.

    share: (i, n): the i-th of n shares, i from 1. Raises DatasetError if the folder holds one of them with other frames
    or another style, and UserError for settings out of range.
    """
    settings = preparation.settings
    check_world(num_clips, num_frames, seed, settings)
    marks = {look: _mark(look) for look in looks[:num_clips]}
    by_name = {report.source: report for report in preparation.reports.values()}
    plan = PreparePlan()
    for number in range(share[0] - 1, num_clips, share[1]):
        look = looks[number % len(looks)]
        about = {
            "look": look,
            "seed": seed * SEEDS_EACH + number,
            "num_frames": num_frames,
            "size": settings.size,
            "fps": settings.fps,
            "mark": marks[look],
        }
        sha256 = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        source = DrawnSource(look, about["seed"], num_frames, sha256)
        report = by_name.get(source.name)
        if report is not None and report.sha256 != sha256:
            raise DatasetError(
                f"{preparation.out}: {source.name} was drawn with another --frames or by another version of this "
                f"project: {FINISH_OR_FRESH}"
            )
        plan.add(source, report)
    return plan


def check_world(num_clips: int, num_frames: int, seed: int, settings: EncodingSettings) -> None:
    """Raise UserError for values out of range."""
    for name, value, least, most in (
        ("--world", num_clips, 1, SEEDS_EACH),
        ("--frames", num_frames, 1, MAX_SCENE_FRAMES),
        ("--seed", seed, 0, 2**32),
        ("--size", max(settings.size), *SIZES),
        ("--fps", settings.fps, *RATES),
    ):
        if not least <= value <= most:
            raise UserError(f"{name}: the procedural world takes {least:,} to {most:,}, found {value:,}")


def draw_ahead(sources: Sequence[DrawnSource], settings: EncodingSettings, processes: int) -> Iterator[DrawnSource]:
    """The sources in order; with several processes, drawn there ahead of time."""
    if processes == 1 or len(sources) < 2:
        yield from sources
        return
    how = (tuple(settings.size), settings.fps)
    requests = [(source.look, source.seed, source.num_frames, *how) for source in sources]
    for source, clip in zip(sources, draw_clips(requests, processes), strict=True):
        yield replace(source, clip=clip)


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _mark(look: str) -> str:
    """A hash of one drawn frame: changes with the style and the drawing code."""
    return hashlib.sha256(draw_clip(look, 0, 1, SIZES[0], 10.0).frames.tobytes()).hexdigest()[:16]


def _plain(values: np.ndarray) -> list[float]:
    return [round(float(value), 5) for value in values]
