"""Reading a clip that may be unreadable: again after a moment, and then another one in its place, which is said.

What takes its place depends on the position and on how many were tried there, so that a run is the same stream however
it is cut, as long as the same clips cannot be read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ldm.data.batch import Batch, SceneRange, Unreadable, read_clip
from ldm.data.shards import DatasetError, PreparedSet

log = logging.getLogger(__name__)
FIRST_PAUSE = 0.1  # seconds before the first time that something is read again; twice as long before each other
MOST_TRIED = 10  # clips, at one position


@dataclass(frozen=True)
class Window:
    """Which clip: every `stride`-th frame of a scene from `start`, `frames` of them, and which of the scene's captions;
    None: the empty one."""

    part: SceneRange
    start: int
    frames: int
    stride: int
    caption: int | None

    def about(self) -> dict[str, Any]:
        """In words and numbers; frames are counted in the source, at the prepared frame rate."""
        scene = self.part.scene
        first = scene.start + self.start
        return {
            "source": scene.source,
            "frames": [first + self.stride * frame for frame in range(self.frames)],
            "caption": "" if self.caption is None else scene.captions[self.caption],
            "scene": scene.key,
            "shard": scene.shard,
        }


def drawn_caption(part: SceneRange, caption_dropout: float, random: np.random.Generator) -> int | None:
    """One of the scene's captions; None, the empty one, with this probability."""
    number = int(random.integers(len(part.scene.contexts)))
    return None if random.random() < caption_dropout else number


def read_window(prepared: PreparedSet, window: Window, position: int) -> Batch:
    """A `Batch` of one clip."""
    context = (
        prepared.empty_context
        if window.caption is None
        else prepared.read_caption(window.part.scene, window.caption)
    )
    return read_clip(prepared, window.part, window.start, window.frames, window.stride, context, position)


def read_or_replace(
    prepared: PreparedSet, window_of: Callable[[int], Window], position: int, retries: int
) -> Batch:
    """The clip `window_of(0)`, or the first of `window_of(1)` and so on that can be read; what could not is listed.

    retries: how often each is read again before it is given up. Raises DatasetError where `MOST_TRIED` could not.
    """
    lost: list[Unreadable] = []
    for attempt in range(MOST_TRIED):
        window = window_of(attempt)
        try:
            batch = _read_again(prepared, window, position, retries)
        except (OSError, DatasetError) as error:
            lost.append(Unreadable(position, window.about(), str(error)))
            continue
        return replace(batch, unreadable=lost) if lost else batch
    raise DatasetError(
        f"{prepared.root}: expected a clip that can be read among {MOST_TRIED} tried for position {position}, each "
        f"{1 + retries} times, found none, the first for this: {lost[0].reason}"
    )


def _read_again(prepared: PreparedSet, window: Window, position: int, retries: int) -> Batch:
    for number in range(retries):
        try:
            return read_window(prepared, window, position)
        except (OSError, DatasetError) as error:
            log.debug("position %d is read again: %s", position, error)
            time.sleep(FIRST_PAUSE * 2**number)
    return read_window(prepared, window, position)
