"""`scripts/prepare.py --world`: drawn clips under the same contract as footage, with notes on how they were drawn."""

from __future__ import annotations

import json
import os
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from ldm.data.shards import DatasetError, PreparedSet
from ldm.data.world import LOOKS, choose_looks, draw_clip
from ldm.data.world import sources as drawn_sources
from ldm.data.world.sources import DrawnSource, draw_ahead
from ldm.errors import UserError
from ldm.video import from_uint8
from tests.data.preparing.test_prepare import CONFIG, HashTextEncoder, MeanFirstStage, contents, prepare, stand_in
from tests.made_clips import SETTINGS

A, B = LOOKS[0], LOOKS[3]


@pytest.fixture
def encoders(monkeypatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "400")
    return stand_in(monkeypatch)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def run(out, config, clips, *more):
    frames = [] if "--frames" in more else ["--frames", "3"]
    looks = [] if "--looks" in more else ["--looks", f"{A}, {B}"]
    processes = [] if "--processes" in more else ["--processes", "1"]
    words = ["--world", str(clips), *processes, *frames, *looks, *more]
    prepare.main([*words, "--out", str(out), "--config", str(config)])


def test_drawn_clips_are_stored_with_what_is_known_of_them(tmp_path, config, encoders, capsys):
    run(tmp_path / "out", config, 3)
    prepared = PreparedSet(tmp_path / "out", verify=True)
    assert [scene.source for scene in prepared.scenes] == sorted(
        [f"drawn/{A}/000000000", f"drawn/{B}/000000001", f"drawn/{A}/000000002"]
    )
    assert {(scene.num_frames, scene.fps) for scene in prepared.scenes} == {(3, 10.0)}
    scene = next(scene for scene in prepared.scenes if scene.notes["seed"] == 2)
    clip = draw_clip(A, 2, 3, 64, 10)
    assert scene.notes["look"] == A
    assert np.allclose(scene.notes["speed"], clip.speed, atol=1e-5)
    assert np.allclose(scene.notes["yaw"], clip.yaw, atol=1e-5)
    assert scene.captions == list(clip.captions)
    assert np.array_equal(prepared.read_moments(scene), MeanFirstStage().encode(from_uint8(clip.frames)).half().numpy())
    expected = HashTextEncoder().encode(list(clip.captions)).half().numpy()
    assert np.array_equal(prepared.read_context(scene), expected)
    with tarfile.open(tmp_path / "out" / scene.shard) as tar:
        about = json.load(tar.extractfile(f"{scene.key}.json"))
    assert about["notes"] == scene.notes and about["captions"] == scene.captions
    output = capsys.readouterr().out
    assert "Clips: 3 prepared, 0 done before, 0 dropped." in output and "scenes: 3, clips: 3, frames: 9" in output
    assert any(A in line and " 2 " in line and " 6 " in line for line in output.splitlines()), "a row for each look"


def test_more_clips_are_added_and_what_is_done_is_skipped(tmp_path, config, encoders, capsys):
    run(tmp_path / "out", config, 2)
    before = contents(tmp_path / "out")
    run(tmp_path / "out", config, 2)
    assert contents(tmp_path / "out") == before and len(encoders) == 1, "no encoder is built for nothing"
    run(tmp_path / "out", config, 3)
    after = contents(tmp_path / "out")
    assert all(after[name] == content for name, content in before.items() if name.startswith("shard"))
    assert len({scene.source for scene in PreparedSet(tmp_path / "out", verify=True).scenes}) == 3
    assert "Clips: 1 prepared, 2 done before" in capsys.readouterr().out


def test_another_seed_draws_other_clips(tmp_path, config, encoders):
    run(tmp_path / "out", config, 1)
    run(tmp_path / "out", config, 1, "--seed", "7")
    scenes = PreparedSet(tmp_path / "out").scenes
    assert [scene.notes["seed"] for scene in scenes] == [0, 7_000_000]
    assert scenes[0].frames_crc32 != scenes[1].frames_crc32


def test_single_images_are_scenes_of_one_frame(tmp_path, config, encoders):
    run(tmp_path / "out", config, 2, "--frames", "1", "--preview")
    prepared = PreparedSet(tmp_path / "out", verify=True)
    assert [scene.num_frames for scene in prepared.scenes] == [1, 1]
    assert prepared.read_moments(prepared.scenes[0]).shape == (1, 8, 8, 8)


def test_the_same_clip_drawn_in_another_way_is_refused(tmp_path, config, encoders, monkeypatch):
    run(tmp_path / "out", config, 1)
    with pytest.raises(DatasetError, match=r"drawn/.*/000000000 was drawn with another --frames or by another version"):
        run(tmp_path / "out", config, 1, "--frames", "2")
    with pytest.raises(DatasetError, match=r"other settings \(fps was 10.0, now 5.0\)"):
        run(tmp_path / "out", config, 1, "--fps", "5")
    monkeypatch.setattr(drawn_sources, "_mark", lambda look: "another drawing")
    with pytest.raises(DatasetError, match="by another version of this project: choose a fresh --out"):
        run(tmp_path / "out", config, 1)


@pytest.mark.slow
def test_killed_and_repeated_gives_the_same_bytes_and_no_process_is_left(tmp_path, config, encoders, monkeypatch):
    """Two processes draw; they end by themselves."""
    monkeypatch.setenv("PREPARE_WORLD_TEST", str(tmp_path))
    words = ["--looks", A, "--frames", "2", "--processes", "2"]
    child = os.fork()
    if child == 0:
        encode, left = MeanFirstStage.encode, [2]

        def dying(self, pixels):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(self, pixels)

        MeanFirstStage.encode = dying
        try:
            run(tmp_path / "killed", config, 4, *words)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list((tmp_path / "killed" / ".unfinished").glob("*.json"))) == 3, "settings and the first two clips"
    until = time.monotonic() + 20
    while (left := running(str(tmp_path))) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == []
    run(tmp_path / "killed", config, 4, *words)
    run(tmp_path / "straight", config, 4, *words)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def running(mark: str) -> list[str]:
    """Command lines of the processes whose environment has this mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"PREPARE_WORLD_TEST={mark}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_drawing_in_two_processes_gives_the_same_clips_in_order():
    sources = [DrawnSource(look, seed, 2, "") for seed, look in enumerate((A, B, A))]
    for source, drawn in zip(sources, draw_ahead(sources, SETTINGS, 2), strict=True):
        expected = list(source.open(SETTINGS).frames)
        assert np.array_equal(np.stack(list(drawn.open(SETTINGS).frames)), np.stack(expected))
        assert drawn.clip is not None and source.clip is None, "it was drawn elsewhere"


def test_styles_of_the_option_looks():
    assert choose_looks(f" {B} ,{A},{B}") == (B, A)
    with pytest.raises(
        UserError, match=rf"--looks: expected all, moving, still or styles, found 'x{A}'; did you mean '{A}'"
    ):
        choose_looks(f"x{A}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world", "0"], "--world: the procedural world takes 1 to 1,000,000, found 0"),
        (["--world", "2", "--frames", "0"], "--frames: the procedural world takes 1 to 600, found 0"),
        (["--world", "2", "--frames", "601"], "--frames: the procedural world takes 1 to 600, found 601"),
        (["--world", "2", "--seed", "-1"], "--seed: the procedural world takes 0 to"),
        (["--world", "2", "--fps", "0.1"], "--fps: the procedural world takes 0.5 to 240"),
        (["--world", "2", "--size", "2048"], "--size: the procedural world takes 16 to 1,024, found 2,048"),
        (["--world", "2", "--processes", "0"], "--processes: expected at least 1, found 0"),
        (["--world", "2", "--prompt", "x"], "--world makes its own clips and captions; omit"),
        (["--world", "2", "video.mp4"], "--world makes its own clips and captions; omit"),
        ([], "give at least one video or folder, or --world N"),
        (["video.mp4", "--frames", "3"], "--frames requires --world N"),
        (["video.mp4", "--looks", "snow"], "--looks requires --world N"),
    ],
)
def test_invalid_options(tmp_path, config, encoders, words, message):
    with pytest.raises(UserError, match=message):
        prepare.main([*words, "--out", str(tmp_path / "out"), "--config", str(config)])
    assert contents(tmp_path / "out") in ({}, {".unfinished/lock": b""}) or len(contents(tmp_path / "out")) == 2
    assert encoders == []
