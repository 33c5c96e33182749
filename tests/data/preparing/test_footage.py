"""Footage: probing, even spacing, crops, scene cuts, and every kind of file that is no good."""

from __future__ import annotations

import subprocess
from fractions import Fraction

import numpy as np
import pytest

from ldm.data.preparing.footage import (
    FootageError,
    ffmpeg_binary,
    find_cuts,
    find_scenes,
    list_videos,
    name_videos,
    probe,
    read_frames,
)
from ldm.video import write_mp4
from tests.made_footage import draw_drive, number_of, write_audio, write_numbered, write_truncated


@pytest.mark.parametrize(
    ("rate", "fps", "name"),
    [("30", 10, "a.mp4"), ("25", 10, "a.mp4"), ("30000/1001", 10, "a.mkv"), ("24", 7.5, "a.mov"), ("12", 12, "a.avi")],
)
def test_frames_are_evenly_spaced_from_the_first_on(tmp_path, rate, fps, name):
    write_numbered(tmp_path / name, 47, rate)
    numbers = [number_of(frame) for frame in read_frames(tmp_path / name, fps, 64)]
    step = Fraction(rate) / Fraction(fps)
    assert numbers == [int(m * step) for m in range(len(numbers))]
    assert len(numbers) * step >= 47  # up to the end
    assert find_scenes(tmp_path / name, fps).scenes[-1].stop == len(numbers)


def test_probe_says_what_is_in_the_file(tmp_path):
    write_numbered(tmp_path / "a.mp4", 47, "30000/1001")
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.num_frames, info.rate) == (64, 64, 47, Fraction(30000, 1001))
    assert info.duration == pytest.approx(47 * 1001 / 30000, abs=1e-3)


def test_real_footage_is_probed_read_and_is_one_scene(highway):
    info = probe(highway)
    assert (info.width, info.height, info.fps, info.num_frames) == (960, 540, 25.0, 221)
    assert find_scenes(highway, 10).scenes == [range(0, 89)]
    frames = list(read_frames(highway, 10, 128))
    assert len(frames) == 89
    assert frames[0].shape == (128, 128, 3)
    assert frames[0][:40].mean() > frames[0][-40:].mean()  # sky above, road below: upright


def test_crop_is_central_for_any_shape(tmp_path):
    frames = np.zeros((4, 128, 256, 3), np.uint8)
    frames[:, :, 64:192] = [200, 100, 50]
    write_mp4(tmp_path / "wide.mp4", frames, fps=10)
    square = next(read_frames(tmp_path / "wide.mp4", 10, 64))
    assert np.abs(square[:, 2:-2].astype(int) - [200, 100, 50]).max() < 6
    rectangle = next(read_frames(tmp_path / "wide.mp4", 10, (64, 128)))
    assert rectangle.shape == (64, 128, 3)
    assert rectangle[:, :28].max() < 12
    assert rectangle[32, 64].min() > 40


def test_rotation_in_the_headers_is_respected(tmp_path):
    frames = np.zeros((4, 64, 128, 3), np.uint8)
    frames[:, :, :64] = 255  # white on the left
    write_mp4(tmp_path / "flat.mp4", frames, fps=10)
    command = [ffmpeg_binary(), "-loglevel", "error", "-display_rotation", "90", "-i", str(tmp_path / "flat.mp4")]
    subprocess.run([*command, "-c", "copy", str(tmp_path / "turned.mp4")], check=True)
    info = probe(tmp_path / "turned.mp4")
    assert (info.width, info.height) == (64, 128)
    frame = next(read_frames(tmp_path / "turned.mp4", 10, (128, 64)))
    assert frame[96:].min() > 240  # turned by 90 degrees anticlockwise, left is at the bottom
    assert frame[:32].max() < 16


def test_cuts_between_alike_scenes_are_found_and_nothing_else(tmp_path):
    scenes = [draw_drive(length, 128, seed) for length, seed in [(31, 1), (24, 2), (40, 5)]]
    cuts, num_frames = find_cuts(frame[..., ::-1] for scene in scenes for frame in scene)
    assert (cuts, num_frames) == ([31, 55], 95)
    write_mp4(tmp_path / "a.mp4", np.concatenate(scenes), fps=25)
    # At 10 frames a second from 25, frame m is frame floor(2.5 m): 31 / 2.5 = 12.4, 55 / 2.5 = 22.
    assert find_scenes(tmp_path / "a.mp4", 10).scenes == [range(0, 13), range(13, 22), range(22, 38)]


def test_no_frame_of_a_scene_comes_from_beyond_a_cut(tmp_path):
    first, second = draw_drive(33, 64, seed=0) // 2, 255 - draw_drive(30, 64, seed=1) // 4
    write_mp4(tmp_path / "a.mp4", np.concatenate([first, second]), fps=30)
    scenes = find_scenes(tmp_path / "a.mp4", 8).scenes
    bright = [frame.mean() > 160 for frame in read_frames(tmp_path / "a.mp4", 8, 64)]
    assert len(scenes) == 2
    assert not any(bright[m] for m in scenes[0])
    assert all(bright[m] for m in scenes[1])
    assert scenes[1].stop == len(bright)


def test_fades_through_black_split(tmp_path):
    scenes = [draw_drive(40, 64, seed) for seed in (1, 2)]
    ramp = np.linspace(1, 0, 12)[:, None, None, None]
    scenes[0][-12:] = scenes[0][-12:] * ramp
    scenes[1][:12] = scenes[1][:12] * ramp[::-1]
    cuts, _ = find_cuts(frame[..., ::-1] for scene in scenes for frame in scene)
    assert cuts
    assert max(abs(cut - 40) for cut in cuts) <= 3  # in the dark, and nowhere else


@pytest.mark.parametrize("fps", [0, -5])
def test_frames_a_second_must_be_above_zero(tmp_path, fps):
    write_numbered(tmp_path / "a.mp4", 5, "25")
    with pytest.raises(FootageError, match="expected frames a second above 0, found fps"):
        read_frames(tmp_path / "a.mp4", fps, 64)


def test_frames_a_second_above_the_footage(tmp_path):
    write_numbered(tmp_path / "a.mp4", 5, "25")
    with pytest.raises(FootageError, match="26 frames a second were asked for, the footage has 25"):
        read_frames(tmp_path / "a.mp4", 26, 64)


def test_four_pixels_are_too_few(tmp_path):
    write_mp4(tmp_path / "a.mp4", np.zeros((5, 4, 4, 3), np.uint8), fps=10)
    with pytest.raises(FootageError, match=r"a.mp4: 4x4 pixels are too few for 64x64: expected at least 32x32"):
        read_frames(tmp_path / "a.mp4", 10, 64)


def test_files_that_are_no_videos(tmp_path):
    with pytest.raises(FootageError, match=r"missing.mp4: there is no such file"):
        probe(tmp_path / "missing.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(FootageError, match="the file is empty"):
        probe(tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("Dear diary, today I renamed a text file.\n" * 50)
    with pytest.raises(FootageError, match="expected a video, found 2050 bytes that ffmpeg cannot read"):
        probe(tmp_path / "text.mp4")
    write_audio(tmp_path / "audio.mp4")
    with pytest.raises(FootageError, match="expected a video stream, found only audio"):
        probe(tmp_path / "audio.mp4")


def test_a_single_frame_is_no_video(tmp_path):
    write_numbered(tmp_path / "one.mp4", 1, "25")
    with pytest.raises(FootageError, match="expected a video, found a single frame"):
        find_scenes(tmp_path / "one.mp4", 10)
    write_numbered(tmp_path / "one.mkv", 1, "25")
    with pytest.raises(FootageError, match="expected a video, found a single frame"):
        find_scenes(tmp_path / "one.mkv", 10)


def test_a_truncated_file_is_noticed_by_both_readings(tmp_path):
    write_truncated(tmp_path / "cut.mp4")
    message = r"cut.mp4: the file is corrupted or truncated: ffmpeg stopped after frame \d+ \([^@]*\); nothing"
    with pytest.raises(FootageError, match=message):
        find_scenes(tmp_path / "cut.mp4", 10)
    with pytest.raises(FootageError, match="corrupted or truncated"):
        list(read_frames(tmp_path / "cut.mp4", 10, 64))
    content = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "stub.mp4").write_bytes(content[:500])
    with pytest.raises(FootageError, match="ffmpeg cannot read"):
        probe(tmp_path / "stub.mp4")


def test_leaving_early_ends_ffmpeg(tmp_path):
    write_numbered(tmp_path / "a.mp4", 40, "25")
    frames = read_frames(tmp_path / "a.mp4", 10, 64)
    next(frames)
    frames.close()  # must neither hang nor raise


def test_folders_are_searched_and_sorted(tmp_path):
    for name in ("b.mp4", "a/z.MKV", "a/c.mov", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in list_videos([tmp_path, tmp_path / "notes.txt"])]
    assert found == ["a/c.mov", "a/z.MKV", "b.mp4", "notes.txt"]
    (tmp_path / "none").mkdir()
    with pytest.raises(FootageError, match=r"none: expected a folder with videos .* found none"):
        list_videos([tmp_path / "none"])
    with pytest.raises(FootageError, match="nowhere: there is no such file or folder"):
        list_videos([tmp_path / "nowhere"])


def test_videos_are_named_by_their_place_in_the_folder_given(tmp_path):
    for name in ("a/x.mp4", "a/deep/y.mp4", "b/x.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = name_videos([tmp_path / "a", tmp_path / "b" / "x.mp4", tmp_path / "a" / "x.mp4"])
    second = tmp_path / "b" / "x.mp4"
    assert names == {tmp_path / "a" / "deep" / "y.mp4": "deep/y.mp4", tmp_path / "a" / "x.mp4": "x.mp4",
                     second: second.as_posix()}  # fmt: skip
