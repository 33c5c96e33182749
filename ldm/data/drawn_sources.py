"""Clips of the drawn world as sources of prepared clips, drawn when they are needed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ldm.config import nearest
from ldm.data.drawing_process import draw_clips
from ldm.data.drive_world import LOOKS, RATES, SIZES, WorldClip, draw_clip
from ldm.data.parts import Settings
from ldm.data.preparation import FINISH_OR_FRESH, Preparation
from ldm.data.shards import DatasetError
from ldm.data.sources import MAX_SCENE_FRAMES, Footage, Plan
from ldm.errors import UserError

SEEDS_EACH = 1_000_000  # clips that one seed of a data set has


@dataclass(frozen=True)
class DrawnSource:
    """One clip of the drawn world; `clip` is None until it is drawn."""

    look: str
    seed: int
    num_frames: int
    sha256: str
    clip: WorldClip | None = None

    @property
    def name(self) -> str:
        return f"drawn/{self.look}/{self.seed:09d}"

    def open(self, settings: Settings) -> Footage:
        """The clip, drawn now if it is not yet; its one scene may be a single frame."""
        clip = self.clip or draw_clip(self.look, self.seed, self.num_frames, settings.size, settings.fps)
        notes = {"look": self.look, "seed": self.seed, "speed": _plain(clip.speed), "yaw": _plain(clip.yaw)}
        return Footage(iter(clip.frames), [range(self.num_frames)], list(clip.captions), shortest=1, notes=notes)


def read_looks(text: str | None) -> list[str]:
    """The looks that `--looks` names, comma-separated; None: all."""
    looks = list(LOOKS) if text is None else list(dict.fromkeys(" ".join(word.split()) for word in text.split(",")))
    for look in looks:
        if look not in LOOKS:
            raise UserError(f"--looks: expected looks of the drawn world, found {look!r}; {nearest(look, LOOKS)}")
    return looks


def plan_world(
    num_clips: int,
    looks: Sequence[str],
    num_frames: int,
    seed: int,
    preparation: Preparation,
    share: tuple[int, int] = (1, 1),
) -> Plan:
    """Clips number 0 to `num_clips` - 1 of a seed, the looks in turn, so that more can be added later.

    share: (i, n) for the i-th n-th of them, i from 1.

    Raises DatasetError when the folder has one of them drawn in another way, and UserError for settings that the world
    does not have.
    """
    settings = preparation.settings
    check_world(num_clips, num_frames, seed, settings)
    marks = {look: _mark(look) for look in looks[:num_clips]}
    by_name = {report.source: report for report in preparation.reports.values()}
    plan = Plan()
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


def check_world(num_clips: int, num_frames: int, seed: int, settings: Settings) -> None:
    """Raise UserError for what cannot be drawn."""
    for name, value, least, most in (
        ("--world", num_clips, 1, SEEDS_EACH),
        ("--frames", num_frames, 1, MAX_SCENE_FRAMES),
        ("--seed", seed, 0, 2**32),
        ("--size", max(settings.size), *SIZES),
        ("--fps", settings.fps, *RATES),
    ):
        if not least <= value <= most:
            raise UserError(f"{name}: the drawn world takes {least:,} to {most:,}, found {value:,}")


def draw_ahead(sources: Sequence[DrawnSource], settings: Settings, processes: int) -> Iterator[DrawnSource]:
    """The sources in their order; with more than one process, drawn there, some ahead of the one that is asked for."""
    if processes == 1 or len(sources) < 2:
        yield from sources
        return
    how = (tuple(settings.size), settings.fps)
    requests = [(source.look, source.seed, source.num_frames, *how) for source in sources]
    for source, clip in zip(sources, draw_clips(requests, processes), strict=True):
        yield replace(source, clip=clip)


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _mark(look: str) -> str:
    """A hash that changes when the look is drawn in another way."""
    return hashlib.sha256(draw_clip(look, 0, 1, SIZES[0], 10.0).frames.tobytes()).hexdigest()[:16]


def _plain(values: np.ndarray) -> list[float]:
    return [round(float(value), 5) for value in values]
