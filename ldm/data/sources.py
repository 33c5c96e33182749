"""What can be prepared, and how: each source gives stretches of frames, which are encoded and stored as scenes.

Knows nothing of where captions come from (`captions`), nor of the folder that is written (`preparation`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ldm.data.captions import THREE_WAYS
from ldm.data.encoding import Encoders
from ldm.data.footage import FootageError, find_scenes, probe, read_frames
from ldm.data.parts import PartFolder, Settings, VideoReport, hash_file
from ldm.data.preparation import Preparation

CHUNK_PIXELS = 2 * 512 * 512  # encoded at a time
MAX_SCENE_FRAMES = 600  # longer scenes are stored in pieces, so that memory stays bounded


class Source(Protocol):
    """Something to prepare: its name in the data set, and a hash of what it shows."""

    name: str
    sha256: str
    num_frames: int  # at the prepared rate, as far as known beforehand

    def open(self, settings: Settings) -> Footage:
        """Begin to read it. Raises FootageError at once or, for damage further on, from the frames."""


@dataclass(frozen=True)
class Footage:
    """A source, opened: its frames uint8 `h w 3`, and its scenes, unbroken stretches that together are all of them.

    shortest: scenes of fewer frames are dropped. notes: kept with each scene.
    """

    frames: Iterator[np.ndarray]
    scenes: Iterable[range]
    captions: list[str]
    shortest: int = 2
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class VideoSource:
    """A readable video with captions."""

    name: str
    sha256: str
    num_frames: int
    path: Path
    captions: list[str]

    def open(self, settings: Settings) -> Footage:
        frames = read_frames(self.path, settings.fps, tuple(settings.size))
        return Footage(frames, find_scenes(self.path, settings.fps).scenes, self.captions)


@dataclass
class Plan:
    """What is to be done, what cannot be used and why (by name), and what was done before."""

    sources: list[Source] = field(default_factory=list)
    unusable: dict[str, str] = field(default_factory=dict)
    done: list[VideoReport] = field(default_factory=list)

    def add(self, source: Source, report: VideoReport | None) -> None:
        """Sort a source in; `report` is what is known of it when it is done."""
        if report is None:
            self.sources.append(source)
        else:
            self.done.append(report)


def plan_videos(
    names: Iterable[tuple[Path, str]],
    captions: dict[Path, list[str]],
    preparation: Preparation,
    retry_broken: bool = False,
) -> Plan:
    """Look at every file; `names` are pairs of path and name in the data set.

    What an earlier run could not prepare is left out, unless `retry_broken`.
    """
    plan = Plan()
    found: dict[str, VideoSource] = {}
    twins: dict[str, list[str]] = {}
    for path, name in names:
        try:
            info = probe(path)
        except FootageError as error:
            plan.unusable[name] = str(error).removeprefix(f"{path}: ")
            continue
        if path not in captions:
            plan.unusable[name] = f"no caption: {THREE_WAYS}"
            continue
        sha256 = hash_file(path)
        if sha256 in found:
            plan.unusable[name] = f"the same bytes as {found[sha256].name}"
            twins.setdefault(sha256, []).append(name)
            continue
        num_frames = int(info.duration * preparation.settings.fps)
        found[sha256] = VideoSource(name, sha256, num_frames, path, captions[path])
    for sha256, source in found.items():
        if sha256 in preparation.broken and not retry_broken:
            reason = preparation.broken[sha256].reason
            plan.unusable[source.name] = f"{reason} (an earlier run found this; --retry-broken tries again)"
        else:
            plan.add(source, preparation.done(sha256, source.name, source.captions, twins.get(sha256, [])))
    return plan


def prepare_source(
    source: Source, preparation: Preparation | PartFolder, encoders: Encoders, advance: Callable[[int], None]
) -> VideoReport:
    """Store all scenes of one source; `advance` is told of frames as they are encoded.

    Raises FootageError when it turns out to be unusable; nothing of it stays then.
    """
    footage = source.open(preparation.settings)
    contexts = [encoders.context(caption) for caption in footage.captions]
    height, width = preparation.settings.size
    per_chunk = max(1, CHUNK_PIXELS // (height * width))
    with preparation.video(source.name, source.sha256, footage.captions) as part:
        for piece in (piece for scene in footage.scenes for piece in split(scene)):
            moments = []
            for first in range(0, len(piece), per_chunk):
                chunk = list(islice(footage.frames, min(per_chunk, len(piece) - first)))
                assert chunk, "a source has the frames that its scenes count"
                moments.append(encoders.moments(chunk))
                advance(len(chunk))
            scene = np.concatenate(moments)
            if len(scene) < footage.shortest:
                part.drop(piece, "a single frame between two cuts")
            elif not np.isfinite(scene).all():
                part.drop(piece, "the autoencoder gave values that are no numbers")
            else:
                part.add(piece, scene, contexts, footage.notes)
        deque(footage.frames, maxlen=0)  # lets ffmpeg come to its end and complain
    return part.report


def split(scene: range) -> Iterator[range]:
    """A scene in as few equal pieces as `MAX_SCENE_FRAMES` allows."""
    num_pieces = -(-len(scene) // MAX_SCENE_FRAMES)
    edges = [scene.start + len(scene) * piece // num_pieces for piece in range(num_pieces + 1)]
    return (range(start, stop) for start, stop in pairwise(edges))
