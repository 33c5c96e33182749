"""The measures against the drawn world, whose motion is known: every look, every speed, every pixel."""

from __future__ import annotations

from itertools import product

import cv2
import numpy as np
import pytest

from ldm.data.world import LOOKS, WorldClip, draw_clip
from ldm.evaluation.flow import TAU, Motion, endpoint_error, measure_motion, working_flow
from ldm.evaluation.motion import frozen_clip, reversed_clip, road_expansion, roadside_expansion, sides_region, speed
from ldm.evaluation.statistics import spearman

SIZE, FPS = 128, 10
NEARLY = {"thunderstorm": 0.6}  # clouds and rain before the sky have texture and do not stream


def expansion(frames: np.ndarray) -> float:
    return roadside_expansion(measure_motion(frames))


@pytest.mark.parametrize("look", LOOKS)
def test_every_look_streams_outward(look):
    clips = [draw_clip(look, seed, 2, SIZE, FPS).frames for seed in range(1, 6)]
    least = NEARLY.get(look, 0.8)
    assert np.mean([expansion(clip) for clip in clips]) >= least
    assert np.mean([expansion(reversed_clip(clip)) for clip in clips[:2]]) <= -min(least, 0.7)


def test_a_frozen_drive_does_not():
    assert abs(expansion(frozen_clip(draw_clip("coast", 1, 2, SIZE, FPS).frames))) <= 0.1


def test_speed_follows_the_cars():
    speeds = (5.0, 8.0, 12.0, 16.0, 20.0, 25.0, 30.0)
    for look in ("summer dawn", "night"):
        clips = {pace: [draw_clip(look, seed, 3, SIZE, 25, pace).frames for seed in (1, 2)] for pace in speeds}
        found = [float(np.mean([speed(measure_motion(clip)) for clip in clips[pace]])) for pace in speeds]
        assert spearman(found, speeds) >= 0.95


@pytest.fixture(scope="module")
def known() -> list[tuple[WorldClip, Motion]]:
    """Clips with ground truth and the motion measured on them."""
    looks = product(("coast", "jungle"), (3, 4))
    clips = [draw_clip(look, seed, 3, SIZE, FPS, 6.0, truth=True) for look, seed in looks]
    return [(clip, measure_motion(clip.frames)) for clip in clips]


def test_measured_flow_against_the_truth(known):
    errors, lengths = [], []
    for clip, motion in known:
        hidden = [cv2.resize(pair.astype(np.uint8), motion.grey.shape[:0:-1]) > 0 for pair in clip.occluded]
        seen = motion.textured & ~np.stack(hidden)
        true = working_flow(clip.flow)
        errors.append(endpoint_error(motion.flow, true, seen))
        lengths.append(endpoint_error(np.zeros_like(true), true, seen))
    assert np.mean(errors) < 0.25 * np.mean(lengths)


def test_near_things_stream_as_they_truly_do(known):
    """What is far is drawn along by its neighbours in measured flow, so only near things are compared."""
    for clip, motion in known:
        true = measure_motion(clip.frames, clip.flow)
        assert road_expansion(motion) == pytest.approx(road_expansion(true), abs=0.15)
        assert np.linalg.norm(motion.rotation - true.rotation, axis=1).mean() < 0.6
        assert np.linalg.norm(motion.focus - true.focus) < 10
        depth = np.stack([cv2.resize(frame, motion.grey.shape[:0:-1]) for frame in clip.depth[:-1]])
        near = motion.textured & sides_region(motion) & (depth < 60)
        measured, truth = (
            (its.outward[near] / (np.linalg.norm(its.stream[near], axis=-1) + TAU)).mean() for its in (motion, true)
        )
        assert measured == pytest.approx(truth, abs=0.08)
