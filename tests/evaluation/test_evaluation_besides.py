"""What is measured besides the rows: flow against the truth, and motion against the frame rate that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.data.world import draw_clip
from ldm.evaluation.commanded_rate import summarise_rates
from ldm.evaluation.true_flow import read_flow, summarise_flow


@pytest.fixture(scope="module")
def clip():
    return draw_clip("coast", 3, 3, 128, 12, 6.0, truth=True)


def test_measured_flow_is_nearer_to_the_truth_than_none(clip):
    reading = read_flow(clip.frames, clip.flow, clip.occluded)
    assert 0 < reading.error < 0.3 * reading.length
    assert reading.roadside_expansion == pytest.approx(reading.true_roadside_expansion, abs=0.2)


def test_another_clip_is_far_from_it(clip):
    reading = read_flow(clip.frames[::-1].copy(), clip.flow, clip.occluded)
    assert reading.error > reading.length
    assert reading.roadside_expansion < 0 < reading.true_roadside_expansion


def test_what_shows_nothing_has_no_error(clip):
    black = read_flow(np.zeros_like(clip.frames), clip.flow, clip.occluded)
    assert black.error is black.length is black.roadside_expansion is None
    hidden = read_flow(clip.frames, clip.flow, np.ones_like(clip.occluded))
    assert hidden.error is None and hidden.roadside_expansion > 0
    summary = summarise_flow("two", [black, read_flow(clip.frames, clip.flow, clip.occluded)])
    assert (summary["error"]["num_clips"], summary["error"]["num_unjudged"]) == (1, 1)


def test_motion_that_follows_the_rate():
    pace = np.array([0.5, 1.0, 2.0, 4.0])
    speeds = {rate: (pace / rate).tolist() for rate in (12.0, 4.0, 6.0)}
    found = summarise_rates("told", speeds)
    assert found["rates"] == [4, 6, 12]
    assert found["within"]["mean"] == pytest.approx(1)  # though the clips differ in pace
    assert 0.2 < found["overall"]["mean"] < 0.6
    assert found["speed"]["4"]["mean"] == pytest.approx(3 * found["speed"]["12"]["mean"])


def test_motion_that_does_not():
    assert summarise_rates("deaf", {rate: [0.4, 0.4] for rate in (4, 6, 12)})["within"]["mean"] == 0
    contrary = summarise_rates("contrary", {rate: [rate, 2 * rate] for rate in (4, 6, 12)})
    assert contrary["within"]["mean"] == pytest.approx(-1) and contrary["overall"]["mean"] < 0


def test_clips_that_cannot_be_judged_at_some_rate_are_left_out():
    found = summarise_rates("some", {4: [3.0, None, 1.0], 6: [2.0, 1.0, 0.5], 12: [1.0, 0.5, 0.2]})
    assert found["num_unjudged"] == 1 and found["within"]["num_clips"] == 2
    none = summarise_rates("none", {rate: [None, None] for rate in (4, 6, 12)})
    assert none["within"]["mean"] is None and none["overall"]["mean"] is None
