"""Pixels, films, palettes and sheets (`ldm/video.py`), whole-or-nothing files, and the drawn drive."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.errors import UserError
from ldm.files import replacing, write_atomically
from ldm.sampling.record import write_clip
from ldm.video import contact_sheet, from_uint8, parse_size, read_metadata, read_video, to_uint8, write_gif, write_mp4
from tests.made_footage import draw_drive


@pytest.fixture(scope="module")
def drive() -> np.ndarray:
    return draw_drive(12, (64, 128), seed=1)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def test_every_byte_survives_the_way_to_floats_and_back():
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    video = from_uint8(frames)
    assert video.shape == (1, 3, 16, 16)
    assert video.min() == -1
    assert video.max() == 1
    assert np.array_equal(to_uint8(video), frames)


def test_pixels_outside_the_range_are_clipped_and_halves_rounded():
    video = torch.tensor([-7.0, 7.0, 0.001]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    assert to_uint8(video)[:, 0, 0, 0].tolist() == [0, 255, 128]


def test_mp4_looks_like_its_input_keeps_rate_and_provenance(tmp_path, drive):
    about = {"prompt": 'dr\u00fcben \u2192 "road"', "seed": 3, "nested": {"scale": 7.5}}
    write_mp4(tmp_path / "a.mp4", drive, fps=12.5, metadata=about)
    frames, fps = read_video(tmp_path / "a.mp4")
    assert frames.shape == drive.shape
    assert fps == 12.5
    assert read_metadata(tmp_path / "a.mp4") == about
    assert psnr(frames, drive) > 34  # what remains is the halved resolution of colour at hard edges
    smooth = np.kron(drive[:, ::8, ::8], np.ones((1, 8, 8, 1))).astype(np.uint8)
    write_mp4(tmp_path / "b.mp4", smooth, fps=10)
    assert psnr(read_video(tmp_path / "b.mp4")[0], smooth) > 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (40, 90, 200), (128, 128, 128)])
def test_mp4_keeps_colours(tmp_path, colour):
    frames = np.full((3, 64, 64, 3), colour, np.uint8)
    write_mp4(tmp_path / "a.mp4", frames, fps=10)
    assert np.abs(read_video(tmp_path / "a.mp4")[0].astype(int) - colour).max() <= 4


@pytest.mark.parametrize("write", [lambda p, f: write_mp4(p, f, 10, {"seed": 1}), lambda p, f: write_gif(p, f, 10)])
def test_the_same_input_gives_the_same_bytes(tmp_path, drive, write):
    write(tmp_path / "a", drive)
    write(tmp_path / "b", drive)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    write(tmp_path / "c", drive[::-1])
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_gif_loops_at_the_right_speed_with_good_colours(tmp_path, drive):
    write_gif(tmp_path / "a.gif", drive, fps=10)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == len(drive)
        assert picture.info["duration"] == 100
        assert picture.info["loop"] == 0
    assert psnr(read_video(tmp_path / "a.gif")[0][: len(drive)], drive) > 30


def test_contact_sheet_places_every_frame(drive):
    sheet = np.asarray(contact_sheet([drive[:3], drive[3:5]], gap=2))
    assert sheet.shape == (2 * 66 + 2, 3 * 130 + 2, 3)
    assert np.array_equal(sheet[68:132, 132:260], drive[4])
    assert (sheet[68:132, 262:390] == 255).all()
    labelled = contact_sheet([drive[:3], drive[3:5]], ["one", "a label much too long for its row " * 9], gap=2)
    assert labelled.size == (392, 2 * (20 + 66) + 2)
    assert np.asarray(labelled)[2:22].min() < 128


def test_of_a_long_clip_the_sheet_shows_64_frames_and_says_so(tmp_path, drive, monkeypatch):
    labels = []
    monkeypatch.setattr(
        "ldm.sampling.record.contact_sheet", lambda rows, words: labels.append(words) or contact_sheet(rows)
    )
    for num in (64, 181):
        record = {"clip": {"prompt": "a road", "fps": 10}, "seed": 3}
        write_clip(tmp_path / "a", drive[np.arange(num) % len(drive)], record)
        assert len(read_video(tmp_path / "a.mp4")[0]) == num
    assert labels == [
        ["a road   (64 frames, seed 3)", "from frame 33"],
        ["a road   (181 frames, 64 of them shown, evenly spaced, seed 3)", "from frame 92"],
    ]
    with Image.open(tmp_path / "a.png") as picture:  # two rows of 32 frames
        assert picture.size == (32 * 132 + 4, 2 * 68 + 4)


def test_wrong_frames_are_refused(tmp_path, drive):
    with pytest.raises(ValueError, match="expected uint8 frames"):
        write_mp4(tmp_path / "a.mp4", drive.astype(np.float32), 10)
    with pytest.raises(ValueError, match="expected uint8 frames"):
        write_gif(tmp_path / "a.gif", drive[:0], 10)
    with pytest.raises(ValueError, match="frames a second above 0, found 0"):
        write_mp4(tmp_path / "a.mp4", drive, 0)
    with pytest.raises(ValueError, match="even sides, found 127x64"):
        write_mp4(tmp_path / "a.mp4", drive[:, :, :127], 10)
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([])
    with pytest.raises(ValueError, match="expected 1 labels"):
        contact_sheet([drive], [])
    assert list(tmp_path.iterdir()) == []


def test_reading_what_is_not_ours(tmp_path, drive):
    (tmp_path / "a.mp4").write_text("no video")
    for read in (read_video, read_metadata):
        with pytest.raises(UserError, match="there is no such file"):
            read(tmp_path / "missing.mp4")
        with pytest.raises(UserError, match="ffmpeg cannot read"):
            read(tmp_path / "a.mp4")
    write_mp4(tmp_path / "b.mp4", drive, 10)
    with pytest.raises(UserError, match=r"expected settings in its `comment` tag"):
        read_metadata(tmp_path / "b.mp4")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    write_atomically(tmp_path / "a", "old")
    with pytest.raises(OSError, match="full"), replacing(tmp_path / "a") as partial:
        partial.write_text("half of the n")
        raise OSError(28, "full")
    assert (tmp_path / "a").read_text() == "old"
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_one_meaning_of_a_size():
    for size in (64, "64", [64, 64], (64, 64), "64x64", OmegaConf.create([64, 64])):
        assert parse_size(size, "size") == (64, 64)
    assert parse_size("32X48", "size") == parse_size([32, 48], "size") == (32, 48)
    for size in ("big", "64x", "1x2x3", 0, -64, 6.5, True, None, [], [64, None], {"a": 1}):
        with pytest.raises(UserError, match=r"prepare.size: expected a number of pixels or HEIGHTxWIDTH, found"):
            parse_size(size, "prepare.size")
